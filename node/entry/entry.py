"""The entry: the requests whose clients hold a connection to this node.

`Entry` admits requests and owns their tasks. `RequestRun` is the shell of one request: for each choice a core (`Generation`)
and its text, and the channel to the client. One task drives it: events go into the cores, and their effects are carried out with
no `await` in between. Opening a path takes time, so it is a task of its own whose outcome, a stage's refusal included, returns
as an event (`RequestRun._open`). The text of a choice is a pure function of its tokens.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

import structlog
import trio

from mesh.errors import BadRequest, DeadlineExceeded, MeshError, NoPath, PeerLost, Refused
from mesh.ids import Address, NodeId
from mesh.prefix import PREFIX_PAGE_TOKENS, further_names, prefix_salt
from mesh.view import is_exact
from mesh.wire.calls import Call, Post
from node.engine.api import OpenSequence, Prefix, SequenceKey, SequenceLost, TokenOut
from node.entry.generation import (
    Cancelled,
    ClosePath,
    DoubtPeers,
    EmitToken,
    Fail,
    Generation,
    GenerationEffect,
    GenerationEvent,
    GenerationPhase,
    NoPathFound,
    Opened,
    OpenPath,
    OpenRefused,
    PathPlanned,
    PeerNews,
    PlanPath,
    StageLost,
    StopFound,
    TokenDrawn,
)
from node.entry.path_queue import PathQueue
from node.entry.planning import PlannedPath, Planning, PlanRequest
from node.entry.prompts import Prompt, Prompts
from node.entry.recent import RecentRequests, RequestRecord
from node.reports import CandidateReport, PlanReport, StageReport
from node.requests import ChoiceDone, Finished, GenerateEvent, GenerateRequest, StageUse, Started, TextDelta, TokenLogprob
from node.serving.stages import OpenStage, open_path
from node.text.detokenize import Decode, TextState
from routing.admission import Admission, AdmissionLimits
from routing.entry_queue import QueueLane
from routing.fair_queue import Ticket
from routing.path import PathStages

CONTEXT_TOKENS = 4  # last tokens of the prompt; whether the answer's first word begins with a space may depend on them
OUTPUT_COST = 2.0  # of a token to draw, in tokens to prefill, for the shares of tenants

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class ChoiceStep:
    """The text that one token completes. With `finish_reason` the choice has ended; `end_token_ids` come last, without text."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None = None
    end_token_ids: tuple[int, ...] = ()


class ChoiceText:
    """The text of one choice, from its tokens; `whole` is all of it so far."""

    def __init__(self, decode: Decode, request: GenerateRequest, prompt: Sequence[int], end_tokens: Sequence[int]) -> None:
        self.whole = ""
        self._decode = decode
        self._reports_logprobs = request.sampling.logprobs is not None
        self._held_logprobs: deque[TokenLogprob] = deque()  # of tokens whose text is held back until more tokens complete it
        self._state = TextState(
            decode,
            request.stop,
            request.include_stop,
            end_tokens=end_tokens,
            context=prompt[-CONTEXT_TOKENS:],
            min_tokens=request.sampling.min_tokens,
        )

    def feed(self, emit: EmitToken) -> ChoiceStep:
        """Takes the next token and returns the text it completes; not to be called after a step with a finish reason."""
        if self._reports_logprobs:
            top = tuple((token, self._decode([token]), logprob) for token, logprob in emit.top)
            self._held_logprobs.append(TokenLogprob(emit.token, self._decode([emit.token]), emit.logprob or 0.0, top))
        step = self._state.feed([emit.token])
        end = self._state.finish(emit.finish or "stop") if emit.finish is not None or step.stopped else None
        text = step.text + end.text if end is not None else step.text
        token_ids = step.token_ids + end.token_ids if end is not None else step.token_ids
        self.whole += text
        logprobs = tuple(self._held_logprobs.popleft() for _ in range(min(len(token_ids), len(self._held_logprobs))))
        if end is None:
            return ChoiceStep(text, token_ids, logprobs)
        return ChoiceStep(text, token_ids, logprobs, end.finish_reason, end.end_token_ids)


