# Few targets; re-running any is quick. `make test` and `make demo` need only python3 (3.11+), git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Which build of torch is installed: auto (the CPU build where there is no NVIDIA device, unless pip is configured with sources of
# its own), cpu, or default (what pip finds by itself). An index that cannot be reached is not needed: tools/install.py.
MESH_TORCH ?= auto
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# What is installed beside what a node needs; `make install MESH_EXTRAS=dev,compiler` adds a C compiler of 0.4 GB.
MESH_EXTRAS ?= dev
# Several processes share the machine in tests and the demo: one thread each.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1
# A thread that waits for work must not spin where there are fewer cores than threads: it took tests five times as long.
demo test test-capped test-uncompiled e2e: export OMP_WAIT_POLICY ?= PASSIVE
# Bytecode is kept beside the sources: without it every process of a test compiles what it imports, 0.35 s for a node.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test test-capped test-uncompiled package lint format sim e2e bench bench-peers docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tools/install.py
	@$(PYTHON) tools/install.py --venv $(VENV) --torch '$(MESH_TORCH)' --cpu-index '$(TORCH_CPU_INDEX)' --extras '$(MESH_EXTRAS)'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/mesh demo

PYTEST := $(BIN)/python -m pytest -q
PARALLEL := -n auto --maxprocesses 8 --dist loadfile
FAILOVER := tests/e2e/test_failover.py::test_a_killed_stage_changes_no_token_and_leaves_nothing_behind

# Everything on the machine as it is; then, whatever it has, what depends on the kernels once more as on a machine that has
# AVX2 alone, and as on one that has no compiler. Left out of those two: what no kernel changes (the markers in pyproject.toml).
# Tests that start nodes of their own come last, one at a time: they want the machine to themselves.
test: $(STAMP)
	$(BIN)/python -m tools.kernels
	$(PYTEST) $(PARALLEL) --ignore tests/e2e
	$(MAKE) --no-print-directory test-capped test-uncompiled
	$(PYTEST) tests/e2e

test-capped: export MESH_CPU_ISA := avx2
test-capped: export ONEDNN_MAX_CPU_ISA := AVX2
test-capped: export ATEN_CPU_CAPABILITY := avx2
test-capped: export MKL_ENABLE_INSTRUCTIONS := AVX2
test-capped: $(STAMP)
	@echo "held to AVX2: what depends on the kernels"
	$(BIN)/python -m tools.kernels
	$(PYTEST) $(PARALLEL) -m "not no_kernel" tests/engine tests/rag/test_embed.py
	$(PYTEST) $(FAILOVER)

test-uncompiled: export MESH_CPU_ISA := none
test-uncompiled: $(STAMP)
	@echo "without the compiled kernel: what depends on it"
	$(BIN)/python -m tools.kernels
	$(PYTEST) $(PARALLEL) -m "not no_kernel and not torchs_kernel" tests/engine
	$(PYTEST) $(FAILOVER)

# Builds sdist and wheel, and tries the wheel in a clean environment: tools/package_trial.py.
package: $(STAMP)
	$(BIN)/python -m tools.package_trial

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy mesh membership routing rag node cli tools bench tests examples

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sim: $(STAMP)
	$(BIN)/mesh simulate --seed 1 --nodes 100 --kill 5
	$(BIN)/python -m tools.sim_storms --seeds 10000

e2e: $(STAMP)
	$(BIN)/python -m pytest -q tests/e2e

bench: $(STAMP)
	$(BIN)/python -m bench.engine --quick
	$(BIN)/python -m bench.rag --quick
	$(BIN)/python -m bench.availability --quick
	$(BIN)/python -m bench.membership --quick
	$(BIN)/python -m bench.load --quick

# What bench.membership and bench.engine measure us against, each in a virtual environment of its own. llama.cpp comes
# prebuilt for AVX2 (a wheel of 34 MB); where that does not load, and with LLAMA_CPP=source, it is built for this machine's own
# instructions from llama-cpp-python's sources, which needs a C++ compiler and up to 15 minutes.
LLAMA_CPP ?= prebuilt
LLAMA_PYTHON := build/bench-llama/bin/python
LLAMA_PIP := $(LLAMA_PYTHON) -m pip --quiet --disable-pip-version-check
LLAMA_LOADS := PYTHONPATH=. $(LLAMA_PYTHON) -c "from bench.llama_api import LlamaLibrary; LlamaLibrary()"

bench-peers: build/bench-peers/.installed build/bench-llama/.$(LLAMA_CPP)

build/bench-peers/.installed:
	$(PYTHON) -m venv build/bench-peers
	build/bench-peers/bin/python -m pip install --quiet --disable-pip-version-check kinship==0.4.0
	@touch $@

build/bench-llama/.prebuilt:
	$(PYTHON) -m venv --clear build/bench-llama
	$(LLAMA_PIP) install gguf==0.19.0
	$(LLAMA_PIP) install --only-binary :all: xllamacpp==2026.10.11549 && $(LLAMA_LOADS) || \
	  { $(LLAMA_PIP) uninstall --yes xllamacpp; $(LLAMA_PIP) install llama-cpp-python==0.3.36 && $(LLAMA_LOADS); }
	@touch $@

build/bench-llama/.source:
	$(PYTHON) -m venv --clear build/bench-llama
	$(LLAMA_PIP) install gguf==0.19.0 llama-cpp-python==0.3.36
	$(LLAMA_LOADS)
	@touch $@

docs: $(STAMP)
	$(BIN)/python -m cli.reference > docs/cli.md

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
