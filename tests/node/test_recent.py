"""What is remembered of a request that is over."""

from collections.abc import Sequence
from typing import Any

from mesh.ids import NodeId, StreamId
from node.entry.generation import Generation
from node.entry.recent import REMEMBERED, RecentRequests, RequestRecord


def record(stream: str = "s1", request_id: str = "", *histories: Sequence[Any]) -> RequestRecord:
    generations = {choice: Generation(3, 100.0, history=list(history)) for choice, history in enumerate(histories)}
    return RequestRecord(StreamId(stream), request_id, NodeId("n"), generations=generations)


def test_one_death_is_one_more_attempt_for_any_number_of_choices() -> None:
    assert record("s1", "", (), ()).attempts == 1
    assert record("s1", "", ("a died",), ("a died",)).attempts == 2
    assert record("s1", "", ("a died", "b died"), ("a died",)).attempts == 3
    assert record("s1", "").attempts == 1


def test_a_request_is_found_by_stream_id_or_x_request_id() -> None:
    recent = RecentRequests()
    first, second = record("s1", "mine"), record("s2", "mine")
    recent.add(first)
    recent.add(second)

    assert recent.find("s1") is first
    assert recent.find("mine") is second
    assert recent.find("other") is None


def test_the_oldest_record_is_dropped_with_its_request_id() -> None:
    recent = RecentRequests()
    for number in range(REMEMBERED + 1):
        recent.add(record(f"s{number}", f"r{number}"))

    assert recent.find("s0") is None and recent.find("r0") is None
    assert recent.find("r1") is recent.find("s1") is not None