@dataclass(frozen=True, slots=True)
class EntryNode:
    """This node's identity, and its ways to reach peers, as the entry uses them."""

    id: NodeId
    address: Address
    call: Call
    post: Post
    doubt: Callable[[NodeId], None] = lambda node: None  # has membership probe a peer now
    prefix_secret: Callable[[], bytes] = bytes  # key of the prefix pages' names; the same on all nodes of the mesh


@dataclass(slots=True)
class EntryCounters:
    """Counts since the start, but `speaking`: running requests that have a token now."""

    speaking: int = 0
    requests_total: int = 0
    succeeded_total: int = 0
    failed_total: int = 0
    cancelled_total: int = 0
    tokens_total: int = 0
    prompt_tokens_total: int = 0
    opens_refused_total: int = 0
    attempts_lost_total: int = 0
    late_tokens_total: int = 0


class RequestRun:
    """One request: `drive` runs in a task of the entry, `events` in the client's task."""

    def __init__(
        self,
        node: EntryNode,
        planning: Planning,
        queue: PathQueue,
        counters: EntryCounters,
        request: GenerateRequest,
        prompt: Prompt,
        deadline_at: float,
    ) -> None:
        self.request = request
        self.record = RequestRecord(request.id, request.request_id, node.id)
        self._node = node
        self._planning = planning
        self._queue = queue
        self._counters = counters
        self._prompt = prompt
        self._began_at = trio.current_time()
        self._cores = {choice: Generation(len(prompt.tokens), deadline_at) for choice in range(request.n)}
        self._tickets: dict[int, Ticket] = {}  # by choice: its place in the queue, while it needs a path
        self._plans: dict[int, PlanPath] = {}  # by choice: what it queues for
        ends = prompt.sampling.stop_token_ids
        self._texts = {choice: ChoiceText(prompt.decode, request, prompt.tokens, ends) for choice in self._cores}
        self.record.generations = self._cores
        # (choice, event). No bound of its own: each position's token is sent once per attempt, so `max_tokens` bounds it.
        self._inbox: deque[tuple[int, GenerationEvent]] = deque()
        self._woken = trio.Event()
        self._opening: dict[int, trio.CancelScope] = {}  # by choice: the open under way
        self._numerics: set[str] = set()  # fingerprints of all paths so far
        self._salt = prefix_salt(node.prefix_secret(), request.tenant, prompt.model.card.weights)
        self._planned: dict[int, PlannedPath] = {}  # by choice: the latest plan
        self._names: dict[int, list[bytes]] = {choice: [] for choice in self._cores}  # by choice: of its whole prefix pages
        self._cached_tokens = 0
        self._has_begun = False
        self._has_token = False
        # Unbounded, for the reader may be slower than the mesh; the request's own max_tokens bounds it.
        self._events_in, self._events_out = trio.open_memory_channel[GenerateEvent | MeshError](math.inf)

    # --- the client's side

    async def events(self) -> AsyncGenerator[GenerateEvent, None]:
        """The request's events to its end. Raises the MeshError that the request failed with."""
        async for event in self._events_out:
            if isinstance(event, MeshError):
                raise event
            yield event

    def cancel(self) -> None:
        """Ends all choices; their stages are closed."""
        self.enqueue_all(Cancelled())

    # --- the mesh's side

    def enqueue(self, choice: int, event: GenerationEvent) -> None:
        """Queues an event for one choice's core and wakes `drive`; an unknown choice is ignored."""
        if choice in self._cores:
            self._inbox.append((choice, event))
            self._woken.set()

    def enqueue_all(self, event: GenerationEvent) -> None:
        for choice in self._cores:
            self.enqueue(choice, event)

    def _path_of(self, key: SequenceKey) -> PathStages:
        """The path of the choice's running attempt; empty for any other attempt, whose frames change nothing (fencing)."""
        core = self._cores.get(key.choice)
        return core.path if core is not None and core.attempt == key.attempt else ()

    def token_drawn(self, token: TokenOut, sender: NodeId) -> bool:
        """Takes a token frame; False if `sender` is not the path's last stage, which alone draws tokens.

        This is where a token is compared with its attempt: a token of another attempt is counted and dropped.
        """
        key = token.key
        if not (path := self._path_of(key)):
            self._counters.late_tokens_total += 1
            return True
        if path[-1].node != sender:
            return False
        if key.choice == 0 and key.attempt == 1:  # usage reports the first attempt of the first choice
            self._cached_tokens = min(token.cached, len(self._prompt.tokens))
        self.enqueue(key.choice, TokenDrawn(key.attempt, token.position, token.token, token.finish, token.logprob, token.top))
        return True

    def stage_lost(self, lost: SequenceLost, address: Address | None, sender: NodeId) -> bool:
        """Takes the report that the stage at `address` (None: not known) lost the sequence; False if `sender` is on no stage."""
        choice, path = lost.key.choice, self._path_of(lost.key)
        if not path:
            return True
        if sender not in {stage.node for stage in path}:
            return False
        node = next((stage.node for stage in path if stage.address == address), None)
        fault = None if lost.retryable else BadRequest(lost.reason)
        if lost.no_room and node is not None:
            self._queue.node_full(node, self._prompt.model.card.id)
        self.enqueue(choice, StageLost(lost.key.attempt, node, lost.reason, lost.retryable, fault, no_room=lost.no_room))
        return True

    async def drive(self) -> None:
        """Runs the request until every choice has ended."""
        async with trio.open_nursery() as open_nursery:
            for choice, core in self._cores.items():
                self._carry_out(choice, core.start(trio.current_time()), open_nursery)
            while not all(core.ended for core in self._cores.values()):
                with trio.move_on_at(min(core.deadline for core in self._cores.values())):
                    await self._woken.wait()
                self._woken = trio.Event()
                now = trio.current_time()
                while self._inbox:
                    choice, event = self._inbox.popleft()
                    self._carry_out(choice, self._cores[choice].receive(event, now), open_nursery)
                for choice, core in self._cores.items():
                    self._carry_out(choice, core.tick(now), open_nursery)
            open_nursery.cancel_scope.cancel()
        self._finish()

    def _carry_out(self, choice: int, effects: list[GenerationEffect], open_nursery: trio.Nursery) -> None:
        for effect in effects:
            match effect:
                case PlanPath():
                    self._join(choice, effect)
                case OpenPath():
                    scope = self._opening[choice] = trio.CancelScope()
                    self.record.last_paths[choice] = effect.path
                    self._planning.dispatched(self._key(choice, effect.attempt), effect.path, self._known_tokens(choice))
                    open_nursery.start_soon(self._open, choice, effect, scope)
                case ClosePath():
                    self._close(choice, effect)
                case DoubtPeers(nodes=nodes):
                    for node in nodes:
                        self._node.doubt(node)
                case EmitToken():
                    self._on_token(choice, effect)
                case Fail(error=error):
                    self._send(error)
                    self.enqueue_all(Cancelled())
        if self._cores[choice].ended and choice in self._tickets:
            self._queue.leave(self._tickets.pop(choice))

    def _join(self, choice: int, plan: PlanPath) -> None:
        """Queues the choice for a path. A new ticket after a loss keeps the time of arrival, and goes first if tokens are out."""
        core, card = self._cores[choice], self._prompt.model.card
        self._plans[choice] = plan
        ticket = self._tickets.get(choice)
        if ticket is None or ticket not in self._queue:
            cost = self._known_tokens(choice) + OUTPUT_COST * self._tokens_to_come(choice)
            ticket = self._queue.ticket(
                self._began_at, self.request.priority, self.request.tenant, cost, continued=bool(core.tokens)
            )
            self._tickets[choice] = ticket
        self._queue.join(self, ticket, (card.id, card.weights, self._wanted_numerics(), *sorted(plan.exclude)))

    def place(self, ticket: Ticket, without: frozenset[NodeId]) -> tuple[NodeId, ...] | None:
        """Plans a path for the choice whose turn it is (`routing.entry_queue.Place`)."""
        choice = next(choice for choice, own in self._tickets.items() if own == ticket)
        card, plan = self._prompt.model.card, self._plans[choice]
        request = PlanRequest(
            model=card.id,
            layers=card.layers,
            weights=card.weights,
            known_tokens=self._known_tokens(choice),
            tokens_to_come=self._tokens_to_come(choice),
            exclude=plan.exclude | without,
            numerics=self._wanted_numerics(),
            policy=self.request.policy,
            names=self._names_of(choice),
            avoid=plan.avoid,
        )
        try:
            planned = self._planning.plan(request)
        except NoPath as error:
            if without and self._planning.covers(card, plan.exclude):
                return None  # there is a path, of which a node is full
            self.enqueue(choice, NoPathFound(plan.attempt, error))
            return ()
        except MeshError as error:
            self.enqueue(choice, NoPathFound(plan.attempt, error))
            return ()
        self._planned[choice] = planned
        self.record.why.append(
            PlanReport(
                choice=choice,
                attempt=plan.attempt,
                weights=card.weights,
                path=[StageReport(stage.node, stage.start, stage.end) for stage in planned.stages],
                cost_ms=planned.cost_ms,
                candidates=[CandidateReport(each.stage, each.rank, each.node, each.terms_ms) for each in planned.candidates],
            )
        )
        self.enqueue(choice, PathPlanned(plan.attempt, planned.stages))
        return tuple(stage.node for stage in planned.stages)

    def _wanted_numerics(self) -> str:
        """The fingerprint of the paths so far; empty where there was none yet, or several."""
        return next(iter(self._numerics)) if len(self._numerics) == 1 else ""

    def _begin(self, choice: int) -> None:
        """A path has taken the choice: its numerics count, and the answer begins. Before that, a refusal is an HTTP status."""
        self._numerics.add(self._planned[choice].numerics)
        if not self._has_begun:
            self._has_begun = True
            prompt = self._prompt
            self._send(Started(prompt.name, prompt.seed, len(prompt.tokens), prompt.tool_style))

    async def _open(self, choice: int, effect: OpenPath, scope: trio.CancelScope) -> None:
        """Opens every stage of the path and queues the outcome: Opened, OpenRefused or StageLost.

        After a refusal the stages that were opened are closed here. What follows is decided in `Generation._refused`.
        """
        stages = [(stage.address, self._open_stage(choice, effect, index)) for index, stage in enumerate(effect.path)]
        ticket = self._tickets[choice]
        timeout_s = max(0.0, self._cores[choice].deadline_at - trio.current_time())  # a late answer is no sign of a lost peer
        with scope:
            failure = await open_path(self._node.call, stages, timeout_s=timeout_s)
            if failure is None:
                self._planning.opened(effect.path, self._names[choice])
                self._queue.opened(ticket)
                self._begin(choice)
                self.enqueue(choice, Opened(effect.attempt))
                return
            node = next(stage.node for stage in effect.path if stage.address == failure.address)
            match failure.error:
                case (Refused() | BadRequest()) as error:
                    self._counters.opens_refused_total += 1
                    self._post_close(choice, effect.attempt, effect.path)
                    self._planning.finished(self._key(choice, effect.attempt), ok=False)
                    if isinstance(error, Refused):
                        self._queue.refused(ticket, node)
                    self.enqueue(choice, OpenRefused(effect.attempt, node, error if isinstance(error, BadRequest) else None))
                case PeerLost() | DeadlineExceeded() as error:
                    self.enqueue(choice, StageLost(effect.attempt, node, f"{node}: {error}", unreachable=True))
                case error:
                    self.enqueue(choice, StageLost(effect.attempt, node, str(error)))

    def _open_stage(self, choice: int, effect: OpenPath, index: int) -> OpenStage:
        stage, prompt = effect.path[index], self._prompt
        is_first, is_last = index == 0, index == len(effect.path) - 1
        tokens = (*prompt.tokens, *effect.tokens)
        sequence = OpenSequence(
            stream=self.request.id,
            choice=choice,
            attempt=effect.attempt,
            model=prompt.model.card.id,
            start=stage.start,
            end=stage.end,
            prompt_tokens=len(prompt.tokens),
            known=len(tokens),
            tokens=tokens if is_first or is_last else (),
            sampling=prompt.stage_sampling(choice, last=is_last),
            prefix=self._prefix(choice, len(tokens)),
            priority=self.request.priority,
            remaining_ms=max(0, int((self._cores[choice].deadline_at - trio.current_time()) * 1e3)),
            last_choice=self._planned[choice].last_choice,
            weights=prompt.model.card.weights,
        )
        return OpenStage(
            sequence,
            entry=self._node.id,
            previous=None if is_first else effect.path[index - 1].node,
            last=effect.path[-1].node,
            entry_address=self._node.address,
            first_address=effect.path[0].address,
            next_address=None if is_last else effect.path[index + 1].address,
            previous_address=None if is_first else effect.path[index - 1].address,
            pages_from=self._planning.page_source(stage, prompt.model.card, sequence.prefix.names) if sequence.prefix else None,
        )

    def _names_of(self, choice: int) -> list[bytes]:
        """Names of all whole prefix pages of the tokens known so far."""
        names = self._names[choice]
        names += further_names(self._salt, names, (*self._prompt.tokens, *self._cores[choice].tokens))
        return names

    def _prefix(self, choice: int, known: int) -> Prefix | None:
        """The prefix for the stages' page caches; None unless all stages compute exactly and alike, as cached pages must equal
        what would be computed."""
        numerics = self._planned[choice].numerics
        if not is_exact(numerics):
            return None
        return Prefix(self._salt, tuple(self._names_of(choice)[: known // PREFIX_PAGE_TOKENS]), numerics)

    def _close(self, choice: int, effect: ClosePath) -> None:
        scope = self._opening.pop(choice, None)
        if scope is not None:
            scope.cancel()  # the open may be under way still; stages ignore an open that comes after its close
        core = self._cores[choice]
        self._planning.finished(self._key(choice, effect.attempt), ok=core.phase is GenerationPhase.DONE, lost=effect.lost)
        if not core.ended:
            self._counters.attempts_lost_total += 1
            log.info("attempt.lost", stream=self.request.id, attempt=effect.attempt, reason=core.history[-1])
        self._post_close(choice, effect.attempt, effect.path)

    def _post_close(self, choice: int, attempt: int, path: PathStages) -> None:
        key = self._key(choice, attempt)
        for address in {stage.address for stage in path}:
            try:
                self._node.post(address, "stage.close", {"keys": [list(key)]})
            except PeerLost:
                pass  # the peer frees the sequence when it loses its link to this entry, or in its sweep

    def _key(self, choice: int, attempt: int) -> SequenceKey:
        return SequenceKey(self.request.id, choice, attempt)

    def _known_tokens(self, choice: int) -> int:
        return len(self._prompt.tokens) + len(self._cores[choice].tokens)

    def _tokens_to_come(self, choice: int) -> int:
        return self._prompt.sampling.max_tokens - len(self._cores[choice].tokens)

    # --- tokens to events

    def _send(self, event: GenerateEvent | MeshError) -> None:
        self._events_in.send_nowait(event)

    def _on_token(self, choice: int, emit: EmitToken) -> None:
        self._begin(choice)  # a token may come before the answer to the open
        if not self._has_token:
            self._has_token = True
            self._counters.speaking += 1
        self._counters.tokens_total += 1
        out = self._texts[choice].feed(emit)
        if out.text or out.token_ids:
            self.record.seq += len(out.token_ids)
            self._send(TextDelta(choice, out.text, out.token_ids, self.record.seq, out.logprobs))
        if out.finish_reason is not None:
            self.record.seq += len(out.end_token_ids)
            self._send(ChoiceDone(choice, out.finish_reason, self.record.seq, out.end_token_ids))
            # Ahead of tokens that may be queued after this one. Changes nothing if the last stage has ended the choice.
            self._inbox.appendleft((choice, StopFound()))

    def _finish(self) -> None:
        assert all(core.ended for core in self._cores.values())
        assert not self._tickets
        self._counters.speaking -= self._has_token
        phases = {core.phase for core in self._cores.values()}
        if phases == {GenerationPhase.DONE}:
            self._counters.succeeded_total += 1
            self._send(self._finished())
        elif GenerationPhase.FAILED in phases:
            self._counters.failed_total += 1
        else:
            self._counters.cancelled_total += 1
            self._send(Refused("the request was cancelled", 0.0))
        self._events_in.close()
        self.record.close()

    def _finished(self) -> Finished:
        return Finished(
            seq=self.record.seq,
            prompt_tokens=len(self._prompt.tokens),
            completion_tokens=self.record.seq,
            seed=self._prompt.seed,
            # exact: all paths of all attempts computed with one set of exact kernels
            numerics="exact" if len(self._numerics) == 1 and all(map(is_exact, self._numerics)) else "approximate",
            attempts=self.record.attempts,
            path=tuple(StageUse(stage.node, stage.start, stage.end) for stage in self.record.last_paths.get(0, ())),
            retrieval=self._prompt.retrieval_report([text.whole for text in self._texts.values()]),
            cached_tokens=self._cached_tokens,
        )


@dataclass(frozen=True, slots=True)
class EntryStatistics:
    running: int
    waiting: int  # requests without a token yet
    queued: int  # choices that wait for room
    full_nodes: int  # for which they wait
    counters: EntryCounters


class Entry:
    """Admits requests, and passes peers' frames and membership's news to the requests that they concern."""

    def __init__(
        self,
        node: EntryNode,
        prompts: Prompts,
        planning: Planning,
        queue: PathQueue,
        request_timeout_s: float,
        limits: AdmissionLimits | None = None,
    ) -> None:
        self.node = node
        self.recent = RecentRequests()
        self._prompts = prompts
        self._planning = planning
        self._request_timeout_s = request_timeout_s
        self._runs: dict[str, RequestRun] = {}
        self._queue = queue
        self._admission = Admission(limits)
        self._lanes: dict[str | None, QueueLane] = {}  # by the name that requests ask for a model by
        self._nursery: trio.Nursery | None = None
        self._counters = EntryCounters()

    def statistics(self) -> EntryStatistics:
        running = self._counters.speaking
        waiting = len(self._runs) - running
        return EntryStatistics(running, waiting, len(self._queue), len(self._queue.full_nodes), replace(self._counters))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Owns the tasks of all requests, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await self._queue.run()

    @asynccontextmanager
    async def generate(self, request: GenerateRequest) -> AsyncIterator[AsyncIterator[GenerateEvent]]:
        """See `node.http.services.NodeServices.generate`."""
        queue = self._queue.state(len(self._runs), self._lanes.get(request.model), request.priority)
        self._admission.admit(queue, trio.current_time(), retries=request.retries, deadline_s=request.deadline_s)
        if request.id in self._runs:
            raise BadRequest(f"stream {request.id} is running already", status=409)
        deadline_at = trio.current_time() + (request.deadline_s or self._request_timeout_s)
        prompt = await self._prompts.prepare(request)
        card = prompt.model.card
        self._lanes[request.model] = (card.id, card.weights, "")
        run = RequestRun(self.node, self._planning, self._queue, self._counters, request, prompt, deadline_at)
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
        """Ends a running request; False if there is no such request here."""
        run = self._runs.get(stream)
        if run is not None:
            run.cancel()
        return run is not None

    @property
    def open_requests(self) -> int:
        return len(self._runs)

    # --- frames of peers (node.serving.stages.TokenSink) and membership's news

    def token(self, token: TokenOut, sender: NodeId) -> bool:
        run = self._runs.get(token.key.stream)
        if run is None:
            self._counters.late_tokens_total += 1
        return run is None or run.token_drawn(token, sender)

    def lost(self, lost: SequenceLost, address: Address | None, sender: NodeId) -> bool:
        run = self._runs.get(lost.key.stream)
        return run is None or run.stage_lost(lost, address, sender)

    def peer_news(self, news: PeerNews) -> None:
        """Passes on that a link to a node broke, or that membership's record of the node changed."""
        for run in self._runs.values():
            run.enqueue_all(news)
