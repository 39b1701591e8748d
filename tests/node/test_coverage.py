"""The coverage watch: the changes that it reports, and how metrics and status show coverage."""

from __future__ import annotations

import trio
from msgspec import to_builtins

from mesh.ids import ModelId, NodeId
from mesh.view import Facts, ModelCard, Peer, PeerState, Span, View
from node.http.metrics import render
from node.ops.status import status
from node.serving.coverage import CoverageWatch
from routing.coverage import CoverageChanged

MODEL = ModelId("m")


def peer(name: str, start: int, end: int, state: PeerState = PeerState.ALIVE) -> Peer:
    facts = Facts(spans=(Span(MODEL, start, end),), models=(ModelCard(MODEL, 4, 64, "w", "n"),))
    return Peer(NodeId(name), name, ("h", 1), state=state, facts=facts)


def view(*peers: Peer, version: int = 1) -> View:
    return View(NodeId("a"), {each.id: each for each in peers}, version)


async def no_view(version: int) -> View:
    raise AssertionError("this test waits for no view")


def test_each_change_is_reported_once_after_it_can_be_read() -> None:
    watch = CoverageWatch(no_view)
    changes: list[tuple[CoverageChanged, int]] = []
    watch.on_change = lambda change: changes.append((change, watch.now[MODEL].least_ready))
    both = view(peer("a", 0, 4), peer("b", 0, 4))
    for shown in (both, both, view(peer("a", 0, 4), peer("b", 0, 4, PeerState.SUSPECT)), view(peer("a", 0, 4))):
        watch.update(shown)
    assert changes == [(CoverageChanged(MODEL, 0, 2, ((0, 4),)), 2), (CoverageChanged(MODEL, 2, 1, ((0, 4),)), 1)]


async def test_coverage_follows_every_new_view(autojump_clock: trio.abc.Clock) -> None:
    views = iter([view(peer("a", 0, 4), version=7), view(peer("a", 0, 2), version=8)])
    asked: list[int] = []

    async def changed(version: int) -> View:
        asked.append(version)
        if (found := next(views, None)) is None:
            await trio.sleep_forever()
        assert found is not None
        return found

    watch = CoverageWatch(changed)
    with trio.move_on_after(1):
        await watch.run()
    assert asked == [-1, 7, 8] and watch.now[MODEL].least_live == 0


def test_metrics_and_status_show_coverage() -> None:
    watch = CoverageWatch(no_view)
    shown = view(peer("a", 0, 4), peer("b", 2, 4), peer("c", 0, 4, PeerState.SUSPECT))
    watch.update(shown)
    text = render({"coverage": watch.statistics()}).decode()
    assert 'mesh_coverage_least_live{key="m"} 2.0' in text and 'mesh_coverage_least_ready{key="m"} 1.0' in text
    assert "mesh_coverage_changes_total 1.0" in text
    body = to_builtins(status(shown, [], {MODEL: True}, 0.0, {}))
    assert body["models"][0]["coverage"] == [
        {"start": 0, "end": 2, "live": 2, "ready": 1},
        {"start": 2, "end": 4, "live": 3, "ready": 2},
    ]
    assert body["self"]["frozen"] is False
