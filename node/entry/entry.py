"""The entry: all requests whose clients hold a connection to this node."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from random import Random

import trio

from mesh.errors import BadRequest
from mesh.ids import Address, NodeId
from node.engine.api import SequenceLost, TokenOut
from node.entry.generation import PeerNews
from node.entry.planning import Planning
from node.entry.prompts import Prompts
from node.entry.recent import RecentRequests
from node.entry.run import EntryCounters, EntryNode, RequestRun
from node.requests import GenerateEvent, GenerateRequest
from routing.admission import AdmissionLimits, admit


@dataclass(frozen=True, slots=True)
class EntryStatistics:
    running: int
    waiting: int
    counters: EntryCounters


class Entry:
    """Takes requests up, and passes on to each what peers tell of it."""

    def __init__(
        self,
        node: EntryNode,
        prompts: Prompts,
        planning: Planning,
        request_timeout_s: float,
        rng: Random,
        limits: AdmissionLimits | None = None,
    ) -> None:
        self.node = node
        self.recent = RecentRequests()
        self._prompts = prompts
        self._planning = planning
        self._request_timeout_s = request_timeout_s
        self._runs: dict[str, RequestRun] = {}
        self._rng = rng
        self._limits = limits or AdmissionLimits()
        self._nursery: trio.Nursery | None = None
        self._counters = EntryCounters()

    def statistics(self) -> EntryStatistics:
        running = self._counters.speaking
        return EntryStatistics(running, len(self._runs) - running, replace(self._counters))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Owns the tasks of all requests."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    @asynccontextmanager
    async def generate(self, request: GenerateRequest) -> AsyncIterator[AsyncIterator[GenerateEvent]]:
        """See `node.http.services.NodeServices.generate`."""
        statistics = self.statistics()
        admit(
            self._limits,
            running=len(self._runs),
            waiting=statistics.waiting,
            expected_wait_s=self._planning.last_wait_s,
            deadline_s=request.deadline_s,
        )
        if request.id in self._runs:
            raise BadRequest(f"stream {request.id} is running already", status=409)
        deadline_at = trio.current_time() + (request.deadline_s or self._request_timeout_s)
        prompt = await self._prompts.prepare(request)
        run = RequestRun(self.node, self._planning, self._counters, request, prompt, deadline_at, self._rng)
        self._runs[request.id] = run
        self.recent.add(run.record)
        self._counters.requests_total += 1
        self._counters.prompt_tokens_total += len(prompt.tokens)
        assert self._nursery is not None, "Entry.run must be running"
        self._nursery.start_soon(self._drive, run)
        try:
            async with aclosing(run.events()) as events:
                yield events
        finally:
            run.cancel()

    async def _drive(self, run: RequestRun) -> None:
        try:
            await run.drive()
        finally:
            del self._runs[run.request.id]

    def cancel(self, stream: str) -> bool:
        """Ends a running request for good; False when it does not run here."""
        run = self._runs.get(stream)
        if run is not None:
            run.cancel()
        return run is not None

    @property
    def open_requests(self) -> int:
        return len(self._runs)

    # --- what peers tell (node.serving.stages.TokenSink)

    def token(self, token: TokenOut, sender: NodeId) -> bool:
        run = self._runs.get(token.key.stream)
        if run is None:
            self._counters.late_tokens_total += 1
        return run is None or run.token_drawn(token, sender)

    def lost(self, lost: SequenceLost, address: Address | None, sender: NodeId) -> bool:
        run = self._runs.get(lost.key.stream)
        return run is None or run.stage_lost(lost, address, sender)

    def peer_news(self, news: PeerNews) -> None:
        """A link to the node broke, or membership changed its mind about it."""
        for run in self._runs.values():
            run.tell_all(news)
