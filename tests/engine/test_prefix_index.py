"""The page index: which pages are found and which are evicted first; blocks are counted right after any operations."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.engine.kv.blocks import BlockPool
from node.engine.kv.prefix_index import PAGES_PER_BLOCK, PageIndex, PageName

pytestmark = pytest.mark.no_kernel


def named(*prefixes: int) -> list[PageName]:
    return [PageName(0, 4, "n", bytes([prefix])) for prefix in prefixes]


def filled(blocks: int, *prefixes: int) -> tuple[BlockPool, PageIndex]:
    pool = BlockPool(blocks)
    index = PageIndex(pool)
    for name in named(*prefixes):
        assert index.add(name) is not None
    return pool, index


def test_a_run_of_pages_is_found_up_to_the_first_that_is_missing() -> None:
    _, index = filled(1, 1, 2, 4)
    assert index.find(named(1, 2, 3, 4)) == [0, 1]
    assert index.find(named(3)) == [] == index.find([])
    assert index.add(named(2)[0]) is None


def test_the_same_tokens_in_other_layers_or_by_other_kernels_are_other_pages() -> None:
    _, index = filled(1, 1)
    assert not index.find([PageName(0, 3, "n", b"\1")]) and not index.find([PageName(0, 4, "m", b"\1")])


def test_the_least_recently_used_page_is_dropped_and_runs_end_first() -> None:
    _, index = filled(1, *range(PAGES_PER_BLOCK))
    index.find(named(0, 1))
    for new in range(PAGES_PER_BLOCK - 2):
        assert index.add(named(100 + new)[0]) is not None
    assert index.find(named(0, 1)) == [0, 1] and not index.find(named(2))
    for new in range(PAGES_PER_BLOCK - 1):
        index.add(named(200 + new)[0])
    assert index.find(named(0, 1)) == [0]


def test_a_sequence_takes_the_block_of_unpinned_pages() -> None:
    pool, index = filled(2, *range(PAGES_PER_BLOCK + 1))
    assert pool.free == 0 and index.blocks == 2
    assert index.take(1) == [1] and index.blocks == 1 and len(index) == PAGES_PER_BLOCK
    assert index.take_dropped() == (0,) and index.take_dropped() == ()


def test_pinned_pages_are_not_evicted() -> None:
    _, index = filled(1, *range(PAGES_PER_BLOCK))
    index.pin([3])
    assert index.take(1) is None and len(index) == PAGES_PER_BLOCK, "no page is evicted if the block cannot be freed"
    index.unpin([3])
    assert index.take(1) is not None and len(index) == 0


def test_without_room_for_another_page_none_is_added() -> None:
    pool, index = filled(1)
    taken = pool.take(1)
    assert taken is not None and index.add(named(1)[0]) is None
    pool.release(taken)
    assert index.add(named(1)[0]) == 0


def test_pages_release_blocks_to_a_pool_that_was_made_smaller() -> None:
    pool, index = filled(3, *range(3 * PAGES_PER_BLOCK))
    pool.resize(1)
    index.apply_limits()
    assert pool.used == 1 and len(index) == PAGES_PER_BLOCK


def test_an_evicted_page_is_spilled_and_found_as_before() -> None:
    pool, index = filled(1, *range(PAGES_PER_BLOCK))
    index.apply_limits(max_spilled=2)
    index.find(named(5))
    assert index.add(named(100)[0]) == PAGES_PER_BLOCK and index.take_spilled() == (0,) and index.take_dropped() == ()
    assert index.find(named(0)) == [0] and index.add(named(0)[0]) is None, "the page is kept"
    assert index.take(1) is not None and pool.free == 0, "a spilled page holds no block"
    assert index.spilled == 2 == len(index) and set(index.take_dropped()) == {*range(PAGES_PER_BLOCK + 1)} - {5, PAGES_PER_BLOCK}


def test_the_least_recently_used_spilled_page_without_readers_is_dropped() -> None:
    _, index = filled(1, *range(PAGES_PER_BLOCK))
    index.apply_limits(max_spilled=3)
    for new in range(3):
        index.add(named(100 + new)[0])
    index.pin(index.find(named(1)))
    index.find(named(0))
    index.add(named(103)[0])
    assert index.take_dropped() == (2,) and index.find(named(0)) == [0]
    index.apply_limits(max_spilled=0)
    assert index.spilled == 1 and index.find(named(1)) == [1], "pinned"
    index.unpin([1])
    index.apply_limits()
    assert index.spilled == 0 and not index.find(named(1))


ACTS = st.lists(
    st.tuples(st.sampled_from(["add", "find", "pin", "unpin", "take", "give", "drop", "resize", "spill"]), st.integers(0, 60))
)


@settings(max_examples=200)
@given(ACTS, st.integers(1, 4), st.sampled_from([0, 1, 7, 30]))
def test_blocks_are_those_of_pages_and_sequences_after_any_operations(
    acts: list[tuple[str, int]], total: int, max_spilled: int
) -> None:
    pool = BlockPool(total)
    index = PageIndex(pool, max_spilled=max_spilled)
    held: list[int] = []
    resident: set[int] = set()  # resident pages, as a worker would see them
    spilled: set[int] = set()
    pinned: list[int] = []
    for act, number in acts:
        match act:
            case "add":
                for prefix in range(number):
                    added = index.add(named(prefix)[0])
                    resident |= set() if added is None else {added}
            case "find":
                index.find(named(*range(number)))
            case "pin":
                found = index.find(named(number))
                index.pin(found)
                pinned += found
            case "unpin" if pinned:
                index.unpin([pinned.pop()])
            case "take":
                held += index.take(number % 3) or []
            case "give" if held:
                pool.release([held.pop()])
            case "drop" if number not in pinned:
                index.drop(number)
            case "resize":
                pool.resize(1 + number % 4)
                index.apply_limits()
            case "spill":
                max_spilled = number % 10
                index.apply_limits(max_spilled)
        gone, going = set(index.take_dropped()), set(index.take_spilled())
        assert going <= resident and not gone & set(pinned), "a pinned page is not dropped"
        resident, spilled = resident - gone - going, (spilled | going) - gone
        assert index.spilled == len(spilled) and len(index) == len(resident | spilled) and not resident & spilled
        assert len(spilled) <= max(max_spilled, len(set(pinned) & spilled))
        count = len(resident)
        assert pool.used == len(held) + index.blocks
        assert (index.blocks - 1) * PAGES_PER_BLOCK < count <= index.blocks * PAGES_PER_BLOCK or count == index.blocks == 0
        assert index.readers == len(pinned)
    index.unpin(pinned)
    pool.release(held)
    pool.resize(total)
    assert index.take(total) is not None and len(index) == index.spilled, "all blocks of pages can be freed"
