"""One request at the entry: the cores of its choices, their texts, and the channel to its client.

One task drives it: events go into the cores, and their effects are carried out with no `await` in between. What takes time
(opening a path) is a task of its own whose outcome comes back as an event. The text of a choice is a pure function of its tokens.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from random import Random

import structlog
import trio

from mesh.errors import BadRequest, DeadlineExceeded, MeshError, PeerLost, Refused
from mesh.ids import Address, NodeId
from mesh.prefix import PREFIX_PAGE_TOKENS, further_names, prefix_salt
from mesh.view import is_exact
from mesh.wire.calls import Call, Post
from node.engine.api import OpenSequence, Prefix, SequenceKey, SequenceLost, TokenOut
from node.entry.generation import (
    Cancelled,
    ClosePath,
    DoubtPeers,
    Effect,
    EmitToken,
    Event,
    Fail,
    Generation,
    GenerationPhase,
    NoPathFound,
    Opened,
    OpenPath,
    OpenRefused,
    PathPlanned,
    PlanPath,
    StageLost,
    Stages,
    StopFound,
    TokenDrawn,
)
from node.entry.planning import PlannedPath, Planning, PlanRequest
from node.entry.prompts import Prompt
from node.entry.recent import RequestRecord
from node.reports import CandidateReport, PlanReport, StageReport
from node.requests import ChoiceDone, Finished, GenerateEvent, GenerateRequest, StageUse, Started, TextDelta, TokenLogprob
from node.serving.stages import OpenStage, open_path
from node.text.detokenize import Decode, TextState

CONTEXT_TOKENS = 4  # of the prompt: whether the answer's first word begins with a space may depend on them


@dataclass(frozen=True, slots=True)
class ChoiceStep:
    """What one token brings out. With `finish_reason` the choice is over; `end_token_ids` are last and brought no text."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None = None
    end_token_ids: tuple[int, ...] = ()


class ChoiceText:
    def __init__(self, decode: Decode, request: GenerateRequest, prompt: Sequence[int], end_tokens: Sequence[int]) -> None:
        self.whole = ""
        self._decode = decode
        self._wants_logprobs = request.sampling.logprobs is not None
        self._held: deque[TokenLogprob] = deque()  # of tokens whose text is not out yet
        self._state = TextState(
            decode,
            request.stop,
            request.include_stop,
            end_tokens=end_tokens,
            context=prompt[-CONTEXT_TOKENS:],
            min_tokens=request.sampling.min_tokens,
        )

    def feed(self, emit: EmitToken) -> ChoiceStep:
        """The next token; never called again after an outcome with a finish reason."""
        if self._wants_logprobs:
            self._held.append(self._logprob(emit))
        step = self._state.feed([emit.token])
        if emit.finish is None and not step.stopped:
            return self._outcome(step.text, step.token_ids, None, ())
        end = self._state.finish(emit.finish or "stop")
        return self._outcome(step.text + end.text, step.token_ids + end.token_ids, end.finish_reason, end.end_token_ids)

    def _outcome(self, text: str, token_ids: tuple[int, ...], reason: str | None, end_token_ids: tuple[int, ...]) -> ChoiceStep:
        self.whole += text
        counted = min(len(token_ids), len(self._held))
        logprobs = tuple(self._held.popleft() for _ in range(counted))
        return ChoiceStep(text, token_ids, logprobs, reason, end_token_ids)

    def _logprob(self, emit: EmitToken) -> TokenLogprob:
        top = tuple((token, self._decode([token]), logprob) for token, logprob in emit.top)
        return TokenLogprob(emit.token, self._decode([emit.token]), emit.logprob or 0.0, top)


OPEN_TIMEOUT_S = 5.0  # a peer that does not answer an open in this time is avoided

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class EntryNode:
    """Where the entry stands in the mesh."""

    id: NodeId
    address: Address
    call: Call
    post: Post
    doubt: Callable[[NodeId], None] = lambda node: None  # has membership look at a peer now
    prefix_secret: Callable[[], bytes] = bytes  # keys the names of prompt beginnings; the same on all nodes of the mesh


