"""A span computed by several ranks: right, and the same bits however a sequence is computed."""

from __future__ import annotations

import gc
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from mesh.errors import BadRequest
from mesh.ids import ModelId
from mesh.view import Span
from node.engine import selfcheck
from node.engine.kv.page_store import PageStore
from node.engine.model import tensor_shard
from node.engine.model.all_reduce import GroupAllReduce, SharedEmbedding, SummedProduct
from node.engine.model.attention import Segment
from node.engine.model.checkpoint import Checkpoint, read_checkpoint
from node.engine.model.linear import KERNELS, Kernel
from node.engine.model.local_stage import LocalStage
from node.engine.model.tensor_shard import Shard, shard_plan_of
from node.engine.parallel.messages import ForgetNumber, ForwardStep, KeepPage, RestoreSequence
from node.engine.parallel.reference import reference_output
from node.engine.parallel.stage import ParallelStage, SharedPage
from node.engine.parallel.worker_group import WorkersLost
from tests.engine.checkpoints import make_checkpoint
from tests.engine.offered import FLOAT32, offered
from tests.engine.test_exactness import Sequence, assert_same, generate, load, prompt, step
from tests.engine.worker_groups import ThreadWorkerGroup, parallel

pytestmark = pytest.mark.torchs_kernel
CUT = ("llama_tied", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "gpt_neox", "granite", "cohere", "smollm3")


@contextmanager
def ranks_of(directory: Path, ranks: int, kernel: str, start: int = 0, end: int = 4) -> Iterator[Any]:
    stage = parallel(directory, ranks, kernel, start, end)
    try:
        yield stage
    finally:
        stage.close()


@pytest.mark.parametrize(("kernel", "ranks"), [*offered("mesh-bf16", "onednn-bf16", beside=(2,)), *offered(FLOAT32, beside=(4,))])
def test_tokens_and_logits_are_bit_equal_however_a_sequence_is_computed(
    kernel: str, ranks: int, checkpoint_of: Callable[[str], Path]
) -> None:
    directory = checkpoint_of("llama")  # two KV heads: four ranks share them
    with ranks_of(directory, ranks, kernel) as whole, ranks_of(directory, ranks, kernel, 1, 4) as late:
        path = [(whole, 0, 4)]
        alone = generate(Sequence(prompt(1, 70), path), chunk=512)
        assert_same(alone, generate(Sequence(prompt(1, 70), path), chunk=16))
        assert_same(alone, generate(Sequence(alone.tokens[: 70 + 3], path), chunk=512, answer=3))
        assert_same(alone, generate(Sequence(prompt(1, 70), [(whole, 0, 2), (late, 2, 4)]), chunk=33))
        batched, others = Sequence(prompt(1, 70), path), [Sequence(prompt(seed, 9 * seed), path) for seed in range(2, 5)]
        step([(others[0], 18), (batched, 41), (others[1], 27)])
        step([(others[2], 36), (others[0], 1), (batched, 29)])
        for _ in range(5):
            step([(others[0], 1), (others[1], 1), (others[2], 1), (batched, 1)])
        assert_same(alone, batched)
    if kernel == FLOAT32:  # one of them will do
        with ranks_of(directory, ranks, kernel) as again:
            assert_same(alone, generate(Sequence(prompt(1, 70), [(again, 0, 4)]), chunk=512))


def probe_reference(checkpoint: Checkpoint, start: int, end: int, kernel: Kernel) -> torch.Tensor:
    """Of the self-check's probe, float32."""
    probe = selfcheck.SelfcheckInput(LocalStage(checkpoint, start, start + 1, kernel, 1), 1, selfcheck.PROBE_TOKENS)
    return reference_output(checkpoint, start, end, kernel, 1, probe.ids, probe.hidden).float()


@pytest.mark.parametrize("name", CUT)
def test_architectures_that_can_be_cut_compute_what_the_plain_model_does(name: str, checkpoint_of: Callable[[str], Path]) -> None:
    directory, kernel = checkpoint_of(name), KERNELS[FLOAT32]
    plain = probe_reference(read_checkpoint(directory), 0, 4, kernel)
    with ranks_of(directory, 2, FLOAT32) as stage:
        assert selfcheck.distance_to_reference(stage, plain) < 1e-5
        assert selfcheck.uses_its_sliding_window(stage)
        assert stage.windows == {"mistral": {32}, "gemma2": {0, 32}, "gemma3": {32}}.get(name, {0})
        if name in ("gemma2", "gpt_neox"):  # through the model's own code, as no Llama-shaped one
            assert selfcheck.is_exact(stage)


def test_the_oracle_computes_layer_by_layer_what_the_plain_stage_computes_at_once(checkpoint_of: Callable[[str], Path]) -> None:
    checkpoint, kernel = read_checkpoint(checkpoint_of("gemma2")), KERNELS["aten-bf16"]
    for start, end in ((0, 4), (1, 3)):
        at_once = selfcheck.reference_output(LocalStage(checkpoint, start, end, kernel, 1))
        assert torch.equal(probe_reference(checkpoint, start, end, kernel), at_once)


