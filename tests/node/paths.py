"""A small mesh in one process for tests of paths: real links on loopback, real shells and cores, an engine without a model.

The engine computes nothing: the token at a position is a function of the position, and activations carry their
position, so that a test sees at once whether a path was whole.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from random import Random
from types import MappingProxyType
from typing import Any

import trio

from membership.shell.events import MemberEvent
from mesh.errors import Refused
from mesh.ids import Address, ModelId, NodeId, StreamId
from mesh.links.link import Link, LinkConfig
from mesh.links.links import Links
from mesh.view import Facts, Load, ModelCard, Peer, PeerState, Readiness, Span, View
from node.engine.api import EngineOutput, HiddenOut, OpenSequence, SequenceKey, SequenceLost, TokenOut
from node.entry.entry import Entry, EntryNode
from node.entry.path_queue import PathQueue
from node.entry.planning import Planning
from node.entry.prompts import Prompt
from node.losses import LossHandling
from node.requests import GenerateRequest, SamplingParams
from node.serving.stages import Stages

MODEL = ModelId("counting")
LAYERS = 6
CARD = ModelCard(MODEL, LAYERS, 1000, "w", "n")


def token_at(position: int) -> int:
    return 65 + position % 26


@dataclass
class CountingText:
    vocab_size: int = 256

    def decode(self, tokens: Any) -> str:
        return "".join(map(chr, tokens))


@dataclass
class CountingModel:
    card: ModelCard = CARD
    text: CountingText = field(default_factory=CountingText)


class CountingPrompts:
    """Makes every prompt ten tokens long."""

    async def prepare(self, request: GenerateRequest) -> Prompt:
        await trio.lowlevel.checkpoint()
        sampling = SamplingParams(seed=1, max_tokens=request.max_tokens or 20)
        return Prompt(CountingModel(), tuple(range(10)), sampling, 1)  # type: ignore[arg-type]


class CountingEngine:
    """Computes at once, in the trio thread. `faults`: by position, what to do instead of the step, once."""

    def __init__(self) -> None:
        self.sequences: dict[SequenceKey, OpenSequence] = {}
        self.opened: list[OpenSequence] = []
        self.refuse = 0
        self.places = 100
        self.pages = 0  # cached pages that it reports for any sequence
        self.faults: dict[int, Callable[[SequenceKey], None]] = {}
        self.stages: Stages | None = None
        self.dead = False

    def open(self, sequence: OpenSequence) -> int:
        if self.refuse:
            self.refuse -= 1
            raise Refused("full", 0.05)
        if len(self.sequences) >= self.places:
            raise Refused(f"{self.places} sequences are running")
        self.sequences[sequence.key] = sequence
        self.opened.append(sequence)
        if sequence.start == 0:
            self.compute(sequence, 0, sequence.known)
        return self.pages

    def has_model(self, model: ModelId) -> bool:
        return model == MODEL

    def room(self, model: ModelId) -> int:
        return self.places - len(self.sequences)

    def push(self, *hidden: HiddenOut) -> None:
        for each in hidden:
            if each.key in self.sequences:
                position, count = each.position, each.count
                assert each.data == bytes([position % 256]) * count, "activations of other positions"
                self.compute(self.sequences[each.key], position, count)

    def token(self, *drawn: TokenOut) -> None:
        for each in drawn:
            if each.key in self.sequences:
                self.compute(self.sequences[each.key], each.position, 1)

    def compute(self, sequence: OpenSequence, position: int, count: int) -> None:
        drawn = position + count
        fault = self.faults.pop(drawn, None)
        if fault is not None:
            fault(sequence.key)
            return
        if sequence.end < LAYERS:
            self.deliver(HiddenOut(sequence.key, position, count, bytes([position % 256]) * count))
            return
        last = drawn == sequence.prompt_tokens + sequence.sampling.max_tokens - 1
        out = TokenOut(sequence.key, drawn, token_at(drawn), "length" if last else None, cached=max(0, self.pages))
        self.deliver(out)
        if sequence.start == 0 and not last:
            trio.lowlevel.current_trio_token().run_sync_soon(self.token, out)

    def lose(self, key: SequenceKey, reason: str = "evicted", retryable: bool = True, by_previous: bool = False) -> None:
        del self.sequences[key]
        self.deliver(SequenceLost(key, reason, retryable, by_previous))

    def deliver(self, *outputs: EngineOutput) -> None:
        """Passes on the outputs as of one step."""
        if self.dead:
            return
        assert self.stages is not None
        trio.lowlevel.current_trio_token().run_sync_soon(self.stages.carry, list(outputs))

    def close(self, key: SequenceKey) -> None:
        self.sequences.pop(key, None)


class CuttableLinks(Links):
    """Links that a test can break while both nodes live."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._cuts: dict[Address, trio.CancelScope] = {}

    def cut(self, to: Address) -> None:
        """Breaks the link as a network does: frames under way are lost, and both ends see the loss."""
        if to in self._cuts:
            self._cuts[to].cancel()

    def _link_to(self, to: Address) -> Link:
        known = self._links.get(to)
        link = super()._link_to(to)
        if link is not known:
            link.run = partial(self._run_cuttable, to, link.run)  # type: ignore[method-assign]
        return link

    async def _run_cuttable(self, to: Address, run: Callable[[], Awaitable[str]]) -> str:
        with trio.CancelScope() as self._cuts[to]:
            return await run()
        return "cut"


