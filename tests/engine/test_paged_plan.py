"""What a step for block tables says in numbers, the flash kernel's arguments, staging in turns, and devices by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.attention.varlen
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import BadRequest
from node.engine import device
from node.engine.kernels import machine
from node.engine.model.linear import KERNELS
from node.engine.paged.attention import PagedStep, flash, tiled
from node.engine.paged.kv import PagedKV, PagedStore
from node.engine.paged.plan import KV_PAGE_TOKENS, TILE_ROWS, PagedSegment, padded_decode, pages_for, plan_step, shapes
from node.engine.paged.recorded import MAX_RECORDINGS, RecordedSteps, no_recording
from node.engine.paged.staging import BUFFERS, Staging
from tests.engine.devices import needs_gpu

CPU = torch.device("cpu")


def parts_of(described: list[tuple[int, int]]) -> list[PagedSegment]:
    """(rows, position) of each; every sequence with pages of its own, in falling order."""
    parts, row, page = [], 0, 1
    for count, position in described:
        needed = pages_for(position + count)
        parts.append(PagedSegment(row, count, position, tuple(range(page + needed - 1, page - 1, -1))))
        row, page = row + count, page + needed
    return parts


some_parts = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 700)), min_size=1, max_size=6)


@given(some_parts, st.integers(0, 9))
def test_every_row_is_stored_once_and_answered_by_its_own_query(described: list[tuple[int, int]], padding: int) -> None:
    parts = parts_of(described)
    count = sum(part.count for part in parts)
    plan = plan_step(parts, range(100, 100 + count), [count - 1], count + padding, 3)
    arrays, sizes = plan.arrays, plan.sizes
    assert [len(getattr(arrays, name)) for name in shapes(sizes)] == [
        torch.Size(shape).numel() for shape in shapes(sizes).values()
    ]
    assert len(set(arrays.slots[:count])) == count and min(arrays.slots[:count]) >= KV_PAGE_TOKENS
    assert max(arrays.slots[count:], default=0) < KV_PAGE_TOKENS, "padding writes into the page of nobody"
    assert arrays.logit_rows == [count - 1] * 3 and arrays.starts[-1] == count
    for number, part in enumerate(parts):
        for offset in range(part.count):
            row, position = part.row + offset, part.position + offset
            place = arrays.answer_rows[row]
            assert arrays.tile_rows[place] == row and arrays.tile_positions[place] == position == arrays.positions[row]
            assert arrays.tile_segments[place // TILE_ROWS] == number
            page = arrays.tables[number * sizes.table_pages + position // KV_PAGE_TOKENS]
            assert arrays.slots[row] == page * KV_PAGE_TOKENS + position % KV_PAGE_TOKENS
        assert arrays.lengths[number] == part.position + part.count


@given(st.lists(st.integers(0, 600), min_size=1, max_size=7), st.integers(0, 5))
def test_recorded_steps_have_shapes_that_follow_from_the_bucket_and_the_longest_table(positions: list[int], more: int) -> None:
    parts = parts_of([(1, position) for position in positions])
    plan = plan_step(padded_decode(parts, 8), [7] * len(parts), range(len(parts)), 8, 8)
    longest = max(len(part.pages) for part in parts)
    assert (plan.sizes.rows, plan.sizes.tiles, plan.sizes.segments, plan.sizes.logit_rows) == (8, 8, 8, 8)
    assert plan.sizes.table_pages in (1, 2, 4) and plan.sizes.table_pages >= longest
    assert plan.arrays.starts == list(range(9)) and plan.longest_segment == 1
    assert plan.arrays.slots[len(parts) :] == [0] * (8 - len(parts))


# ---- attention


def plain(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, position: int, window: int) -> torch.Tensor:
    """`[rows, heads, dim]` over `[tokens, kv_heads, dim]`, the textbook's way, in float64."""
    group = q.shape[1] // keys.shape[1]
    keys, values = (side.double().repeat_interleave(group, 1) for side in (keys, values))
    scores = torch.einsum("rhd,thd->hrt", q.double(), keys) * 0.3
    rows, columns = torch.arange(position, position + len(q))[:, None], torch.arange(len(keys))
    hidden = (columns > rows) | ((columns <= rows - window) if window else torch.zeros_like(columns > rows))
    return torch.einsum("hrt,thd->rhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    num_splits: int,
) -> torch.Tensor:
    """What torch documents of its own: causal from the end of `seqused_k`, and a window that counts what lies before a row."""
    assert all(given.dtype is torch.int32 for given in (cu_seq_q, seqused_k, block_table))
    assert cu_seq_k is None and num_splits == 1 and query.is_contiguous()
    assert enable_gqa == (query.shape[1] != key.shape[2])
    out = torch.full_like(query, float("nan"))
    for number, length in enumerate(seqused_k.tolist()):
        rows = slice(int(cu_seq_q[number]), int(cu_seq_q[number + 1]))
        assert rows.stop - rows.start <= max_q and length <= max_k and window_size[1] == 0
        sides = [side[block_table[number].long()].flatten(0, 1)[:length] for side in (key, value)]
        window = window_size[0] + 1  # 0: everything
        out[rows] = plain(query[rows], sides[0], sides[1], length - (rows.stop - rows.start), window).to(query.dtype)
    return out