def test_other_numbers_of_ranks_round_otherwise(checkpoint_of: Callable[[str], Path]) -> None:
    """Why the numerics fingerprint names the number."""
    directory = checkpoint_of("llama")
    whole = generate(Sequence(prompt(1, 70), [(load(directory, 0, 4, FLOAT32), 0, 4)]), chunk=512, answer=1)
    with ranks_of(directory, 2, FLOAT32) as two:
        cut = generate(Sequence(prompt(1, 70), [(two, 0, 4)]), chunk=512, answer=1)
    assert not torch.equal(whole.logits[70], cut.logits[70])
    torch.testing.assert_close(whole.logits[70], cut.logits[70], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["phi3", "gpt2", "opt", "olmo2", "glm4", "mixtral"])
def test_architectures_that_cannot_be_cut_are_refused(name: str, checkpoint_of: Callable[[str], Path]) -> None:
    checkpoint = read_checkpoint(checkpoint_of(name))
    with pytest.raises(BadRequest, match="cannot be computed by 2 workers"):
        ParallelStage(checkpoint, 0, 4, KERNELS[FLOAT32], 1, 2)


def test_a_layer_that_no_plan_names_is_refused_by_the_ranks(tmp_path: Path) -> None:
    """Cohere's norms over all query heads at once hold a row a head."""
    directory = make_checkpoint(tmp_path, "cohere", use_qk_norm=True)
    with pytest.raises(BadRequest, match=r"self_attn.q_norm cannot be computed by 2 workers \(it is a CohereLayerNorm"):
        parallel(directory, 2, FLOAT32)


def test_a_middle_that_does_not_divide_is_refused_by_name(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "llama", intermediate_size=177)
    with pytest.raises(BadRequest, match=r"layers.0.mlp.gate_proj .* \(177 outputs cannot be cut into 2 equal parts\)"):
        parallel(directory, 2, FLOAT32)


def test_a_kernel_that_does_not_exist_here_is_the_kernels_fault_alone(
    checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_kernel(self: LocalStage) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(LocalStage, "pack", no_kernel)
    with pytest.raises(ValueError, match="no such instruction"):
        parallel(checkpoint_of("llama"), 2, FLOAT32)


# ---- weights


class CountedSlice:
    """A slice of a safetensors file that adds up what is read through it."""

    def __init__(self, stored: Any, read_bytes: list[int]) -> None:
        self._stored = stored
        self._read_bytes = read_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stored, name)

    def __getitem__(self, part: Any) -> torch.Tensor:
        taken = cast(torch.Tensor, self._stored[part])
        self._read_bytes.append(taken.nbytes)
        return taken


def test_a_rank_reads_its_own_part_of_the_span_alone(
    checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes: list[int] = []
    from safetensors import safe_open as real

    class Counted:
        def __init__(self, *given: Any) -> None:
            self._file = real(*given)

        def keys(self) -> Any:
            return self._file.keys()

        def get_slice(self, name: str) -> CountedSlice:
            return CountedSlice(self._file.get_slice(name), read_bytes)

    monkeypatch.setattr(tensor_shard, "safe_open", Counted)
    checkpoint = read_checkpoint(checkpoint_of("llama"))
    kernel = KERNELS[FLOAT32]
    whole = sum(tensor.nbytes for tensor in LocalStage(checkpoint, 0, 4, kernel, 1).model.parameters())
    for ranks in (2, 4):
        shard_plan = shard_plan_of(checkpoint, ranks)
        for rank in range(ranks):
            read_bytes.clear()
            LocalStage(checkpoint, 0, 4, kernel, 1, shard=Shard(shard_plan, rank))
            assert sum(read_bytes) < whole * (1 / ranks + 0.05)  # norms are read by all, and KV heads by two of four


def test_a_bias_behind_a_sum_is_added_once(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path, "llama", attention_bias=True, mlp_bias=True)
    file = directory / "model.safetensors"
    stored = load_file(file)
    save_file({name: torch.ones_like(held) if name.endswith(".bias") else held for name, held in stored.items()}, file)
    checkpoint = read_checkpoint(directory)
    held = [
        LocalStage(checkpoint, 0, 1, KERNELS[FLOAT32], 1, shard=Shard(shard_plan_of(checkpoint, 2), rank)) for rank in range(2)
    ]
    first, second = (stage.model.model.layers[0].self_attn.o_proj.bias for stage in held)
    assert first.shape == second.shape == (64,)
    assert first.all() and not second.any()


# ---- sums


FACTORS = (1e8, 1.0, -1e8)


class Noted:
    """A process group of three ranks, whose parts are this one's times a factor each."""

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor]) -> Noted:
        for out, factor in zip(outputs[0], FACTORS):
            out.copy_(inputs[0] * factor)
        return self

    def wait(self) -> None: ...


