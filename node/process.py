"""One node: its parts, what wires them together, and the order in which they start and stop.

Start: sockets, engine, links, membership, documents, entry, HTTP; then the announcement; then spans are
placed and loaded, and the node serves them. Stop: new work is refused, streams that are open here or
computed here go on for a while, the node says goodbye, and everything ends with the nursery.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from importlib.metadata import version
from random import Random

import structlog
import trio

from membership.shell.events import JoinFailed, LossBatch, MemberEvent
from membership.shell.service import Membership
from mesh.ids import Address, format_address
from mesh.keys.keyring import Keyring
from mesh.keys.mesh_key import derive
from mesh.keys.seal import KeySeal, PlainSeal, Seal
from mesh.links.link import LinkConfig
from mesh.links.links import Links
from mesh.links.refusals import Refusal
from mesh.links.tls import PeerTls
from mesh.view import Facts, Load, Span, View
from node.config import NodeConfig
from node.engine.api import Engine
from node.entry.canary import Canary
from node.entry.entry import Entry, EntryNode
from node.entry.path_queue import PathQueue
from node.entry.planning import Planning
from node.entry.prompts import Prompts
from node.host.identity import Identity
from node.host.known_peers import KnownPeers
from node.host.sockets import PeerSockets, reachable
from node.http.app import make_app
from node.http.auth import ApiKeys
from node.http.server import Server, serve
from node.losses import LossHandling
from node.ops.examination import Examination
from node.ops.identity_conflict import IdentityInUse, IdentityWatch
from node.ops.keys import MeshKeys
from node.ops.trace_file import TraceFile
from node.serving.coverage import CoverageWatch
from node.serving.library import ModelLibrary
from node.serving.load_state import LoadState, SpanProgress
from node.serving.models import InitialModels
from node.serving.own_facts import OwnFacts
from node.serving.page_exchange import PageExchange
from node.serving.peer_models import PeerModels
from node.serving.placement import Placement
from node.serving.readiness_monitor import ReadinessMonitor
from node.serving.stages import Stages
from node.serving.version_watch import VersionWatch
from node.surface import Surface
from rag.embed import MiniLM
from rag.service import Documents

SWEEP_EVERY_S = 10.0
MAX_HOST_LABEL = 27  # of a name of at most 32 bytes, which every claim of membership carries
MAX_NAMED = 16  # nodes of a cut in one line of the log
DRAIN_POLL_S = 0.05
ENGINE_STOP_S = 5.0  # for the step under way; a step that hangs is left behind

log = structlog.get_logger()


class Node:
    """Made with everything that can fail at the start already taken; `run` is its life."""

    def __init__(
        self,
        config: NodeConfig,
        identity: Identity,
        sockets: PeerSockets,
        http_listener: trio.SocketListener,
        engine: Engine,
        holdings: InitialModels,
        keyring: Keyring | None,
        api_keys: ApiKeys | None,
    ) -> None:
        self._config = config
        self._identity = identity
        self._sockets = sockets
        self._http_listener = http_listener
        self._http_address: Address = http_listener.socket.getsockname()[:2]
        self._engine = engine
        self.name = config.name or f"{socket.gethostname().split('.')[0][:MAX_HOST_LABEL]}-{identity.id[:4]}"
        tls = PeerTls(keyring.secrets, identity.key) if keyring else None
        seal = KeySeal(keyring.secrets, config.cluster) if keyring else PlainSeal(config.cluster)
        self._links = Links(
            LinkConfig(identity.id, sockets.address, config.cluster, tls),
            load=self._load,
            on_load=lambda node, load: self._membership.note_load(node, load),
            on_lost=lambda node, address, reason: self._losses.link_lost(node, address, reason),
            on_linked=lambda node: self._membership.linked(node),
        )
        self._membership = self._make_membership(seal)
        self._membership.on_renewed = identity.renew
        self._keys: MeshKeys | None = None
        if keyring and tls and isinstance(seal, KeySeal) and config.key_file:
            self._keys = MeshKeys(keyring, config.key_file, seal, tls, self._view, self._links.call)
            self._links.add(self._keys.handlers)
        self._known_peers = KnownPeers(identity.directory, time.time)
        self._facts = OwnFacts(Facts(version=version("gossip-mesh"), pid=os.getpid()), self._membership.publish)
        rng = Random()
        self._planning = Planning(self._view, trio.current_time, rng)
        embedder = MiniLM()
        self._documents = self._make_documents(embedder)
        self._library = self._make_library()
        self._models = PeerModels(self._view, holdings.models, self._library)
        self._queue = PathQueue(self._sockets.address, self._links.post, self._view, trio.current_time)
        self._entry = self._make_entry()
        self._pages = PageExchange(engine, self._links.call)
        self._stages = self._make_stages()
        self._losses = LossHandling(self._view, self._entry, self._queue, self._stages, self._planning, self._membership.lost)
        self._coverage = CoverageWatch(self._membership.changed)
        self._readiness_monitor = ReadinessMonitor(self._facts, self._load, engine.overdue_s)
        self._canary = Canary(self._view, self._models, self._entry, self._library.hashing)
        self._versions = VersionWatch(self._membership.changed, holdings.models)
        self._placement = Placement(config.layers, engine, holdings, self._facts, self._membership, self._library)
        self._load_state = LoadState(self._facts, self._spans_loading, self._library.share_ready)
        self._examination = self._make_examination()
        asked = self.statistics, self._examination.examine, self._keys
        self._surface = Surface(self._view, self._models, self._entry, self._canary, self._documents, embedder, *asked)
        self._app = make_app(self._surface, auth=api_keys, bound=self._http_address)
        self._server: Server | None = None
        self._membership_runs = False
        self._wire()

    def _make_membership(self, seal: Seal) -> Membership:
        config, identity = self._config, self._identity
        return Membership(
            identity.id,
            self.name,
            config.region,
            identity.epoch,
            signer=identity.key,
            socket=self._sockets.datagrams,
            address=self._sockets.address,
            seal=seal,
            call=self._links.call,
            load=self._load,
            keep_links=self._links.keep,
            trace_bytes=config.trace_mb << 20,
        )

    def _wire(self) -> None:
        for part in (self._membership, self._documents, self._stages, self._pages, self._library, self._examination):
            self._links.add(part.handlers)
        self._links.add(receivers={**self._stages.receivers, **self._queue.receivers})
        self._membership.subscribe(self._on_member)
        self._membership.on_loss_batch = self._on_loss_batch
        twins = self._membership.twins
        watch = self._twin_watch = IdentityWatch(self._identity.id, self._facts)
        twins.on_seen, twins.on_displaced = watch.seen, watch.displaced

    def _make_entry(self) -> Entry:
        own_defaults = self._config.generation_config == "auto"
        prompts = Prompts(self._models.get, self._documents, models_defaults=own_defaults)
        voice = self._links.call, self._links.post, self._membership.lost
        entry_node = EntryNode(self._identity.id, self._sockets.address, *voice, self._prefix_secret)
        return Entry(entry_node, prompts, self._planning, self._queue, self._config.request_timeout_s)

    def _make_stages(self) -> Stages:
        return Stages(
            self._sockets.address,
            self._engine,
            self._links.post,
            self._entry,
            span_lost=lambda lost: self._placement.span_lost(lost),
            fetch_pages=self._pages.fetch,
        )

    def _make_documents(self, embedder: MiniLM) -> Documents:
        return Documents(
            self._identity.id,
            self._identity.directory / "documents",
            embedder,
            self._view,
            self._links.call,
            self._facts.set_documents,
            time.time,
        )

    def _make_examination(self) -> Examination:
        return Examination(
            self._view,
            self._links.call,
            time.time,
            self._identity.directory,
            refusals=self._refused,
            stores=self._documents.stores,
            missing_layers=self._canary.missing_layers,
            ready=self._canary.why_not,
            keys=self._keys,
            changed_files=self._library.faults,
        )

    def _make_library(self) -> ModelLibrary:
        return ModelLibrary(
            self._view,
            self._membership.changed,
            self._links.call,
            self._identity.directory / "weights",
            lambda: self._engine.load_report().running > 0,
            self._config.upload_bytes_s,
        )

    def _trace_file(self) -> TraceFile:
        return TraceFile(self._identity.directory, self._membership.dump_trace)

    def _spans_loading(self) -> Mapping[Span, SpanProgress]:
        """Another engine may not tell."""
        found: Mapping[Span, SpanProgress] = getattr(self._engine.statistics(), "loading", {})
        return found

    def _prefix_secret(self) -> bytes:
        return derive(self._keys.ring.keys[0].secret, "prefix") if self._keys else b""

    def _view(self) -> View:
        return self._membership.view

    def _load(self) -> Load:
        """The engine's load; requests that wait here, at their entry, wait too."""
        load, entry = self._engine.load_report(), self._entry.statistics()
        return Load(
            max(load.running, entry.running),
            load.waiting + entry.waiting,
            load.kv_blocks_used,
            load.kv_blocks_total,
            load.prefill_tokens_queued,
            load.prefill_tok_s,
            load.step_ms,
        )

    def statistics(self) -> Mapping[str, object]:
        """Of every part, by name, for /metrics."""
        return {
            "load": self._load(),
            "entry": self._entry.statistics(),
            "stages": self._stages.statistics(),
            "pages": self._pages.statistics(),
            "links": self._links.statistics(),
            "membership": self._membership.statistics(),
            "coverage": self._coverage.statistics(),
            "documents": self._documents.statistics(),
            "library": self._library.statistics(),
            "weights_sent": self._library.source.statistics(),
            "weights_fetched": self._library.fetching.statistics(),
            "engine": self._engine.statistics(),
            "http": self._app.statistics(),
            **({"server": self._server.statistics()} if self._server else {}),
        }

    def _refused(self) -> list[Refusal]:
        now = trio.current_time()
        return [each for part in (self._membership, self._links, self._stages) for each in part.refusals.recent(now)]

    def _on_member(self, event: MemberEvent) -> None:
        peer = self._view().peers.get(event.node)
        log.info(
            "member",
            peer=event.node,
            name=peer.name if peer else "",
            state=event.after.value,
            cause=peer.cause if peer else "",
            restarted=event.restarted,
        )
        self._losses.member_changed(event)

    def _on_loss_batch(self, cut: LossBatch) -> None:
        log.info(
            "cut", lost=len(cut.lost), left=len(cut.left), nodes=[*cut.lost, *cut.left][:MAX_NAMED], frozen=self._view().frozen
        )

    # --- life

    async def run(self, announce: Callable[[str], None], signals: AsyncIterator[int]) -> None:
        """Until one of `signals`; raises what makes the start impossible."""
        self._engine.start(self._stages.deliverer(trio.lowlevel.current_trio_token()))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_by, signals, nursery)
                await self._start(nursery, announce)
        finally:
            with trio.move_on_after(ENGINE_STOP_S, shield=True):
                await trio.to_thread.run_sync(self._engine.stop, abandon_on_cancel=True)
            self._sockets.datagrams.close()

    async def _stop_by(self, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
        """The first signal: drain, or, where nothing was announced yet, leave at once. A second one: at once."""
        await anext(signals)
        nursery.start_soon(self._drain if self._server is not None else self._leave, nursery.cancel_scope)
        await anext(signals)
        nursery.cancel_scope.cancel()

    async def _start(self, nursery: trio.Nursery, announce: Callable[[str], None]) -> None:
        await nursery.start(self._links.run, self._sockets.listener)
        await self._end_as_a_copy()
        nursery.start_soon(self._twin_watch.run)
        await nursery.start(self._membership.run)
        self._membership_runs = True
        self._facts.set_http(f"http://{format_address(await reachable(self._http_address, self._config.join))}")
        self._membership.recall(self._known_peers.addresses())
        await self._join()
        await nursery.start(self._documents.run)
        await nursery.start(self._models.run)
        await nursery.start(self._entry.run)
        if self._keys is not None:
            nursery.start_soon(self._keys.run, self._membership.refused)
        nursery.start_soon(self._sweep)
        nursery.start_soon(self._trace_file().run)
        nursery.start_soon(self._readiness_monitor.run)
        nursery.start_soon(self._coverage.run)
        nursery.start_soon(self._versions.run)
        nursery.start_soon(self._watch_stalls)
        await nursery.start(self._placement.run)  # what will be loaded is told before the first request can ask for it
        self._server = await nursery.start(serve, self._app, [self._http_listener])
        announce(f"mesh node {self.name} up: {self._facts.now.http} gossip {format_address(self._sockets.address)}")
        nursery.start_soon(self._load_state.run)

    async def _end_as_a_copy(self) -> None:
        """Before a word is said under this identity. Raises IdentityInUse: a process that the seeds know lives with it."""
        older = await self._membership.twins.older_elsewhere([*self._config.join, *self._known_peers.addresses()])
        if older is not None:
            raise IdentityInUse(self._identity.id, older)

    async def _join(self) -> None:
        """A seed that is not up yet is tried again by itself: nodes may start in any order, and after any outage."""
        try:
            await self._membership.join(list(self._config.join))
        except JoinFailed as error:
            if error.refused:
                raise
            log.warning("node.alone", why=f"{error}; it goes on alone and keeps trying")

    async def _watch_stalls(self) -> None:
        version = -1
        while True:
            view = await self._membership.changed(version)
            version = view.version
            self._losses.view_changed(view)

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(SWEEP_EVERY_S)
            self._known_peers.note(self._view())
            self._stages.sweep(trio.current_time())
            self._twin_watch.sweep()

    async def _drain(self, node_scope: trio.CancelScope) -> None:
        """No new work; what is under way here, for clients or for other entries, may end in `drain_s`; then the node ends."""
        log.info("node.draining", streams=self._entry.open_requests, sequences=self._stages.open_sequences)
        self._facts.set_draining()
        assert self._server is not None
        self._server.drain(self._config.drain_s)
        with trio.move_on_after(self._config.drain_s):
            # Two owners of work, neither of which knows of the other: looking is simpler than an event of both.
            while self._entry.open_requests or self._stages.open_sequences:  # noqa: ASYNC110
                await trio.sleep(DRAIN_POLL_S)
        self._known_peers.note(self._view())
        await self._leave(node_scope)

    async def _leave(self, node_scope: trio.CancelScope) -> None:
        if self._membership_runs:
            await self._membership.leave()
            await self._trace_file().write()
        node_scope.cancel()