@dataclass(slots=True)
class EntryCounters:
    """Since the start; `speaking` as of now: requests of which a token has come."""

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
    """Made by `node.entry.entry`; `drive` runs in a task of the entry's, `events` in the client's."""

    def __init__(
        self,
        node: EntryNode,
        planning: Planning,
        counters: EntryCounters,
        request: GenerateRequest,
        prompt: Prompt,
        deadline_at: float,
        rng: Random,
    ) -> None:
        self.request = request
        self.record = RequestRecord(request.id, request.request_id, node.id)
        self._node = node
        self._planning = planning
        self._counters = counters
        self._prompt = prompt
        self._cores = {choice: Generation(len(prompt.tokens), deadline_at, rng) for choice in range(request.n)}
        ends = prompt.sampling.stop_token_ids
        self._texts = {choice: ChoiceText(prompt.decode, request, prompt.tokens, ends) for choice in self._cores}
        self.record.generations = self._cores
        self._inbox: deque[tuple[int, Event]] = deque()  # bounded by the choices' max_tokens: positions are numbered
        self._woken = trio.Event()
        self._opening: dict[int, trio.CancelScope] = {}
        self._numerics: set[str] = set()
        self._salt = prefix_salt(node.prefix_secret(), request.tenant, prompt.model.card.weights)
        self._planned: dict[int, PlannedPath] = {}
        self._names: dict[int, list[bytes]] = {choice: [] for choice in self._cores}
        self._cached_tokens = 0
        self._speaks = False
        # The reader may be slower than the mesh; what waits for it is bounded by the request's own max_tokens.
        self._events_in, self._events_out = trio.open_memory_channel[GenerateEvent | MeshError](math.inf)

    # --- the client's side

    async def events(self) -> AsyncGenerator[GenerateEvent, None]:
        async for event in self._events_out:
            if isinstance(event, MeshError):
                raise event
            yield event

    def cancel(self) -> None:
        self.tell_all(Cancelled())

    # --- the mesh's side

    def tell(self, choice: int, event: Event) -> None:
        if choice in self._cores:
            self._inbox.append((choice, event))
            self._woken.set()

    def tell_all(self, event: Event) -> None:
        for choice in self._cores:
            self.tell(choice, event)

    def _path_of(self, key: SequenceKey) -> Stages:
        """Empty for an attempt that is not, or no longer, the one that runs: what is said of it changes nothing."""
        core = self._cores.get(key.choice)
        return core.path if core is not None and core.attempt == key.attempt else ()

    def token_drawn(self, token: TokenOut, sender: NodeId) -> bool:
        """False: tokens of this path are not for `sender` to draw."""
        key = token.key
        if not (path := self._path_of(key)):
            self._counters.late_tokens_total += 1
            return True
        if path[-1].node != sender:
            return False
        if key.choice == 0 and key.attempt == 1:  # of several choices and attempts the first one counts
            self._cached_tokens = min(token.cached, len(self._prompt.tokens))
        self.tell(key.choice, TokenDrawn(key.attempt, token.position, token.token, token.finish, token.logprob, token.top))
        return True

    def stage_lost(self, lost: SequenceLost, address: Address | None, sender: NodeId) -> bool:
        """A stage at `address` is to blame; None: it is not known which. False: `sender` is no stage of this path."""
        choice, path = lost.key.choice, self._path_of(lost.key)
        if not path:
            return True
        if sender not in {stage.node for stage in path}:
            return False
        node = next((stage.node for stage in path if stage.address == address), None)
        fault = None if lost.retryable else BadRequest(lost.reason)
        self.tell(choice, StageLost(lost.key.attempt, node, lost.reason, lost.retryable, fault))
        return True

    async def drive(self) -> None:
        """Until every choice has ended."""
        prompt = self._prompt
        self._send(Started(prompt.name, prompt.seed, len(prompt.tokens), prompt.tool_style))
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

    def _carry_out(self, choice: int, effects: list[Effect], open_nursery: trio.Nursery) -> None:
        for effect in effects:
            match effect:
                case PlanPath():
                    self._plan(choice, effect)
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
                    self._fail(error)

    def _plan(self, choice: int, plan: PlanPath) -> None:
        card, core = self._prompt.model.card, self._cores[choice]
        request = PlanRequest(
            model=card.id,
            layers=card.layers,
            weights=card.weights,
            known_tokens=self._known_tokens(choice),
            tokens_to_come=self._prompt.sampling.max_tokens - len(core.tokens),
            exclude=plan.exclude,
            numerics=next(iter(self._numerics)) if len(self._numerics) == 1 else "",
            policy=self.request.policy,
            names=self._names_of(choice),
        )
        try:
            planned = self._planning.plan(request)
        except MeshError as error:
            self.tell(choice, NoPathFound(plan.attempt, error))
            return
        self._numerics.add(planned.numerics)
        self._planned[choice] = planned
        self.record.why.append(_plan_report(choice, plan.attempt, card.weights, planned))
        self.tell(choice, PathPlanned(plan.attempt, planned.stages))

    async def _open(self, choice: int, effect: OpenPath, scope: trio.CancelScope) -> None:
        stages = [(stage.address, self._open_stage(choice, effect, index)) for index, stage in enumerate(effect.path)]
        with scope:
            failure = await open_path(self._node.call, stages, timeout_s=OPEN_TIMEOUT_S)
            if failure is None:
                self._planning.opened(effect.path, self._names[choice])
                self.tell(choice, Opened(effect.attempt))
                return
            node = next(stage.node for stage in effect.path if stage.address == failure.address)
            match failure.error:
                case (Refused() | BadRequest()) as error:
                    self._counters.opens_refused_total += 1
                    self._post_close(choice, effect.attempt, effect.path)
                    self._planning.finished(self._key(choice, effect.attempt), ok=False)
                    retry_after_s, fault = (error.retry_after_s, None) if isinstance(error, Refused) else (0.0, error)
                    self.tell(choice, OpenRefused(effect.attempt, node, retry_after_s, fault))
                case PeerLost() | DeadlineExceeded() as error:
                    self.tell(choice, StageLost(effect.attempt, node, f"{node}: {error}", unreachable=True))
                case error:
                    self.tell(choice, StageLost(effect.attempt, node, str(error)))

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
        """Of all whole pages of the tokens known so far."""
        names = self._names[choice]
        names += further_names(self._salt, names, (*self._prompt.tokens, *self._cores[choice].tokens))
        return names

    def _prefix(self, choice: int, known: int) -> Prefix | None:
        """Pages are used and kept where all stages compute exactly and alike: then they hold what would be computed."""
        numerics = self._planned[choice].numerics
        if not is_exact(numerics):
            return None
        return Prefix(self._salt, tuple(self._names_of(choice)[: known // PREFIX_PAGE_TOKENS]), numerics)

    def _close(self, choice: int, effect: ClosePath) -> None:
        scope = self._opening.pop(choice, None)
        if scope is not None:
            scope.cancel()
        core = self._cores[choice]
        self._planning.finished(self._key(choice, effect.attempt), ok=core.phase is GenerationPhase.DONE, lost=effect.lost)
        if not core.ended:
            self._counters.attempts_lost_total += 1
            log.info("attempt.lost", stream=self.request.id, attempt=effect.attempt, reason=core.history[-1])
        self._post_close(choice, effect.attempt, effect.path)

    def _post_close(self, choice: int, attempt: int, path: Stages) -> None:
        key = self._key(choice, attempt)
        for address in {stage.address for stage in path}:
            try:
                self._node.post(address, "stage.close", {"keys": [list(key)]})
            except PeerLost:
                pass  # a lost peer frees it by itself: its entry is gone for it too, or its sweep finds it

    def _key(self, choice: int, attempt: int) -> SequenceKey:
        return SequenceKey(self.request.id, choice, attempt)

    def _known_tokens(self, choice: int) -> int:
        return len(self._prompt.tokens) + len(self._cores[choice].tokens)

    # --- tokens to events

    def _send(self, event: GenerateEvent | MeshError) -> None:
        self._events_in.send_nowait(event)

    def _on_token(self, choice: int, emit: EmitToken) -> None:
        if not self._speaks:
            self._speaks = True
            self._counters.speaking += 1
        self._counters.tokens_total += 1
        out = self._texts[choice].feed(emit)
        if out.text or out.token_ids:
            self.record.seq += len(out.token_ids)
            self._send(TextDelta(choice, out.text, out.token_ids, self.record.seq, out.logprobs))
        if out.finish_reason is not None:
            self.record.seq += len(out.end_token_ids)
            self._send(ChoiceDone(choice, out.finish_reason, self.record.seq, out.end_token_ids))
            # Before the tokens that may wait behind this one; changes nothing where the engine ended it.
            self._inbox.appendleft((choice, StopFound()))

    def _fail(self, error: MeshError) -> None:
        self._send(error)
        self.tell_all(Cancelled())

    def _finish(self) -> None:
        self._counters.speaking -= self._speaks
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
            numerics="exact" if self._is_exact() else "approximate",
            attempts=self.record.attempts,
            path=tuple(StageUse(stage.node, stage.start, stage.end) for stage in self.record.last_paths.get(0, ())),
            retrieval=self._prompt.retrieval_report([text.whole for text in self._texts.values()]),
            cached_tokens=self._cached_tokens,
        )

    def _is_exact(self) -> bool:
        """All paths of all attempts computed with one set of exact kernels."""
        return len(self._numerics) == 1 and all(map(is_exact, self._numerics))


def _plan_report(choice: int, attempt: int, weights: str, planned: PlannedPath) -> PlanReport:
    return PlanReport(
        choice=choice,
        attempt=attempt,
        weights=weights,
        path=[StageReport(stage.node, stage.start, stage.end) for stage in planned.stages],
        cost_ms=planned.cost_ms,
        candidates=[CandidateReport(each.stage, each.rank, each.node, each.terms_ms) for each in planned.candidates],
    )
