"""Readiness apart from liveness."""

from __future__ import annotations

import trio

from mesh.ids import ModelId
from mesh.view import Facts, Load, Readiness, Span
from node.serving.own_facts import OwnFacts
from node.serving.readiness_monitor import CALM_S, ReadinessMonitor, readiness_of

SPAN = Span(ModelId("tiny"), 0, 4)
SERVES = Facts(spans=(SPAN,))
FULL = Load(waiting=3, kv_blocks_used=96, kv_blocks_total=100)


class MonitoredNode:
    def __init__(self, facts: Facts = SERVES) -> None:
        self.published: list[Readiness] = []
        self.overdue_s = 0.0
        self.load = Load()
        self.monitor = ReadinessMonitor(OwnFacts(facts, self._publish), lambda: self.load, lambda: self.overdue_s)

    def _publish(self, facts: Facts) -> None:
        self.published.append(facts.readiness)


def test_the_most_severe_readiness_applies() -> None:
    assert readiness_of(SERVES, Load(), 0.0) is Readiness.WARM
    assert readiness_of(Facts(), Load(), 0.0) is Readiness.WARM, "an entry without layers takes requests"
    assert readiness_of(Facts(intends=(SPAN,)), Load(), 0.0) is Readiness.LOADING
    assert readiness_of(Facts(intends=(SPAN,), spans=(SPAN,)), Load(), 0.0) is Readiness.WARM, "it serves while it loads more"
    assert readiness_of(SERVES, FULL, 0.0) is Readiness.OVERLOADED
    assert readiness_of(SERVES, Load(kv_blocks_used=100, kv_blocks_total=100), 0.0) is Readiness.WARM, (
        "full, but no request waits"
    )
    assert readiness_of(SERVES, Load(waiting=1), 0.0) is Readiness.WARM, "a node without blocks is not full"
    assert readiness_of(SERVES, FULL, 0.1) is Readiness.STALLED
    assert readiness_of(Facts(draining=True), FULL, 0.1) is Readiness.DRAINING


async def test_a_stall_and_its_end_are_published_within_one_check(autojump_clock: trio.abc.Clock) -> None:
    node = MonitoredNode()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.monitor.run)
        await trio.sleep(1)
        assert node.published == [], "a readiness that is published already is not published again"
        node.overdue_s = 0.2
        await trio.sleep(0.3)
        assert node.published == [Readiness.STALLED]
        node.overdue_s = 0.0
        await trio.sleep(0.3)
        nursery.cancel_scope.cancel()
    assert node.published == [Readiness.STALLED, Readiness.WARM]
    assert node.monitor.stalls == 1


def test_an_intermittent_overload_is_published_once() -> None:
    node = MonitoredNode()
    for step in range(20):
        node.load = FULL if step % 2 == 0 else Load()
        node.monitor.check(step * 0.25)
    assert node.published == [Readiness.OVERLOADED]
    node.monitor.check(100.0)
    node.monitor.check(100.0 + CALM_S)
    assert node.published == [Readiness.OVERLOADED, Readiness.WARM]
