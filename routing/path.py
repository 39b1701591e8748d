"""Plans the path of a request: ordered stages, each a peer and some of its layers, that cover the whole model.

Rules, in this order. One set of weights over the whole path, and over all attempts of a request. No draining and no excluded
peers. Suspect or stalled peers and those with an open breaker only if there is no path without them; overloaded ones only if
there is none without those either. One numerics fingerprint over the whole path, the wanted one if an earlier attempt fixed it:
only then does another attempt give the same tokens (a wanted fingerprint is kept even at the price of a suspect peer). A single
peer that holds the whole model before any split path: no hop is cheaper than none. Then cost (`routing.legs`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from mesh.ids import Address, ModelId, NodeId
from mesh.view import Peer, View
from routing.dispatches import NOTHING, Dispatches
from routing.holders import SpanHolder, gaps, holders, is_suspect
from routing.legs import CandidateStage, PathSearch, StageRate
from routing.loading import no_path
from routing.policies import PeerCandidate, Policy
from routing.score import DEFAULT_RESIDENCY_S, RequestWork, ScoreTerms, costs, pool_of, terms

if TYPE_CHECKING:
    from random import Random

LAST_RESORT_MS = 10_000.0
"""Charged for a suspect or avoided peer, when it must be considered at all: as much as for one without memory."""

EXPLAINED_PER_STAGE = 4
"""Ranked candidates that a path remembers for `explain`, per stage."""


@dataclass(frozen=True, slots=True)
class PathStage:
    """One peer's part: layers `[start, end)`."""

    node: NodeId
    address: Address
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ScoredCandidate:
    """A candidate that was ranked for a stage, with the terms of its score in ms, for `mesh why`."""

    stage: int
    rank: int
    node: NodeId
    terms_ms: dict[str, float]


@dataclass(frozen=True, slots=True)
class Path:
    """Stages in order: the first starts at layer 0, each next one where the last ended."""

    stages: tuple[PathStage, ...]
    numerics: str  # the fingerprint all stages share; empty when they differ or have not told
    cost_ms: float  # expected time to completion
    wait_ms: float  # of it, the queues before the first own row is computed: what admission looks at
    considered: tuple[ScoredCandidate, ...] = ()

    def __iter__(self) -> Iterator[PathStage]:
        return iter(self.stages)

    def __len__(self) -> int:
        return len(self.stages)

    @property
    def nodes(self) -> tuple[NodeId, ...]:
        return tuple(stage.node for stage in self.stages)


def uncovered(view: View, model: ModelId, layers: int, weights: str | None = None) -> tuple[tuple[int, int], ...]:
    """Layers of `model` that no peer can take new work for: live and not draining. Empty: the model is covered.

    weights: as of `plan`.
    """
    return gaps(holders(view, model, layers, weights=weights), layers)


def plan(
    view: View,
    model: ModelId,
    layers: int,
    policy: Policy,
    rng: Random,
    now: float,
    *,
    work: RequestWork | None = None,
    dispatches: Dispatches | None = None,
    excluded: frozenset[NodeId] = frozenset(),
    avoided: frozenset[NodeId] = frozenset(),
    numerics: str = "",
    weights: str | None = None,
) -> Path:
    """A path for one attempt of one request.

    weights: of the version that computes the request, on every stage; None for the one that answers to the model's id now.
    excluded: never (they refused or failed this request); avoided: only if nothing else is left (breaker open).
    numerics: the fingerprint of an earlier attempt; a path of another one has a different `Path.numerics`.

    Raises:
        NoPath: the peers that are left do not cover the model; names the layers. ModelLoading, where some load them now.
    """
    found = holders(view, model, layers, excluded, weights)
    missing = gaps(found, layers)
    if missing:
        raise no_path(view, model, missing, weights)
    planner = _Planner(view, model, layers, found, policy, rng, now, work or RequestWork(), dispatches or Dispatches(), avoided)
    for groups in _tiers(found, planner.last_resort, numerics):
        path = planner.best(groups)
        if path is not None:
            return path
    # Every layer is held, but only by way of a node that would have to be visited twice.
    raise no_path(view, model, ((planner.furthest, layers),), weights)


def _tiers(found: list[SpanHolder], last_resort: frozenset[NodeId], numerics: str) -> Iterator[list[list[SpanHolder]]]:
    """Sets of holders to try one after another; each is a list of groups that are alternatives to each other."""
    healthy = [holder for holder in found if holder.node not in last_resort]
    free = [holder for holder in healthy if not holder.peer.overloaded]
    willing = [free, healthy] if len(free) < len(healthy) else [free]
    all_who_are_left = [found] if len(healthy) < len(found) else []
    if numerics:
        for base in (*willing, *all_who_are_left):
            yield [[holder for holder in base if holder.numerics == numerics]]
    for tier in (willing, all_who_are_left):  # to wait is better than to mix numerics, and that than to ask the silent
        alike = [_by_numerics(base) for base in tier]
        yield from alike
        for groups in alike:
            if len(groups) > 1:
                yield [[holder for group in groups for holder in group]]


def _by_numerics(holders: list[SpanHolder]) -> list[list[SpanHolder]]:
    groups: dict[str, list[SpanHolder]] = {}
    for holder in holders:
        groups.setdefault(holder.numerics, []).append(holder)
    return list(groups.values())


