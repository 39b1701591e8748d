"""Spilled pages: an answer that begins with them equals the cold one bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesh.view import Span
from node.engine.api import TokenOut
from node.engine.kv.blocks import BLOCK_TOKENS
from tests.engine.test_prefix_cache import SplitPath, ask, bits, numbers
from tests.engine.test_worker import MODEL, running, wait_until

TOKEN_BYTES = 4 * 2 * 2 * 16 * 4  # of the toy models' keys and values, float32
TWO_BLOCKS = 2 * BLOCK_TOKENS * TOKEN_BYTES
PLENTY = 64 << 20


def fill_memory(path: SplitPath, seeds: range, length: int = 400) -> dict[int, list[TokenOut]]:
    """Answers one prompt after another, so that the pages of the first are spilled; returns the answers by seed."""
    return {seed: path.answer(f"cold{seed}", numbers(seed, length)) for seed in seeds}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("memory", "disk"), [(PLENTY, 0), (0, PLENTY), (5 * 32 * TOKEN_BYTES, PLENTY)])
def test_an_answer_from_spilled_pages_equals_the_cold_one_bit_by_bit(
    dtype: str, memory: int, disk: int, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    given: dict[str, Any] = {"spill_memory_bytes": memory, "spill_disk_bytes": disk, "spill_folder": tmp_path / "spill"}
    kv_bytes = TWO_BLOCKS // (1 if dtype == "float32" else 2)
    with running((checkpoint_of("llama"), 0, 4), kv_memory_bytes=kv_bytes, dtype=dtype, **given) as one:
        path = SplitPath((one, 0, 4))
        cold = fill_memory(path, range(4))
        wait_until(lambda: one.engine.statistics().scheduler.spilled_pages > 30)
        assert bool(list((tmp_path / "spill").glob("*"))) == (disk > 0)
        for seed, answer in cold.items():
            warm = path.answer(f"warm{seed}", numbers(seed, 400))
            assert warm[0].cached == 384 and bits(warm) == bits(answer)
        now = one.engine.statistics()
        assert now.spill.read_total > 12 and now.spill.damaged_total == now.spill.refused_total == now.scheduler.preempted == 0
        assert one.engine.load_report().kv_blocks_used == 0, "spilled pages hold no blocks"
        one.engine.unload(Span(MODEL, 0, 4))
        wait_until(lambda: one.engine.statistics().spill.disk_bytes + one.engine.statistics().spill.memory_bytes == 0)
    assert not (tmp_path / "spill").exists()


def damage(folder: Path) -> None:
    for file in folder.iterdir():
        file.write_bytes(b"\0" * file.stat().st_size)


def test_damaged_pages_are_computed_again_with_the_same_answer(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "spill"
    with running((checkpoint_of("llama"), 0, 4), kv_memory_bytes=TWO_BLOCKS, spill_disk_bytes=PLENTY, spill_folder=folder) as one:
        path = SplitPath((one, 0, 4))
        cold = fill_memory(path, range(4))
        damage(folder)
        again = path.answer("again", numbers(0, 400))
        assert bits(again) == bits(cold[0])
        now = one.engine.statistics()
        assert now.spill.damaged_total == 12 and now.scheduler.preempted == 1 and now.step_failures == 0
        assert again[0].cached == now.scheduler.cached_tokens == 0, "the answer does not count as cached"
        assert one.engine.load_report().kv_blocks_used == 0
        third = path.answer("third", numbers(0, 400))
        assert third[0].cached == 384 and bits(third) == bits(cold[0]), "the pages are kept again"


def test_a_damaged_page_on_a_split_path_loses_the_attempt(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder, directory = tmp_path / "spill", checkpoint_of("llama")
    given: dict[str, Any] = {"kv_memory_bytes": TWO_BLOCKS // 2, "spill_disk_bytes": PLENTY, "spill_folder": folder}
    with running((directory, 0, 2)) as first, running((directory, 2, 4), **given) as last:
        path = SplitPath((first, 0, 2), (last, 2, 4))
        cold = fill_memory(path, range(4))
        damage(folder)
        with pytest.raises(AssertionError, match=r"a page it counted on was not kept.*retryable=True"):
            path.answer("again", numbers(0, 400))
        first.engine.close(ask("again", numbers(0, 400)).key)
        assert last.engine.statistics().spill.damaged_total > 1, "all damaged pages are found at once"
        answer = path.answer("attempt 2", numbers(0, 400))
        assert answer[0].cached == 0 and bits(answer) == bits(cold[0])


def test_pages_that_cannot_be_written_are_dropped_without_an_error(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "spill"
    with running((checkpoint_of("llama"), 0, 4), kv_memory_bytes=TWO_BLOCKS, spill_disk_bytes=PLENTY, spill_folder=folder) as one:
        folder.rmdir()
        path = SplitPath((one, 0, 4))
        cold = fill_memory(path, range(4))
        wait_until(lambda: one.engine.statistics().scheduler.spilled_pages == 0)
        assert bits(path.answer("again", numbers(0, 400))) == bits(cold[0])
        assert one.engine.statistics().spill.refused_total > 0 == one.engine.statistics().spill.damaged_total


def test_a_full_spill_drops_the_least_recently_used_pages_first(checkpoint_of: Callable[[str], Path]) -> None:
    room = 16 * 32 * TOKEN_BYTES
    with running((checkpoint_of("llama"), 0, 4), kv_memory_bytes=TWO_BLOCKS, spill_memory_bytes=room) as one:
        path = SplitPath((one, 0, 4))
        cold = fill_memory(path, range(5))
        now = one.engine.statistics()
        assert now.scheduler.spilled_pages == 16 and now.spill.memory_bytes == room and now.spill.refused_total == 0
        late = path.answer("late", numbers(2, 400))
        assert 0 < late[0].cached < 384 and bits(late) == bits(cold[2]), "the last pages of a prompt are dropped before the first"
        assert path.answer("early", numbers(0, 400))[0].cached == 0
        assert bits(path.answer("again", numbers(3, 400))) == bits(cold[3])


def test_without_spill_memory_configured_nothing_is_spilled(checkpoint_of: Callable[[str], Path]) -> None:
    with running((checkpoint_of("llama"), 0, 4), kv_memory_bytes=TWO_BLOCKS) as one:
        fill_memory(SplitPath((one, 0, 4)), range(3))
        assert one.engine.statistics().scheduler.spilled_pages == one.engine.statistics().spill.put_total == 0
