"""Plans paths over the current view for the entry's requests, and records what was sent to which peer and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from mesh.ids import Address, ModelId, NodeId
from mesh.prefix import PREFIX_PAGE_TOKENS
from mesh.versions import holds
from mesh.view import ModelCard, PeerState, View
from node.engine.api import SequenceKey
from routing.breaker import Breakers
from routing.dispatches import Dispatch, Dispatches
from routing.holders import gaps, holders
from routing.path import PathStage, PathStages, ScoredCandidate, plan
from routing.policies import Policy, policy_named
from routing.prefixes import PrefixMemory, prefix_key
from routing.score import RequestWork

DOUBT_S = 5.0  # a node whose link broke is avoided for this long, by when membership has decided whether it is dead
EXPECTED_OUTPUT_TOKENS = 256  # upper bound of the answer length that a plan counts with


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a plan depends on beside the view: one attempt of one choice."""

    model: ModelId
    layers: int
    weights: str  # of the version that computes the request, at every attempt
    known_tokens: int  # prompt and answer so far: what the new path must prefill
    tokens_to_come: int
    exclude: frozenset[NodeId]  # nodes without room for it now, and those that can never hold it
    numerics: str  # fingerprint of earlier attempts: only an equal one gives equal tokens; empty: any
    policy: str  # empty: the default
    names: Sequence[bytes] = ()  # of the prefix pages of the known tokens (`mesh.prefix`)
    avoid: frozenset[NodeId] = frozenset()  # nodes that were just lost: used where there is no path without them


@dataclass(frozen=True, slots=True)
class PlannedPath:
    stages: PathStages
    numerics: str  # common fingerprint; empty when the stages differ
    cost_ms: float
    candidates: tuple[ScoredCandidate, ...]  # ranked for its stages
    last_choice: bool = False  # one node computes all layers, and was the only candidate


class Planning:
    """One for a node, so that what it dispatches for any request counts at once in the plans of all."""

    def __init__(self, view: Callable[[], View], now: Callable[[], float], rng: Random) -> None:
        self._view = view
        self._now = now
        self._rng = rng
        self._policies: dict[str, Policy] = {}
        self._dispatches = Dispatches()
        self._breakers = Breakers()
        self._prefixes = PrefixMemory(PREFIX_PAGE_TOKENS)
        self._doubted_until: dict[NodeId, float] = {}
        self._dispatched: dict[SequenceKey, list[Dispatch]] = {}  # by attempt: a dispatch for each stage

    def plan(self, request: PlanRequest) -> PlannedPath:
        """Plans a path. Raises NoPath, naming the layers that no peer holds; BadRequest for an unknown policy."""
        view, now = self._view(), self._now()
        path = plan(
            view,
            request.model,
            request.layers,
            self._policy(request.policy),
            self._rng,
            now,
            work=RequestWork(
                request.known_tokens,
                min(request.tokens_to_come, EXPECTED_OUTPUT_TOKENS),
                prefix_key=prefix_key(request.names),
                cached_tokens=self._prefixes.cached_tokens(request.names),
            ),
            dispatches=self._dispatches,
            excluded=request.exclude,
            avoided=self._breakers.avoided([peer.id for peer in view.live()], now) | self._doubted(now) | request.avoid,
            numerics=request.numerics,
            weights=request.weights,
        )
        candidates = {each.node for each in path.considered}
        is_only = len(path.stages) == len(candidates) == 1
        return PlannedPath(path.stages, path.numerics, round(path.cost_ms, 3), path.considered, last_choice=is_only)

    def covers(self, card: ModelCard, exclude: frozenset[NodeId]) -> bool:
        """Whether live nodes outside `exclude` hold all layers of the model, whatever room they have."""
        return not gaps(holders(self._view(), card.id, card.layers, exclude, card.weights), card.layers)

    def _doubted(self, now: float) -> frozenset[NodeId]:
        self._doubted_until = {node: until for node, until in self._doubted_until.items() if until > now}
        return frozenset(self._doubted_until)

    def _policy(self, name: str) -> Policy:
        if name not in self._policies:
            self._policies[name] = policy_named(name)
        return self._policies[name]

    def dispatched(self, key: SequenceKey, stages: PathStages, prefill_tokens: int) -> None:
        """Counts the attempt against each stage's node, from before its opens are sent until `finished`."""
        now = self._now()
        assert key not in self._dispatched, "each attempt is dispatched once"
        self._dispatched[key] = [self._dispatches.dispatch(stage.node, now, prefill_tokens) for stage in stages]
        for stage in stages:
            self._breakers.dispatched(stage.node, now)

    def opened(self, stages: PathStages, names: Sequence[bytes]) -> None:
        """Records that the stages have opened a sequence with these pages, and so will have them cached for a while."""
        self._prefixes.sent(names, [stage.node for stage in stages])

    def page_source(self, stage: PathStage, card: ModelCard, names: Sequence[bytes]) -> Address | None:
        """The address of the node that was sent most of the prompt's beginning; None if no node was sent more than the stage.

        Only nodes with the same weights count, as pages are named by the weights too (`mesh.prefix`).
        """
        cached, view = self._prefixes.cached_tokens(names), self._view()
        best, most = None, cached.get(stage.node, 0)
        for peer in sorted(view.live(), key=lambda peer: peer.id):
            spans = [span for span in peer.facts.spans if span.model == card.id]
            has_layers = holds(peer, card) and any(span.start <= stage.start and stage.end <= span.end for span in spans)
            if cached.get(peer.id, 0) > most and has_layers and not peer.stalled and peer.state is PeerState.ALIVE:
                best, most = peer.address, cached[peer.id]
        return best

    def finished(self, key: SequenceKey, *, ok: bool, lost: NodeId | None = None) -> None:
        """Records the end of an attempt: completed (`ok`), lost by the node `lost`, or (neither) cancelled or refused."""
        now = self._now()
        for dispatch in self._dispatched.pop(key, []):
            at_fault = dispatch.node == lost
            self._dispatches.done(dispatch, now, ok=False if at_fault else (True if ok else None))
            if at_fault:
                self._breakers.failed(dispatch.node, now)
            elif ok:
                self._breakers.succeeded(dispatch.node)
            else:
                self._breakers.given_up(dispatch.node)

    def link_lost(self, node: NodeId) -> None:
        """Avoids a node whose link broke for `DOUBT_S`: no further request is sent there before membership has decided."""
        self._doubted_until[node] = self._now() + DOUBT_S

    def forget(self, node: NodeId) -> None:
        """Drops all records of a node that died, left or restarted: they do not hold for its next start."""
        self._doubted_until.pop(node, None)
        self._dispatches.forget(node)
        self._prefixes.forget(node)
        self._breakers.restarted(node)