class _Planner:
    """What does not change between the tiers of one `plan`."""

    def __init__(
        self,
        view: View,
        model: ModelId,
        layers: int,
        found: list[SpanHolder],
        policy: Policy,
        rng: Random,
        now: float,
        work: RequestWork,
        dispatches: Dispatches,
        avoided: frozenset[NodeId],
    ) -> None:
        self._layers = layers
        self._policy = policy
        self._rng = rng
        self._now = now
        self._work = work
        self._me = view.me
        mine = view.peers.get(view.me)
        self._my_region = mine.region if mine is not None else ""
        self._own = {holder.node: dispatches.own(holder.node, holder.peer.load_at) for holder in found}
        self._pool = pool_of((holder.peer for holder in found), model, dispatches.residency_s(DEFAULT_RESIDENCY_S))
        self._idle_pool = replace(self._pool, running=0.0, waiting=0.0, prefill_tokens_queued=0.0, kv_used_share=0.0)
        self._rates: dict[NodeId, StageRate] = {}
        self.last_resort = avoided | {holder.node for holder in found if is_suspect(holder)}
        self.furthest = 0

    def best(self, groups: list[list[SpanHolder]]) -> Path | None:
        """The path of least cost over the groups, a whole replica first; None when no group covers the model."""
        whole = [holder for group in groups for holder in group if holder.reach(0) >= self._layers]
        roomy = [holder for holder in whole if not self._price(holder, self._layers, solo=True).memory]
        if roomy:
            return self._solo(roomy)
        split = [path for group in groups if not gaps(group, self._layers) and (path := self._split(group)) is not None]
        if split:
            return min(split, key=lambda path: path.cost_ms)
        return self._solo(whole) if whole else None

    def _solo(self, whole: Sequence[SpanHolder]) -> Path:
        legs = {holder.node: CandidateStage(holder, 0, self._layers, 0.0, 0.0, 0.0) for holder in whole}
        candidates = [self._candidate(leg, solo=True) for leg in legs.values()]
        ranked = self._policy.pick(candidates, self._work, self._rng)
        return self._path([legs[ranked[0].node]], [ranked], solo=True)

    def _split(self, group: list[SpanHolder]) -> Path | None:
        for holder in group:
            if holder.node not in self._rates:
                self._rates[holder.node] = self._rate(holder)
        search = PathSearch(
            group,
            self._layers,
            self._rates,
            lambda leg: self._candidate(leg, solo=False),
            self._policy,
            self._work,
            self._rng,
        )
        legs = search.walk()
        self.furthest = max(self.furthest, search.furthest)
        return self._path(legs, search.ranked, solo=False) if legs is not None else None

    def _candidate(self, leg: CandidateStage, *, solo: bool) -> PeerCandidate:
        peer, own = leg.holder.peer, self._own[leg.holder.node]
        return PeerCandidate(
            node=peer.id,
            price=lambda: self._price(leg.holder, leg.end - leg.start, solo=solo),
            load=peer.load.running + peer.load.waiting + own.added,
            in_flight=own.in_flight,
            response_ms=own.response_ms,
            onward_ms=leg.onward_ms,
            mine=peer.id == self._me,
        )

    def _price(self, holder: SpanHolder, layers: int, *, solo: bool, idle: bool = False) -> ScoreTerms:
        """The terms of a stage; `idle`: as if nothing ran anywhere and nothing had ever failed."""
        return costs(
            _at_rest(holder.peer) if idle else holder.peer,
            layers,
            holder.held,
            self._work,
            self._idle_pool if idle else self._pool,
            self._now,
            me=self._me,
            my_region=self._my_region,
            own=NOTHING if idle else self._own[holder.node],
            solo=solo,
        )

    def _rate(self, holder: SpanHolder) -> StageRate:
        """The two lines through the costs of no layer and of one."""
        penalty_ms = LAST_RESORT_MS if holder.node in self.last_resort else 0.0
        fixed_ms, one_ms = (self._price(holder, layers, solo=False).total for layers in (0, 1))
        idle_fixed_ms, idle_one_ms = (self._price(holder, layers, solo=False, idle=True).total for layers in (0, 1))
        return StageRate(
            idle_fixed_ms=idle_fixed_ms + penalty_ms,
            idle_per_layer_ms=idle_one_ms - idle_fixed_ms,
            fixed_ms=fixed_ms + penalty_ms,
            per_layer_ms=one_ms - fixed_ms,
        )

    def _path(self, legs: Sequence[CandidateStage], ranked: Sequence[Sequence[PeerCandidate]], *, solo: bool) -> Path:
        priced = [self._price(leg.holder, leg.end - leg.start, solo=solo) for leg in legs]
        fingerprints = {leg.holder.numerics for leg in legs}
        considered = [
            ScoredCandidate(stage, rank, candidate.node, terms(candidate.costs))
            for stage, candidates in enumerate(ranked)
            for rank, candidate in enumerate(candidates[:EXPLAINED_PER_STAGE])
        ]
        return Path(
            stages=tuple(PathStage(leg.holder.node, leg.holder.peer.address, leg.start, leg.end) for leg in legs),
            numerics=fingerprints.pop() if len(fingerprints) == 1 else "",
            cost_ms=sum(each.total for each in priced),
            wait_ms=sum(each.queue for each in priced),
            considered=tuple(considered),
        )


def _at_rest(peer: Peer) -> Peer:
    load = msgspec.structs.replace(peer.load, running=0, waiting=0, kv_blocks_used=0, prefill_tokens_queued=0)
    return replace(peer, load=load)