def test_a_rank_reads_the_files_of_the_model_and_no_others(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(checkpoint_of("llama"), directory)
    mine = Shard(shard_plan_of(read_checkpoint(directory), 2), 0)
    expected = set(mine.tensors(directory))
    save_file({"stray.weight": torch.zeros(2), "lm_head.weight": torch.zeros(2)}, directory / "zz.safetensors")
    assert set(mine.tensors(directory)) == expected
    assert mine.tensors(directory)["lm_head.weight"].get_shape() != [2], "not the stray file's"


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_parts_are_added_in_the_order_of_the_ranks_wherever_an_element_stands(rows: int) -> None:
    """In float32 1e8 + 1 - 1e8 is 0 in this order, and 1 where the two large ones meet first."""
    assert not GroupAllReduce(Noted(), 3)(torch.ones(rows, 3)).any()


def test_a_summed_product_rounds_once() -> None:
    """Two bfloat16 parts that each round away what together they hold."""
    rows = torch.ones(2, 1, dtype=torch.bfloat16)

    class Thin:
        def __call__(self, rows: torch.Tensor) -> torch.Tensor:
            raise AssertionError("the wide product is there")

        def wide(self, rows: torch.Tensor) -> torch.Tensor:
            return torch.full((2, 1), 1.0 + 2**-9)

    product = SummedProduct(Thin(), lambda part: part * 2)
    assert product(rows).float().tolist() == [[2.0], [2.0]]
    assert product.plus(rows, torch.full((2, 1), 2.0, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert product.plus(rows, torch.full((2, 1), -2.0, dtype=torch.bfloat16)).float().tolist() == [[2**-8], [2**-8]]


def test_a_rank_looks_up_its_own_tokens_and_gives_zeros_for_the_others() -> None:
    table = torch.nn.Embedding(3, 2)
    parts: list[torch.Tensor] = []

    def summing(part: torch.Tensor) -> torch.Tensor:
        parts.append(part)
        return part

    embedding = SharedEmbedding(table, 5, summing)
    rows = embedding(torch.tensor([4, 5, 7, 8]))
    assert torch.equal(rows[1:3], table.weight[[0, 2]])
    assert not rows[0].any() and not rows[3].any() and parts[0].dtype is torch.float32


# ---- what is kept


def test_what_is_dropped_here_is_forgotten_by_the_ranks_with_the_next_step(checkpoint_of: Callable[[str], Path]) -> None:
    groups: list[ThreadWorkerGroup] = []

    def start_workers(ranks: int) -> Any:
        groups.append(ThreadWorkerGroup(ranks))
        return groups[0]

    checkpoint = read_checkpoint(checkpoint_of("llama"))
    stage: Any = ParallelStage(checkpoint, 0, 4, KERNELS[FLOAT32], 1, 2, start_workers=start_workers)
    stage.pack()

    def run(kv: Any, ids: list[int], position: int) -> torch.Tensor:
        where = range(position, position + len(ids))
        segments = [Segment(0, len(ids), position, kv)]
        logits: torch.Tensor = stage.forward(0, 4, segments, where, ids=ids, logits_at=[len(ids) - 1])
        return logits

    kv = stage.sequence()
    ids = prompt(3, 20)
    run(kv, ids[:16], 0)
    page = kv.page(0, 16, range(4))
    expected = run(kv, ids[16:], 16)
    other = stage.sequence()
    other.restore([page])
    assert torch.equal(run(other, ids[16:], 16), expected)
    numbers = kv.number, other.number, page.number
    del kv, page
    gc.collect()
    run(other, [7], 20)
    stage.close()
    changes = [said.changes for said in groups[0].said if isinstance(said, ForwardStep)]
    assert changes == [
        (),
        (KeepPage(numbers[2], numbers[0], 0, 16, 0, 4),),
        (RestoreSequence(numbers[1], (numbers[2],)),),
        (ForgetNumber(numbers[0]), ForgetNumber(numbers[2], page=True)),
    ]


def test_a_page_that_workers_keep_cannot_be_spilled() -> None:
    kept = PageStore(Span(ModelId("toy"), 0, 4), cast(Any, None), held_by_workers=True)
    kept.store(1, cast(Any, SharedPage(deque(), page=True)))
    assert not kept.spill(1) and len(kept) == 0


def test_a_closed_stage_computes_no_more(checkpoint_of: Callable[[str], Path]) -> None:
    stage: Any = parallel(checkpoint_of("llama"), 2, FLOAT32)
    kv = stage.sequence()
    stage.close()
    stage.close()
    with pytest.raises(WorkersLost, match="told to end"):
        stage.forward(0, 4, [Segment(0, 1, 0, kv)], [0], ids=[5], logits_at=[0])
