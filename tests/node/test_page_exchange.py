"""Pages fetched from peers: only while that is cheaper than computing, in bounded time, and checked against their hashes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from mesh.errors import PeerLost, RemoteError
from mesh.ids import Address, ModelId, NodeId, StreamId
from mesh.prefix import PREFIX_PAGE_TOKENS
from mesh.view import Load
from mesh.wire.calls import CallReply, Header
from node.engine.api import OpenSequence, PageRequest, PagesMissing, Prefix
from node.requests import SamplingParams
from node.serving.page_exchange import MAX_WAIT_S, PAGES_KIND, PROBE_PAGES, PageExchange
from node.serving.stages import OpenStage, Stages

PEER: Address = ("127.0.0.1", 7)
PAGE = 1 << 20
NAMES = tuple(bytes([number]) * 16 for number in range(20))
SEQUENCE = OpenSequence(
    StreamId("s"), 0, 1, ModelId("m"), 0, 4, 641, 641, tuple(range(641)), SamplingParams(), Prefix(b"salt", NAMES, "n")
)


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that jumps while nothing happens would not wait for a thread."""

    async def at_once(function: Callable[..., Any], *given: Any, limiter: object = None) -> Any:
        await trio.lowlevel.checkpoint()
        return function(*given)

    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)


@dataclass
class FakePages:
    """A node's pages by name, with no engine behind them."""

    held: dict[bytes, bytes] = field(default_factory=dict)
    room: int = 1000
    refuses: str = ""

    def missing_pages(self, sequence: OpenSequence) -> PagesMissing | None:
        assert sequence.prefix is not None
        kept = next((at for at, name in enumerate(NAMES) if name not in self.held), len(NAMES))
        return PagesMissing(kept, len(NAMES), PAGE, PageRequest(sequence.model, 0, 4, "n", b"layout", NAMES))

    def export_pages(self, ask: PageRequest, max_bytes: int) -> list[bytes]:
        return [self.held[name] for name in ask.names if name in self.held][: max(1, max_bytes // PAGE)]

    def import_pages(self, sequence: OpenSequence, first: int, contents: list[bytes]) -> int:
        if self.refuses:
            raise ValueError(self.refuses)
        taken = contents[: self.room - len(self.held)]
        self.held.update(zip(NAMES[first:], taken, strict=False))
        return len(taken)


@dataclass
class FakeEngine:
    pages: FakePages
    prefill_tok_s: float = 0.0

    def load_report(self) -> Load:
        return Load(prefill_tok_s=self.prefill_tok_s)


CONTENT = {name: bytes([number + 1]) * PAGE for number, name in enumerate(NAMES)}


class TwoNodes:
    """`here` fetches from `there` over a link of `link_bytes_s`; `spoil` alters the answers."""

    def __init__(self, here: FakeEngine, there: FakeEngine, link_bytes_s: float = 100e6) -> None:
        self.there = PageExchange(there, self._no_call)  # type: ignore[arg-type]
        self.here = PageExchange(here, self._call)  # type: ignore[arg-type]
        self.link_bytes_s = link_bytes_s
        self.asked: list[int] = []
        self.spoil: Callable[[Header, bytes], CallReply] = lambda header, tail: (header, tail)

    async def _no_call(self, *given: Any, **named: Any) -> CallReply:
        raise AssertionError("no peer is to be asked")

    async def _call(self, to: Address, kind: str, header: Header, tail: bytes = b"", *, timeout_s: float = 10.0) -> CallReply:
        assert (to, kind) == (PEER, PAGES_KIND)
        self.asked.append(len(msgspec.convert(header["names"], list[object])))
        header = msgspec.msgpack.decode(msgspec.msgpack.encode(header))
        answer, content = await self.there.handlers[kind](NodeId("here"), header, tail)
        await trio.sleep(len(content) / self.link_bytes_s)
        return self.spoil(msgspec.msgpack.decode(msgspec.msgpack.encode(answer)), content)


def two(link_bytes_s: float = 100e6, own: float = 300.0, theirs: float = 300.0, **here: Any) -> tuple[TwoNodes, FakePages]:
    mine = FakePages(**here)
    return TwoNodes(FakeEngine(mine, own), FakeEngine(FakePages(dict(CONTENT)), theirs), link_bytes_s), mine


async def test_all_pages_come_in_batches_where_the_link_is_fast(autojump_clock: MockClock) -> None:
    nodes, mine = two()
    await nodes.here.fetch(SEQUENCE, PEER)
    assert mine.held == CONTENT and nodes.asked == [PROBE_PAGES, 8, 8, 2]
    now = nodes.here.statistics()
    assert (now.fetched_pages_total, now.fetched_bytes_total, nodes.there.statistics().sent_pages_total) == (20, 20 * PAGE, 20)
    assert now.refused_answers_total == now.failed_total == now.not_worth_total == 0


async def test_only_the_probe_is_fetched_where_computing_is_cheaper(autojump_clock: MockClock) -> None:
    nodes, mine = two(link_bytes_s=5e6)
    await nodes.here.fetch(SEQUENCE, PEER)
    assert len(mine.held) == PROBE_PAGES and nodes.asked == [PROBE_PAGES]
    await nodes.here.fetch(SEQUENCE, PEER)
    assert nodes.asked == [PROBE_PAGES] and nodes.here.statistics().not_worth_total == 2
    await trio.sleep(61)
    await nodes.here.fetch(SEQUENCE, PEER)
    assert nodes.asked == [PROBE_PAGES] * 2, "links change"


@pytest.mark.parametrize(("own", "theirs", "pages"), [(0.0, 300.0, 20), (0.0, 0.0, PROBE_PAGES), (1e6, 300.0, PROBE_PAGES)])
async def test_the_peers_prefill_rate_is_used_without_an_own_one(
    own: float, theirs: float, pages: int, autojump_clock: MockClock
) -> None:
    nodes, mine = two(own=own, theirs=theirs)
    await nodes.here.fetch(SEQUENCE, PEER)
    assert len(mine.held) == pages


def flipped(header: Header, tail: bytes) -> CallReply:
    return header, tail[:100] + bytes([tail[100] ^ 1]) + tail[101:]


SPOILT = {
    "a bit flipped": flipped,
    "cut": lambda header, tail: (header, tail[:-1]),
    "longer": lambda header, tail: (header, tail + b"x"),
    "no digests": lambda header, tail: ({}, tail),
    "a digest of another length": lambda header, tail: ({"digests": [b"x"] * 2}, tail),
    "more than were asked for": lambda header, tail: ({"digests": header["digests"] * 2}, tail * 2),
    "a rate that is no rate": lambda header, tail: ({**header, "prefill_tok_s": -1.0}, tail),
}


@pytest.mark.parametrize("kind", SPOILT)
async def test_an_answer_that_does_not_match_its_header_is_refused(kind: str, autojump_clock: MockClock) -> None:
    nodes, mine = two()
    nodes.spoil = SPOILT[kind]
    await nodes.here.fetch(SEQUENCE, PEER)
    assert not mine.held and nodes.asked == [PROBE_PAGES]
    assert nodes.here.statistics().refused_answers_total == 1 and nodes.here.statistics().fetched_pages_total == 0


async def test_pages_that_the_engine_refuses_are_counted(autojump_clock: MockClock) -> None:
    nodes, mine = two(refuses="a page holds what is no number")
    await nodes.here.fetch(SEQUENCE, PEER)
    assert not mine.held and nodes.here.statistics().refused_answers_total == 1


async def test_only_as_many_pages_are_requested_as_there_is_room_for(autojump_clock: MockClock) -> None:
    nodes, mine = two(room=5)
    await nodes.here.fetch(SEQUENCE, PEER)
    assert len(mine.held) == 5 and nodes.asked == [PROBE_PAGES, 8]


async def test_a_peer_that_is_gone_or_silent_costs_a_bounded_time(autojump_clock: MockClock) -> None:
    nodes, mine = two()

    def gone(header: Header, tail: bytes) -> CallReply:
        raise PeerLost("there", "gone")

    nodes.spoil = gone
    await nodes.here.fetch(SEQUENCE, PEER)
    assert nodes.here.statistics().failed_total == 1
    nodes.link_bytes_s = 1.0
    before = trio.current_time()
    await nodes.here.fetch(SEQUENCE, PEER)
    assert trio.current_time() - before == pytest.approx(MAX_WAIT_S) and not mine.held


async def test_an_invalid_request_for_pages_is_a_remote_error() -> None:
    nodes, _ = two()
    for header in ({}, {"names": [b"x"]}, {"names": 3}):
        with pytest.raises(RemoteError, match=PAGES_KIND):
            await nodes.there.handlers[PAGES_KIND](NodeId("here"), header, b"")


class OpenedOnly:
    """An engine that only records the opened sequences."""

    def __init__(self) -> None:
        self.opened: list[StreamId] = []

    def open(self, sequence: OpenSequence) -> int:
        self.opened.append(sequence.stream)
        return 3

    def close(self, key: object) -> None:
        pass


async def test_a_close_during_a_fetch_of_pages_is_applied() -> None:
    engine, order, may_go_on = OpenedOnly(), list[str](), trio.Event()

    async def fetch(sequence: OpenSequence, source: Address) -> None:
        order.append(f"{source[1]} before {len(engine.opened)}")
        await may_go_on.wait()

    stages = Stages(PEER, engine, None, None, fetch_pages=fetch)  # type: ignore[arg-type]
    entry = NodeId("entry")

    async def opened(stream: str, pages_from: Address | None) -> Header:
        sequence = replace(SEQUENCE, stream=StreamId(stream))
        stage = OpenStage(sequence, entry, None, entry, PEER, PEER, None, pages_from)
        header, _ = await stages.handlers["stage.open"](entry, {}, msgspec.msgpack.encode(stage))
        return header

    async with trio.open_nursery() as nursery:

        async def refused() -> None:
            with pytest.raises(RemoteError, match="closed before"):
                await opened("closed", ("h", 9))

        nursery.start_soon(refused)
        await trio.testing.wait_all_tasks_blocked()
        stages.receivers["stage.close"](entry, {"keys": [["closed", 0, 1]]}, b"")
        may_go_on.set()
    assert await opened("a", ("h", 9)) == {"pages": 3} and await opened("b", None) == {"pages": 3}
    assert order == ["9 before 0", "9 before 0"] and engine.opened == ["a", "b"]
    assert PREFIX_PAGE_TOKENS * len(NAMES) < SEQUENCE.known