@dataclass
class SmallNode:
    id: NodeId
    links: CuttableLinks
    engine: CountingEngine
    entry: Entry
    stages: Stages
    losses: LossHandling
    spans: tuple[tuple[int, int], ...]
    scope: trio.CancelScope
    state: PeerState = PeerState.DEAD  # until it runs
    readiness: Readiness = Readiness.WARM
    card: ModelCard = CARD

    def kill(self) -> None:
        """Ends the node as kill -9 does: all its connections end, without a goodbye."""
        self.state = PeerState.DEAD
        self.engine.dead = True
        self.scope.cancel()


class SmallMesh:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.nodes: dict[str, SmallNode] = {}
        self._nursery = nursery
        self.looked_at: Callable[[NodeId], None] = lambda node: None  # called when an entry has membership probe a node

    @property
    def live(self) -> list[SmallNode]:
        return [node for node in self.nodes.values() if node.state is PeerState.ALIVE]

    def view(self) -> View:
        peers = {
            node.id: Peer(
                node.id,
                name,
                node.links.config.address,
                state=node.state,
                facts=Facts(
                    spans=tuple(Span(MODEL, *span) for span in node.spans), models=(node.card,), readiness=node.readiness
                ),
                load=Load(kv_blocks_total=100),
            )
            for name, node in self.nodes.items()
        }
        return View(NodeId(next(iter(peers))), MappingProxyType(peers), 1)

    async def add(self, name: str, *spans: tuple[int, int]) -> None:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        address = listener.socket.getsockname()[:2]
        me, engine = NodeId(name), CountingEngine()

        links = CuttableLinks(LinkConfig(me, address), on_lost=lambda *lost: losses.link_lost(*lost))  # type: ignore[has-type]
        planning = Planning(self.view, trio.current_time, Random(1))
        entry_node = EntryNode(me, address, links.call, links.post, lambda node: self.looked_at(node))
        queue = PathQueue(address, links.post, self.view, trio.current_time)
        entry = Entry(entry_node, CountingPrompts(), planning, queue, 60.0)  # type: ignore[arg-type]
        stages = engine.stages = Stages(address, engine, links.post, entry)  # type: ignore[arg-type]
        losses = LossHandling(self.view, entry, queue, stages, planning, lambda node, proven=False: None)
        links.add(stages.handlers, {**stages.receivers, **queue.receivers})
        self.nodes[name] = SmallNode(me, links, engine, entry, stages, losses, spans, trio.CancelScope())
        await self._nursery.start(self._run, self.nodes[name], listener)
        self.nodes[name].state = PeerState.ALIVE

    async def restart(self, name: str) -> None:
        """Starts the same node again at another port; membership reports the restart to the others."""
        others = [node for node in self.live if node.id != name]
        await self.add(name, *self.nodes[name].spans)
        for other in others:
            other.losses.member_changed(MemberEvent(NodeId(name), PeerState.DEAD, PeerState.ALIVE, restarted=True))

    async def _run(self, node: SmallNode, listener: trio.SocketListener, task_status: trio.TaskStatus[None]) -> None:
        with node.scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(node.links.run, listener)
                await nursery.start(node.entry.run)
                task_status.started()


@asynccontextmanager
async def small_mesh(**spans: tuple[tuple[int, int], ...]) -> AsyncIterator[SmallMesh]:
    """Nodes by name with their spans; the first is the entry."""
    async with trio.open_nursery() as nursery:
        mesh = SmallMesh(nursery)
        for name, held in spans.items():
            await mesh.add(name, *held)
        with trio.fail_after(60):
            yield mesh
        nursery.cancel_scope.cancel()


def a_request(**changes: Any) -> GenerateRequest:
    return GenerateRequest(**{"id": StreamId("s1"), "model": MODEL, "prompt": "x", "max_tokens": 20, **changes})
