"""llama.cpp as bench.engine sees it: a child in a virtual environment of its own, which `make bench-peers` prepares."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from bench.engine_shapes import prompts
from bench.engine_sides import Step

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / "build" / "bench-llama" / "bin" / "python"
CONVERT_WITHIN_S = 300.0


def absent() -> str:
    """Why llama.cpp cannot be measured here; empty where it can."""
    if not PYTHON.exists():
        return "no llama.cpp: run `make bench-peers`"
    asked = [str(PYTHON), "-c", "import gguf; from bench.llama_api import LlamaLibrary; LlamaLibrary()"]
    said = subprocess.run(asked, env=_environment(), capture_output=True, text=True, check=False, timeout=CONVERT_WITHIN_S)
    return said.stderr.strip().splitlines()[-1] if said.returncode else ""


def convert(checkpoint: Path, kind: str) -> Path:
    """The checkpoint as GGUF beside it, once; `kind`: f16, bf16, q8_0 or q4_0."""
    out = checkpoint / f"{kind}.gguf"
    if not out.exists():
        command = [str(PYTHON), "-m", "bench.llama_convert", str(checkpoint), str(out), kind]
        subprocess.run(command, env=_environment(), check=True, capture_output=True, timeout=CONVERT_WITHIN_S)
    return out


def _environment() -> dict[str, str]:
    """The child's: it finds this package beside its own virtual environment's."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


class LlamaCpp:
    """One loaded GGUF file; `begin` gives a side for one batch, which ends the one before."""

    def __init__(self, path: Path, threads: int) -> None:
        command = [str(PYTHON), "-m", "bench.llama_child", str(path), str(threads)]
        self._child = subprocess.Popen(
            command, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.about = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"the llama.cpp child ended with {self._child.wait()}")
        said: dict[str, Any] = json.loads(line)
        return said

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(question) + "\n")
        self._child.stdin.flush()
        return self._answer()

    def begin(self, batch: int, vocab_size: int, room: int) -> LlamaBatch:
        first = self.ask(prompts=prompts(batch, vocab_size), room=room)["first"]
        return LlamaBatch(self, first)

    def read(self, prompts: list[list[int]]) -> Step:
        """What reading the prompts takes."""
        return Step(*self.ask(prompts=prompts, room=max(map(len, prompts)) + 1)["took"])

    def close(self) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.close()
        self._child.wait(timeout=60)
        self._child.stdout.close()


class LlamaBatch:
    """A batch that llama.cpp decodes; `first`: the tokens after the prompts."""

    def __init__(self, child: LlamaCpp, first: list[int]) -> None:
        self._child = child
        self.first = first

    def turn(self, steps: int) -> list[Step]:
        return [Step(*pair) for pair in self._child.ask(steps=steps)["taken"]]
