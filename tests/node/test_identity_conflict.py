"""Another live process with this node's identity is told to the mesh for a while, or ends this one."""

from __future__ import annotations

import pytest
import trio
from structlog.testing import capture_logs

from mesh.ids import NodeId
from mesh.view import Facts
from mesh.wire.twin import ProcessRun
from node.ops.identity_conflict import TOLD_FOR_S, IdentityInUse, IdentityWatch
from node.serving.own_facts import OwnFacts

ME = NodeId("0123456789abcdef")


def run_of(age_s: float = 3.0) -> ProcessRun:
    return ProcessRun("10.0.0.9", 7946, "copy", age_s)


def test_a_twin_is_told_while_it_was_seen_lately_and_logged_once() -> None:
    now = 0.0
    facts = OwnFacts(Facts(), lambda told: None)
    watch = IdentityWatch(ME, facts, lambda: now)
    with capture_logs() as logs:
        watch.seen(run_of())
        now = 500.0
        watch.seen(run_of(503.0))
    assert [entry["event"] for entry in logs] == ["identity.in_use"] and "--new-identity" in logs[0]["do"]
    assert facts.now.twin == "copy at 10.0.0.9:7946"
    now = 500.0 + TOLD_FOR_S
    watch.sweep()
    assert facts.now.twin
    now += 1.0
    watch.sweep()
    assert facts.now.twin == ""


async def test_a_displaced_process_ends_with_the_place_of_the_other_and_the_way_out() -> None:
    watch = IdentityWatch(ME, OwnFacts(Facts(), lambda told: None))
    said = pytest.RaisesExc(IdentityInUse, match=rf"{ME} lives already: copy at 10.0.0.9:7946, for 3 min.* --new-identity")
    with pytest.RaisesGroup(said):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            watch.displaced(run_of(200.0))