@torch.inference_mode()
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("heads", [2, 6])
def test_both_kinds_of_attention_give_what_the_textbook_does(heads: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    numbers = torch.Generator().manual_seed(3)
    store = PagedStore(CPU)
    lengths = [(1, 300), (17, 0), (9, 250), (1, 0)]
    sequences = [PagedKV(store) for _ in lengths]
    stored = [torch.randn(position + count, 4, 16, generator=numbers) for count, position in lengths]  # 2 keys, 2 values
    for kv, whole, (_, position) in zip(sequences, stored, lengths):
        if position:
            kv.restore([{0: whole[:position].view(position, 2, 2, 16).permute(1, 2, 0, 3)}])
    for kv, whole in zip(sequences, stored):
        kv.expect(len(whole))
    row, parts = 0, []
    for kv, (count, position) in zip(sequences, lengths):
        parts.append(PagedSegment(row, count, position, kv.pages))
        row += count
    plan = plan_step(parts, (), (), 32, 0)
    q = torch.randn(32, heads, 16, generator=numbers)
    kv_rows = torch.cat([*(whole[position:] for whole, (_, position) in zip(stored, lengths)), torch.zeros(4, 4, 16)])
    for attention in (tiled, flash):
        step = PagedStep.of(store, plan, torch.tensor(plan.arrays.flat()), attention)
        out = step.attend(0, q, kv_rows, 0.3, window)
        assert step.windows == {window} and out.shape == q.shape
        for part, whole in zip(parts, stored):
            rows = slice(part.row, part.row + part.count)
            expected = plain(q[rows], whole[:, :2], whole[:, 2:], part.position, window)
            torch.testing.assert_close(out[rows].double(), expected, rtol=1e-5, atol=1e-5)


def test_flash_attention_refuses_what_it_does_not_know() -> None:
    anything: Any = None
    for softcap, sinks in ((30.0, None), (None, torch.ones(2))):
        with pytest.raises(ValueError, match="neither soft-capped scores nor sinks"):
            flash(anything, anything, anything, anything, 1.0, 0, softcap, sinks)


# ---- pages


@given(st.lists(st.one_of(st.integers(1, 3000), st.none()), max_size=30))
def test_no_page_has_two_owners_and_all_come_back(asked: list[int | None]) -> None:
    store, held = PagedStore(CPU), []
    for end in asked:
        if end is not None:
            held.append(PagedKV(store))
            held[-1].expect(end // 2)
            held[-1].expect(end)
            assert len(held[-1].pages) == pages_for(end)
        elif held:
            del held[0]
        owned = [page for kv in held for page in kv.pages]
        assert len(set(owned)) == len(owned) and 0 not in owned
        assert sorted([*owned, *store._free]) == list(range(1, store._capacity))


# ---- staging and recorded steps


class CountingFence:
    """Stands for a GPU that is behind: notes what was waited for while it was not yet passed."""

    made: ClassVar[list[CountingFence]] = []

    def __init__(self) -> None:
        self.marked = 0
        self.waited: list[int] = []
        self.made.append(self)

    def mark(self) -> None:
        self.marked += 1

    def wait(self) -> None:
        self.waited.append(self.marked)


def test_a_buffer_is_filled_again_only_behind_the_copy_out_of_it() -> None:
    CountingFence.made = []
    staging = Staging(CPU, CountingFence)
    sent = [torch.arange(number + 1, dtype=torch.int64) for number in range(3 * BUFFERS)]
    arrived = [staging.to_device(each) for each in sent]
    assert all(torch.equal(one, other) and one is not other for one, other in zip(sent, arrived))
    assert [fence.waited for fence in CountingFence.made] == [[0, 1, 2]] * BUFFERS, "waited for before each use, marked behind it"
    room = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert staging.to_device(torch.ones(2, 3, dtype=torch.bfloat16), room) is room and room.all()
    kept = staging.to_host(room)
    room.zero_()
    assert kept.all()


def test_a_recorded_step_reads_what_it_is_given_each_time() -> None:
    steps = RecordedSteps(no_recording, Staging(CPU))

    def run(value: int, form: str = "a", generation: int = 0) -> Any:
        compute = lambda flat, taken: flat * 10 + taken  # noqa: E731
        return steps.run(form, generation, torch.tensor([value]), torch.tensor([value]), compute)

    assert [int(run(value)) for value in (1, 2, 3)] == [11, 22, 33] and len(steps) == 1
    for number in range(2 * MAX_RECORDINGS):
        assert int(run(number, f"form {number}")) == 11 * number
    assert len(steps) == MAX_RECORDINGS
    assert int(run(5, generation=1)) == 55 and len(steps) == 1, "the addresses have changed"


def test_what_cannot_be_recorded_is_tried_once() -> None:
    tried = []

    def refuse(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        tried.append(run)
        raise RuntimeError("operation not permitted when stream is capturing")

    steps = RecordedSteps(refuse, Staging(CPU))
    assert steps.run("a", 0, torch.tensor([1]), None, lambda flat, taken: flat) is None
    assert not steps.works and len(tried) == 1


# ---- devices


@pytest.mark.parametrize("wanted", ["gpu", "cuda:", "cuda:x", "cuda:123", "CPU", ""])
def test_a_device_of_another_form_is_refused(wanted: str) -> None:
    with pytest.raises(BadRequest, match="expected auto, cpu, cuda or cuda:N"):
        device.select(wanted)


def test_auto_is_the_cpu_for_as_long_as_the_gpu_path_was_not_run() -> None:
    assert device.select("auto") == device.select("cpu") == CPU


def test_a_gpu_that_is_not_there_is_refused_in_plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BadRequest, match="is built for CPUs alone; install a CUDA build"):
        device.select("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadRequest, match="--device cuda:1: no GPU is visible here; take --device cpu"):
        device.select("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert device.select("cuda") == torch.device("cuda", 0)
    with pytest.raises(BadRequest, match="only 1 GPUs are"):
        device.select("cuda:1")


@pytest.mark.parametrize(
    ("wanted", "stored", "names"),
    [
        ("auto", torch.bfloat16, ["cuda-bf16", "cuda-bf16-tiled"]),
        ("auto", torch.float16, ["cuda-fp32"]),
        ("float32", torch.bfloat16, ["cuda-fp32"]),
        ("bfloat16", torch.float32, ["cuda-bf16", "cuda-bf16-tiled"]),
        ("cuda-bf16-tiled", torch.float32, ["cuda-bf16-tiled"]),
    ],
)
def test_kernels_of_a_gpu_round_nothing_unasked(wanted: str, stored: torch.dtype, names: list[str]) -> None:
    assert [kernel.name for kernel in machine.gpu_candidates(wanted, stored)] == names


def test_kernels_of_another_device_are_refused() -> None:
    with pytest.raises(ValueError, match="it needs --device cuda"):
        machine.candidates("cuda-fp32", torch.float32)
    with pytest.raises(ValueError, match="one of cuda-bf16"):
        machine.gpu_candidates("onednn-fp32", torch.float32)


def test_the_fingerprint_names_the_kind_of_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "name", lambda on: f"card {on.index}")
    kernel = KERNELS["cuda-fp32"]
    prints = {machine.fingerprint("w", kernel, 1, 1, torch.device("cuda", number)) for number in (0, 1)}
    assert len({*prints, machine.fingerprint("w", kernel, 1)}) == 3


@needs_gpu
def test_a_gpu_is_named_by_what_its_arithmetic_depends_on() -> None:
    assert "sm" in device.name(device.select("cuda"))
    assert 0 < device.kv_bytes(device.select("cuda"), None, 1) < 1 << 50
