"""The record of the prompt beginnings that an entry has sent to peers."""

from __future__ import annotations

from mesh.ids import NodeId
from routing.prefixes import PREFIX_KEY_PAGES, PrefixMemory, prefix_key

A, B = NodeId("a"), NodeId("b")
NAMES = [bytes([number]) for number in range(8)]


def test_a_peer_has_what_it_was_sent_up_to_the_common_prefix() -> None:
    memory = PrefixMemory(page_tokens=10)
    memory.sent(NAMES[:3], [A])
    memory.sent(NAMES[:5], [B])
    assert memory.cached_tokens(NAMES) == {A: 30, B: 50}
    assert memory.cached_tokens([*NAMES[:2], b"x", NAMES[2]]) == {A: 20, B: 20}
    assert memory.cached_tokens([b"x"]) == memory.cached_tokens([]) == {}


def test_a_peer_that_died_has_nothing() -> None:
    memory = PrefixMemory(page_tokens=10)
    memory.sent(NAMES[:3], [A, B])
    memory.forget(A)
    assert memory.cached_tokens(NAMES) == {B: 30}


def test_the_record_is_bounded_and_first_pages_are_dropped_last() -> None:
    memory = PrefixMemory(page_tokens=10, remembered=4)
    memory.sent([b"old", b"older"], [B])
    memory.sent(NAMES[:3], [A])
    assert memory.cached_tokens([b"old", b"older"]) == {B: 10}
    memory.sent(NAMES[3:7], [A])
    assert memory.cached_tokens(NAMES) == {}


def test_the_home_follows_from_the_first_pages() -> None:
    assert prefix_key([]) == b""
    assert prefix_key(NAMES[:2]) == NAMES[1]
    assert prefix_key(NAMES) == prefix_key(NAMES[:PREFIX_KEY_PAGES]) == NAMES[PREFIX_KEY_PAGES - 1]
