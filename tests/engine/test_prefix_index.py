"""The index of kept pages: what is found, what goes first, and that its blocks are counted right whatever happens."""

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


def test_a_full_index_drops_what_was_wanted_longest_ago_and_the_end_of_a_run_before_its_beginning() -> None:
    _, index = filled(1, *range(PAGES_PER_BLOCK))
    index.find(named(0, 1))
    for new in range(PAGES_PER_BLOCK - 2):
        assert index.add(named(100 + new)[0]) is not None
    assert index.find(named(0, 1)) == [0, 1] and not index.find(named(2))
    for new in range(PAGES_PER_BLOCK - 1):
        index.add(named(200 + new)[0])
    assert index.find(named(0, 1)) == [0]


def test_a_sequence_that_wants_a_block_gets_that_of_unread_pages() -> None:
    pool, index = filled(2, *range(PAGES_PER_BLOCK + 1))
    assert pool.free == 0 and index.blocks == 2
    assert index.take(1) == [1] and index.blocks == 1 and len(index) == PAGES_PER_BLOCK
    assert index.dropped() == (0,) and index.dropped() == ()


def test_pages_that_somebody_is_about_to_read_stay() -> None:
    _, index = filled(1, *range(PAGES_PER_BLOCK))
    index.pin([3])
    assert index.take(1) is None and len(index) == PAGES_PER_BLOCK, "nothing goes for a block that cannot be had"
    index.unpin([3])
    assert index.take(1) is not None and len(index) == 0


def test_without_room_for_one_more_page_nothing_is_kept() -> None:
    pool, index = filled(1)
    taken = pool.take(1)
    assert taken is not None and index.add(named(1)[0]) is None
    pool.release(taken)
    assert index.add(named(1)[0]) == 0


def test_a_pool_that_shrinks_is_given_blocks_back() -> None:
    pool, index = filled(3, *range(3 * PAGES_PER_BLOCK))
    pool.resize(1)
    index.fit()
    assert pool.used == 1 and len(index) == PAGES_PER_BLOCK


def test_a_page_that_must_go_is_spilled_and_found_as_before() -> None:
    pool, index = filled(1, *range(PAGES_PER_BLOCK))
    index.fit(spill_room=2)
    index.find(named(5))
    assert index.add(named(100)[0]) == PAGES_PER_BLOCK and index.spilling() == (0,) and index.dropped() == ()
    assert index.find(named(0)) == [0] and index.add(named(0)[0]) is None, "it is kept"
    assert index.take(1) is not None and pool.free == 0, "what is spilled holds no block"
    assert index.spilled == 2 == len(index) and set(index.dropped()) == {*range(PAGES_PER_BLOCK + 1)} - {5, PAGES_PER_BLOCK}


def test_a_spilled_page_goes_for_good_when_it_was_spilled_or_wanted_longest_ago_and_nobody_reads_it() -> None:
    _, index = filled(1, *range(PAGES_PER_BLOCK))
    index.fit(spill_room=3)
    for new in range(3):
        index.add(named(100 + new)[0])
    index.pin(index.find(named(1)))
    index.find(named(0))
    index.add(named(103)[0])
    assert index.dropped() == (2,) and index.find(named(0)) == [0]
    index.fit(spill_room=0)
    assert index.spilled == 1 and index.find(named(1)) == [1], "pinned"
    index.unpin([1])
    index.fit()
    assert index.spilled == 0 and not index.find(named(1))


ACTS = st.lists(
    st.tuples(st.sampled_from(["add", "find", "pin", "unpin", "take", "give", "drop", "resize", "spill"]), st.integers(0, 60))
)


@settings(max_examples=200)
@given(ACTS, st.integers(1, 4), st.sampled_from([0, 1, 7, 30]))
def test_blocks_are_those_of_pages_and_sequences_whatever_happens(
    acts: list[tuple[str, int]], total: int, spill_room: int
) -> None:
    pool = BlockPool(total)
    index = PageIndex(pool, spill_room=spill_room)
    held: list[int] = []
    here: set[int] = set()  # whose content is at hand, as a worker would see it
    away: set[int] = set()
    pinned: list[int] = []
    for act, number in acts:
        match act:
            case "add":
                for prefix in range(number):
                    added = index.add(named(prefix)[0])
                    here |= set() if added is None else {added}
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
                index.fit()
            case "spill":
                spill_room = number % 10
                index.fit(spill_room)
        gone, going = set(index.dropped()), set(index.spilling())
        assert going <= here and not gone & set(pinned), "what somebody reads is not dropped"
        here, away = here - gone - going, (away | going) - gone
        assert index.spilled == len(away) and len(index) == len(here | away) and not here & away
        assert len(away) <= max(spill_room, len(set(pinned) & away))
        resident = len(here)
        assert pool.used == len(held) + index.blocks
        assert (index.blocks - 1) * PAGES_PER_BLOCK < resident <= index.blocks * PAGES_PER_BLOCK or resident == index.blocks == 0
        assert index.readers == len(pinned)
    index.unpin(pinned)
    pool.release(held)
    pool.resize(total)
    assert index.take(total) is not None and len(index) == index.spilled, "whatever is only kept can be had back"
