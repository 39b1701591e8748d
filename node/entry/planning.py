"""The entry's door to routing: plans paths over the current view, and keeps the ledger of what was sent where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from mesh.ids import Address, ModelId, NodeId
from mesh.prefix import PREFIX_PAGE_TOKENS
from mesh.versions import holds
from mesh.view import ModelCard, PeerState, View
from node.engine.api import SequenceKey
from node.entry.generation import StageAt, Stages
from routing.breaker import Breakers
from routing.dispatches import Dispatch, Dispatches
from routing.path import ScoredCandidate, plan
from routing.policies import Policy, policy_named
from routing.prefixes import PrefixMemory, prefix_key
from routing.score import RequestWork

DOUBT_S = 5.0  # a node whose link broke gets no part of new paths, if there are others; membership has spoken by then
EXPECTED_OUTPUT_TOKENS = 256  # of an answer that may be longer; until averages per model are kept


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What planning needs to know of a request."""

    model: ModelId
    layers: int
    weights: str  # that compute the request, at every attempt
    known_tokens: int  # prompt, and answer so far: what the new path must prefill
    tokens_to_come: int
    exclude: frozenset[NodeId]  # that have no room for it now, or never
    numerics: str  # the fingerprint of the attempt before: an equal one keeps the promise of equal tokens; empty: any
    policy: str  # empty: the default
    names: Sequence[bytes] = ()  # of the pages of the known tokens (`mesh.prefix`)
    avoid: frozenset[NodeId] = frozenset()  # that were just lost: taken where there is no path without them


@dataclass(frozen=True, slots=True)
class PlannedPath:
    stages: Stages
    numerics: str  # common fingerprint; empty when the stages differ
    cost_ms: float
    candidates: tuple[ScoredCandidate, ...]  # that were considered for its stages
    last_choice: bool = False  # one node takes all of it, and no other could now


class Planning:
    """One for a node: all its requests' own dispatches count against the peers at once."""

    def __init__(self, view: Callable[[], View], now: Callable[[], float], rng: Random) -> None:
        self._view = view
        self._now = now
        self._rng = rng
        self._policies: dict[str, Policy] = {}
        self._dispatches = Dispatches()
        self._breakers = Breakers()
        self._prefixes = PrefixMemory(PREFIX_PAGE_TOKENS)
        self._doubted_until: dict[NodeId, float] = {}
        self._sent: dict[SequenceKey, list[Dispatch]] = {}

    def plan(self, request: PlanRequest) -> PlannedPath:
        """Raises NoPath, naming the layers that no peer holds; BadRequest for an unknown policy."""
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
        stages = tuple(StageAt(stage.node, stage.address, stage.start, stage.end) for stage in path)
        asked = {each.node for each in path.considered}
        alone = len(stages) == len(asked) == 1
        return PlannedPath(stages, path.numerics, round(path.cost_ms, 3), path.considered, last_choice=alone)

    def _doubted(self, now: float) -> frozenset[NodeId]:
        self._doubted_until = {node: until for node, until in self._doubted_until.items() if until > now}
        return frozenset(self._doubted_until)

    def _policy(self, name: str) -> Policy:
        if name not in self._policies:
            self._policies[name] = policy_named(name)
        return self._policies[name]

    def dispatched(self, key: SequenceKey, stages: Stages, prefill_tokens: int) -> None:
        now = self._now()
        self._sent[key] = [self._dispatches.dispatch(stage.node, now, prefill_tokens) for stage in stages]
        for stage in stages:
            self._breakers.dispatched(stage.node, now)

    def opened(self, stages: Stages, names: Sequence[bytes]) -> None:
        """The stages took up a sequence with these pages, and will have them for a while."""
        self._prefixes.sent(names, [stage.node for stage in stages])

    def page_source(self, stage: StageAt, card: ModelCard, names: Sequence[bytes]) -> Address | None:
        """Where more of the prompt's beginning may be than at the stage itself: the node that was sent most of it.

        Only nodes with the same weights are asked; the names of pages depend on them, too (`mesh.prefix`).
        """
        cached, view = self._prefixes.cached_tokens(names), self._view()
        best, most = None, cached.get(stage.node, 0)
        for peer in sorted(view.live(), key=lambda peer: peer.id):
            spans = [span for span in peer.facts.spans if span.model == card.id]
            has_it = holds(peer, card) and any(span.start <= stage.start and stage.end <= span.end for span in spans)
            if cached.get(peer.id, 0) > most and has_it and not peer.stalled and peer.state is PeerState.ALIVE:
                best, most = peer.address, cached[peer.id]
        return best

    def finished(self, key: SequenceKey, *, ok: bool, lost: NodeId | None = None) -> None:
        """The attempt ended: well, by the fault of `lost`, or (neither) by no node's."""
        now = self._now()
        for sent in self._sent.pop(key, []):
            at_fault = sent.node == lost
            self._dispatches.done(sent, now, ok=False if at_fault else (True if ok else None))
            if at_fault:
                self._breakers.failed(sent.node, now)
            elif ok:
                self._breakers.succeeded(sent.node)
            else:
                self._breakers.given_up(sent.node)

    def link_lost(self, node: NodeId) -> None:
        """A link to the node broke: no request need find out for itself, before membership does, that it is dead."""
        self._doubted_until[node] = self._now() + DOUBT_S

    def forget(self, node: NodeId) -> None:
        """The node died, left or restarted: its past says nothing of its next life."""
        self._doubted_until.pop(node, None)
        self._dispatches.forget(node)
        self._prefixes.forget(node)
        self._breakers.restarted(node)
