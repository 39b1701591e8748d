"""The stage for GPUs, run on this CPU: the same code with another recorder, against the plain model and against itself."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mesh.view import Span, is_exact
from node.engine import loading, selfcheck
from node.engine.device import CPU
from node.engine.kernels import kernel_choice
from node.engine.kernels.kernel_choice import KernelChoice
from node.engine.kv.blocks import BLOCK_TOKENS
from node.engine.loading import load_stage
from node.engine.model.attention import Segment
from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.linear import KERNELS
from node.engine.model.paged_stage import DeviceStage
from node.engine.paged.kv import FIRST_PAGES
from node.engine.paged.plan import KV_PAGE_TOKENS
from tests.engine.devices import DEVICE, needs_gpu, no_gpu, recorder, stage_on
from tests.engine.offered import FLOAT32
from tests.engine.test_exactness import Sequence, assert_same, continued, generate, load, prompt, step
from tests.engine.test_prefix_cache import SplitPath, bits, numbers
from tests.engine.test_worker import MODEL, running, wait_until

pytestmark = pytest.mark.torchs_kernel


def test_any_number_of_rows_and_any_company_gives_the_same_bits(checkpoint_of: Callable[[str], Path]) -> None:
    directory = checkpoint_of("llama")
    whole, late = (stage_on(directory, start, 4, "cuda-fp32") for start in (0, 1))
    path = [(whole, 0, 4)]
    alone = generate(Sequence(prompt(1, 270), path), chunk=512)  # across a page
    assert_same(alone, generate(Sequence(prompt(1, 270), path), chunk=16))
    assert_same(alone, generate(continued(alone, 64, [32, 32], 270), chunk=100))
    assert_same(alone, generate(Sequence(alone.tokens[:273], path), chunk=512, answer=3))
    assert_same(alone, generate(Sequence(prompt(1, 270), [(whole, 0, 2), (late, 2, 4)]), chunk=33))
    batched, others = Sequence(prompt(1, 270), path), [Sequence(prompt(seed, 9 * seed), path) for seed in range(2, 5)]
    step([(others[0], 18), (batched, 141), (others[1], 27)])
    step([(others[2], 36), (others[0], 1), (batched, 129)])
    for _ in range(5):
        step([(others[0], 1), (others[1], 1), (others[2], 1), (batched, 1)])
    assert_same(alone, batched)


def test_tokens_are_those_of_the_stage_on_the_cpu(checkpoint_of: Callable[[str], Path]) -> None:
    directory = checkpoint_of("qwen3")
    ours = generate(Sequence(prompt(1, 70), [(stage_on(directory, 0, 4, "cuda-fp32"), 0, 4)]), chunk=40)
    theirs = generate(Sequence(prompt(1, 70), [(load(directory, 0, 4, FLOAT32), 0, 4)]), chunk=40)
    assert ours.tokens == theirs.tokens
    for position, logits in theirs.logits.items():
        torch.testing.assert_close(ours.logits[position], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt2", "phi3"])
def test_windows_capped_scores_and_foreign_layers_are_those_of_the_plain_model(
    name: str, checkpoint_of: Callable[[str], Path]
) -> None:
    checkpoint = read_checkpoint(checkpoint_of(name))
    stage = DeviceStage(checkpoint, 0, 4, KERNELS["cuda-fp32"], 1, device=DEVICE)
    plain = selfcheck.reference_output(stage)
    stage.pack()
    assert selfcheck.distance_to_reference(stage, plain) < 1e-5
    assert selfcheck.uses_its_sliding_window(stage)
    assert selfcheck.is_exact(stage)


def test_half_precision_is_as_near_the_plain_model_as_a_load_demands(checkpoint_of: Callable[[str], Path]) -> None:
    stage = DeviceStage(read_checkpoint(checkpoint_of("llama")), 0, 4, KERNELS["cuda-bf16-tiled"], 1, device=DEVICE)
    plain = selfcheck.reference_output(stage)
    stage.pack()
    assert selfcheck.matches_reference(stage, plain)


def test_attention_that_the_device_cannot_run_is_the_kernels_fault_alone(checkpoint_of: Callable[[str], Path]) -> None:
    stage = DeviceStage(read_checkpoint(checkpoint_of("llama")), 0, 4, KERNELS["cuda-bf16"], 1, device=CPU)
    with pytest.raises((RuntimeError, ValueError)):  # flash attention on a CPU: a load goes on to the next kernel
        stage.pack()


def decoding(stage: Any, rows: int) -> Callable[[], torch.Tensor]:
    """`rows` sequences of one token; each call computes another token of each."""
    kept = [stage.sequence() for _ in range(rows)]
    position = 0

    def one() -> torch.Tensor:
        nonlocal position
        segments = [Segment(row, 1, position, kv) for row, kv in enumerate(kept)]
        position += 1
        out: torch.Tensor = stage.forward(
            0, 4, segments, [position - 1] * rows, ids=[5 + row for row in range(rows)], logits_at=range(rows)
        )
        return out

    return one


def test_decoding_steps_of_one_form_are_recorded_once(checkpoint_of: Callable[[str], Path]) -> None:
    stage: Any = stage_on(checkpoint_of("llama"), 0, 4, "cuda-fp32")
    before = len(stage.recorded)
    three = decoding(stage, 3)
    first = [three() for _ in range(4)]
    assert len(stage.recorded) == before + 1, "three rows share the bucket and the length of their tables at every step"
    four = decoding(stage, 4)
    again = [four() for _ in range(4)]
    assert len(stage.recorded) == before + 1
    assert all(torch.equal(one, other[:3]) for one, other in zip(first, again))
    stage.recorded = None
    plainly = decoding(stage, 3)
    assert all(torch.equal(one, plainly()) for one in first)


def test_pools_that_grew_are_read_where_they_are_now(checkpoint_of: Callable[[str], Path]) -> None:
    stage: Any = stage_on(checkpoint_of("llama"), 0, 4, "cuda-fp32")
    kept = generate(Sequence(prompt(1, 20), [(stage, 0, 4)]), chunk=512, answer=3)
    alone = generate(Sequence(prompt(1, 20), [(stage, 0, 4)]), chunk=512)
    generation = stage._paged.generation
    crowd = stage.sequence()
    crowd.expect(2 * FIRST_PAGES * KV_PAGE_TOKENS)
    assert stage._paged.generation > generation and stage._paged.held(0)[0].shape[0] > 2 * FIRST_PAGES
    assert_same(alone, generate(kept, chunk=512, answer=3))


def test_pages_of_a_sequence_that_is_gone_come_back_empty(checkpoint_of: Callable[[str], Path]) -> None:
    stage: Any = stage_on(checkpoint_of("llama"), 0, 4, "cuda-fp32")
    alone = generate(Sequence(prompt(1, 20), [(stage, 0, 4)]), chunk=512)
    poisoned = stage.sequence()
    poisoned.expect(KV_PAGE_TOKENS)
    with torch.inference_mode():
        for layer in range(4):
            for pool in stage._paged.held(layer):
                pool[poisoned.pages[0]] = float("nan")
    page = poisoned.pages[0]
    del poisoned
    gc.collect()
    after = Sequence(prompt(1, 20), [(stage, 0, 4)])
    generate(after, chunk=512)
    kv: Any = after.kv[0]
    assert kv.pages == [page], "the same page"
    assert_same(alone, after)


@pytest.mark.parametrize(("changes", "said"), [({"quantize": "int8"}, "int8 weights"), ({"ranks": 2}, "--tensor-parallel")])
def test_what_a_gpu_does_not_compute_is_refused_before_anything_is_read(
    changes: dict[str, Any], said: str, checkpoint_of: Callable[[str], Path]
) -> None:
    with pytest.raises(Exception, match=f"llama: {said} can be computed on CPUs only"):
        load_stage(read_checkpoint(checkpoint_of("llama")), 0, 4, "auto", 1, on=torch.device("cuda", 0), **changes)
    with pytest.raises(Exception, match="mixtures of experts"):
        load_stage(read_checkpoint(checkpoint_of("mixtral")), 0, 4, "auto", 1, on=torch.device("cuda", 0))


@needs_gpu
def test_a_gpu_serves_what_its_self_check_found_exact(checkpoint_of: Callable[[str], Path]) -> None:
    assert not no_gpu()
    loaded = load_stage(read_checkpoint(checkpoint_of("llama")), 0, 4, "float32", 1, on=torch.device("cuda", 0))
    assert isinstance(loaded.stage, DeviceStage) and loaded.stage.recorded is not None
    assert_same(
        generate(Sequence(prompt(1, 70), [(loaded.stage, 0, 4)]), chunk=512),
        generate(Sequence(prompt(1, 70), [(loaded.stage, 0, 4)]), chunk=16),
    )


def test_the_engine_serves_from_pages_on_another_device(
    checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Prefix pages kept on the device, and spilled to the host: an answer that begins with them equals the cold one."""

    def stage(checkpoint: Any, start: int, end: int, kernel: Any, threads: int, watch: Any, *more: Any) -> DeviceStage:
        return DeviceStage(checkpoint, start, end, kernel, threads, watch, device=DEVICE, record=recorder())

    monkeypatch.setattr(loading, "_stage", stage)
    monkeypatch.setattr(kernel_choice, "choose", lambda *given: KernelChoice((KERNELS["cuda-fp32"],), ""))
    token_bytes = 4 * 2 * 2 * 16 * 4
    given: dict[str, Any] = {"kv_memory_bytes": 2 * BLOCK_TOKENS * token_bytes, "spill_memory_bytes": 64 << 20}
    with running((checkpoint_of("llama"), 0, 4), **given) as one:
        assert is_exact(one.engine.statistics().numerics[Span(MODEL, 0, 4)])
        path = SplitPath((one, 0, 4))
        cold = {seed: path.answer(f"cold{seed}", numbers(seed, 300)) for seed in range(4)}
        wait_until(lambda: one.engine.statistics().scheduler.spilled_pages > 9)
        for seed in (0, 3):
            warm = path.answer(f"warm{seed}", numbers(seed, 300))
            assert warm[0].cached == 288 and bits(warm) == bits(cold[seed])
