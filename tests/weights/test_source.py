"""Handing weights over: bounded in pace, in number, and in what is said to whom."""

from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from mesh.errors import BadRequest, Refused, RemoteError
from mesh.ids import NodeId
from mesh.manifest import MANIFEST_KIND, NOT_HELD, PIECE_KIND
from mesh.wire.calls import Header
from node.weights import source as module
from node.weights.catalogue import Catalogue
from node.weights.pace import BURST_S, RateLimit
from node.weights.source import WeightsSource
from tests.weights.models import whole_catalogue, write_model

PEER = NodeId("peer")


@pytest.fixture
def whole(tmp_path: Path) -> Catalogue:
    return whole_catalogue(write_model(tmp_path / "model"), tmp_path / "kept")


@given(st.lists(st.tuples(st.integers(1, 1 << 20), st.floats(0, 2)), min_size=1, max_size=50))
def test_no_more_leaves_in_any_time_than_the_rate_and_one_burst(asks: list[tuple[int, float]]) -> None:
    pace, now, sent, began = RateLimit(), 100.0, 0, 100.0
    for size_bytes, pause_s in asks:
        now += pause_s
        leaves_at = now + pace.wait_s(size_bytes, 1e6, now)
        sent += size_bytes
        assert sent <= 1e6 * (leaves_at - began + BURST_S) + 1


def test_after_a_rest_the_pace_is_not_made_up_for_without_bound() -> None:
    pace = RateLimit()
    assert pace.wait_s(1_000_000, 1e6, 1000.0) == pytest.approx(1.0 - BURST_S)


@pytest.mark.parametrize(
    ("serving", "told", "seconds"), [(True, None, 2.0), (False, None, 0.5), (True, 8, 0.25), (False, 1, 2.0)]
)
async def test_the_pace_is_what_was_told_or_what_serving_leaves(
    whole: Catalogue, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, serving: bool, told: int | None, seconds: float
) -> None:
    """In manifests a second."""
    size_bytes = len(whole.encoded)
    monkeypatch.setattr(module, "SERVING_BYTES_S", size_bytes)
    monkeypatch.setattr(module, "IDLE_BYTES_S", 4 * size_bytes)
    source = WeightsSource(lambda: serving, rate_bytes_s=told * size_bytes if told else None)
    source.add(whole)
    await trio.sleep(10)
    began = trio.current_time()
    for _ in range(2):
        await source._on_manifest(PEER, {"manifest": whole.id, "offset": 0}, b"")
    assert trio.current_time() - began == pytest.approx(max(0.0, seconds - BURST_S))


@pytest.mark.parametrize(
    ("kind", "header", "error"),
    [
        (PIECE_KIND, {}, BadRequest),
        (PIECE_KIND, {"manifest": 7, "name": "config.json", "number": 0}, BadRequest),
        (PIECE_KIND, {"manifest": "x" * 64, "name": "config.json", "number": 0}, BadRequest),
        (PIECE_KIND, {"name": "config.json"}, RemoteError),
        (PIECE_KIND, {"name": ["config.json"], "number": 0}, RemoteError),
        (PIECE_KIND, {"name": "config.json", "number": True}, RemoteError),
        (PIECE_KIND, {"name": "../../../etc/passwd", "number": 0}, BadRequest),
        (PIECE_KIND, {"name": "modeling_evil.py", "number": 0}, BadRequest),
        (PIECE_KIND, {"name": "config.json", "number": 1}, BadRequest),
        (PIECE_KIND, {"name": "config.json", "number": -1}, BadRequest),
        (MANIFEST_KIND, {"offset": -1}, RemoteError),
        (MANIFEST_KIND, {"offset": 1 << 40}, RemoteError),
        (MANIFEST_KIND, {"offset": "0"}, RemoteError),
    ],
)
async def test_what_is_not_offered_is_not_given(whole: Catalogue, kind: str, header: Header, error: type[Exception]) -> None:
    source = WeightsSource(lambda: False)
    source.add(whole)
    asked = {"manifest": whole.id, **header} if header else header
    with pytest.raises(error) as refused:
        await source.handlers[kind](PEER, asked, b"")
    if isinstance(refused.value, BadRequest):
        assert refused.value.code == NOT_HELD


async def test_with_too_many_waiting_it_refuses_and_goes_on_afterwards(whole: Catalogue, autojump_clock: MockClock) -> None:
    source = WeightsSource(lambda: False, rate_bytes_s=1 << 10)
    source.add(whole)
    refused = 0

    async def ask() -> None:
        nonlocal refused
        try:
            await source._on_piece(PEER, {"manifest": whole.id, "name": "model.embed_tokens.weight", "number": 0}, b"")
        except Refused:
            refused += 1

    async with trio.open_nursery() as nursery:
        for _ in range(module.MAX_WAITING + 5):
            nursery.start_soon(ask)
    assert refused == source.statistics().refused_total == 5
    assert source.statistics().pieces_sent_total == module.MAX_WAITING
    await ask()
    assert refused == 5


async def test_a_model_that_was_withdrawn_is_given_no_more(whole: Catalogue) -> None:
    source = WeightsSource(lambda: False)
    source.add(whole)
    source.remove(whole.id)
    with pytest.raises(BadRequest, match="not here"):
        await source._on_manifest(PEER, {"manifest": whole.id, "offset": 0}, b"")
