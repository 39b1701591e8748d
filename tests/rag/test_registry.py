from __future__ import annotations

from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.errors import BadRequest
from mesh.ids import NodeId
from rag.registry import FILES, MAX_STORES, Registry, StoreEntry, check_name, joined, store_id

NAME = "pages"


def entry(hlc: int, died: int = 0, node: str = "a", name: str = NAME) -> StoreEntry:
    return StoreEntry(store_id(name), name, hlc, "embedder", hlc, NodeId(node), died)


ENTRIES = st.builds(entry, st.integers(1, 9), st.integers(0, 9), st.sampled_from("abc"))


@given(ENTRIES, ENTRIES, ENTRIES)
def test_joining_entries_is_commutative_associative_and_idempotent(one: StoreEntry, two: StoreEntry, three: StoreEntry) -> None:
    assert joined(one, two) == joined(two, one)
    assert joined(joined(one, two), three) == joined(one, joined(two, three))
    assert joined(one, one) == one


@given(st.lists(ENTRIES, min_size=1))
def test_a_store_lives_while_it_was_made_after_it_was_last_deleted(history: list[StoreEntry]) -> None:
    last = reduce(joined, history)
    assert last.live == (max(one.hlc for one in history) > max(one.died for one in history))


def test_two_nodes_that_make_one_store_at_once_have_one_store_and_lose_nothing() -> None:
    registry = Registry([entry(3, node="a"), entry(7, node="b")])
    assert [held.died for held in registry.live()] == [0]  # so documents of either side count


def test_a_store_is_found_by_name_and_by_id() -> None:
    registry = Registry([entry(1)])
    assert registry.find(NAME) is registry.find(store_id(NAME))


def test_a_deleted_store_is_not_found_and_a_store_made_anew_is() -> None:
    registry = Registry([entry(1)])
    assert registry.merge(entry(1, died=2))
    with pytest.raises(BadRequest) as missing:
        registry.find(NAME)
    assert missing.value.status == 404
    assert registry.merge(entry(3))
    assert registry.find(NAME).died == 2


def test_an_entry_whose_id_is_not_its_names_is_not_taken() -> None:
    registry = Registry()
    assert not registry.merge(StoreEntry("vs_other", NAME, 1, "e", 1, NodeId("a")))
    assert not registry.merge(FILES)
    assert registry.entries() == []


def test_the_registry_is_bounded() -> None:
    registry = Registry(entry(1, name=f"store {number}") for number in range(MAX_STORES + 5))
    assert len(registry.entries()) == MAX_STORES


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 201, "\x1b[31m"])
def test_names_that_cannot_be_shown_are_refused(name: str) -> None:
    with pytest.raises(BadRequest):
        check_name(name)
