"""Plans the path of a request: ordered stages, each a peer and some of its layers, that cover the whole model.

Rules, in this order. One set of weights over the whole path, and over all attempts of a request. No draining and no excluded
peers. Suspect or stalled peers and those with an open breaker only if there is no path without them; overloaded ones only if
there is none without those either. One numerics fingerprint over the whole path, the wanted one if an earlier attempt fixed it:
only then does another attempt give the same tokens (a wanted fingerprint is kept even at the price of a suspect peer). A single
peer that holds the whole model before any split path: no hop is cheaper than none. Then cost.

A split path is found by `PathSearch`. Costs are milliseconds and affine in the number of layers, so the cheapest way from a layer
boundary to the end is a dynamic programme over the boundaries. Its minimum is not simply taken: every entry would take the same
path, on load that is a second old. Instead the search goes stage by stage. What does not change within seconds (compute, hops,
distance) filters the options to those near the best; among these the routing policy chooses by load, by default the better of
two drawn at random. In simulation that stretches requests 1.4 times where the global minimum stretches them 2.1 times, and
5 times when load is five seconds old. A path visits a node at most once: an engine identifies a sequence by its attempt, not
by the layers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from mesh.ids import Address, ModelId, NodeId
from mesh.view import Peer, View
from routing.dispatches import NOTHING, Dispatches
from routing.holders import SpanHolder, gaps, holders, is_suspect
from routing.loading import no_path
from routing.policies import PeerCandidate, Policy
from routing.score import DEFAULT_RESIDENCY_S, RequestWork, ScoreTerms, costs, pool_of, terms

if TYPE_CHECKING:
    from random import Random

LAST_RESORT_MS = 10_000.0
"""Added to the cost of a suspect or avoided peer where no path exists without it: as much as for a peer without memory."""

NEAR_FACTOR = 2.0
NEAR_MS = 5.0
"""An option is near the best if, unloaded, it and the rest of its path cost at most twice the best option's cost plus 5 ms."""

MAX_EXPANSIONS = 20_000
"""Bound on the search's backtracking, which occurs only where nodes hold several spans that others do not."""

EXPLAINED_PER_STAGE = 4
"""Ranked candidates that a path remembers for `explain`, per stage."""


@dataclass(frozen=True, slots=True)
class PathStage:
    """One peer's part: layers `[start, end)`."""

    node: NodeId
    address: Address
    start: int
    end: int


PathStages = tuple[PathStage, ...]
"""In order, covering all layers."""


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

    stages: PathStages
    numerics: str  # the fingerprint all stages share; empty if they differ or are not published
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
    """Layers of `model` that no peer can take new work for, being live and not draining. Empty: the model is covered.

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
    excluded: nodes not to use (they refused or failed this request). avoided: nodes to use only if no path exists without them
    (their breaker is open, or a link to them broke).
    numerics: the fingerprint of an earlier attempt; a path of another one has a different `Path.numerics`.

    Raises:
        NoPath: the remaining peers do not cover the model; names the layers. ModelLoading if some peer loads them now.
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
    # Every layer is held, but any path would have to visit some node twice.
    raise no_path(view, model, ((planner.furthest, layers),), weights)


def _tiers(found: list[SpanHolder], last_resort: frozenset[NodeId], numerics: str) -> Iterator[list[list[SpanHolder]]]:
    """Yields sets of holders to try one after another; each is a list of groups, of which the cheapest path is taken."""
    healthy = [holder for holder in found if holder.node not in last_resort]
    free = [holder for holder in healthy if not holder.peer.overloaded]
    preferred = [free, healthy] if len(free) < len(healthy) else [free]
    fallback = [found] if len(healthy) < len(found) else []
    if numerics:  # an equal fingerprint goes before all else: the client was promised equal tokens
        for base in (*preferred, *fallback):
            yield [[holder for holder in base if holder.numerics == numerics]]
    # A queue at an overloaded peer is better than mixed numerics, and mixed numerics are better than a suspect peer.
    for tier in (preferred, fallback):
        by_numerics = [_by_numerics(base) for base in tier]
        yield from by_numerics
        for groups in by_numerics:
            if len(groups) > 1:
                yield [[holder for group in groups for holder in group]]


def _by_numerics(holders: list[SpanHolder]) -> list[list[SpanHolder]]:
    groups: dict[str, list[SpanHolder]] = {}
    for holder in holders:
        groups.setdefault(holder.numerics, []).append(holder)
    return list(groups.values())


class _Planner:
    """Costs and paths of one `plan`, for whichever holders are tried."""

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
        """The path of least cost over the groups, a single whole replica first; None if no group covers the model."""
        whole = [holder for group in groups for holder in group if holder.reach(0) >= self._layers]
        with_memory = [holder for holder in whole if not self._price(holder, self._layers, solo=True).memory]
        if with_memory:
            return self._solo(with_memory)
        split = [path for group in groups if not gaps(group, self._layers) and (path := self._split(group)) is not None]
        if split:
            return min(split, key=lambda path: path.cost_ms)
        return self._solo(whole) if whole else None

    def _solo(self, whole: Sequence[SpanHolder]) -> Path:
        options = {holder.node: CandidateStage(holder, 0, self._layers, 0.0, 0.0, 0.0) for holder in whole}
        candidates = [self._candidate(option, solo=True) for option in options.values()]
        ranked = self._policy.pick(candidates, self._work, self._rng)
        return self._path([options[ranked[0].node]], [ranked], solo=True)

    def _split(self, group: list[SpanHolder]) -> Path | None:
        for holder in group:
            if holder.node not in self._rates:
                self._rates[holder.node] = self._rate(holder)
        search = PathSearch(
            group,
            self._layers,
            self._rates,
            lambda option: self._candidate(option, solo=False),
            self._policy,
            self._work,
            self._rng,
        )
        options = search.search()
        self.furthest = max(self.furthest, search.furthest)
        return self._path(options, search.ranked, solo=False) if options is not None else None

    def _candidate(self, option: CandidateStage, *, solo: bool) -> PeerCandidate:
        peer, own = option.holder.peer, self._own[option.holder.node]
        return PeerCandidate(
            node=peer.id,
            price=lambda: self._price(option.holder, option.end - option.start, solo=solo),
            load=peer.load.running + peer.load.waiting + own.added,
            in_flight=own.in_flight,
            response_ms=own.response_ms,
            onward_ms=option.onward_ms,
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
        """The cost of a stage as a line through the costs of zero layers and of one; loaded and idle."""
        penalty_ms = LAST_RESORT_MS if holder.node in self.last_resort else 0.0
        fixed_ms, one_ms = (self._price(holder, layers, solo=False).total for layers in (0, 1))
        idle_fixed_ms, idle_one_ms = (self._price(holder, layers, solo=False, idle=True).total for layers in (0, 1))
        return StageRate(
            idle_fixed_ms=idle_fixed_ms + penalty_ms,
            idle_per_layer_ms=idle_one_ms - idle_fixed_ms,
            fixed_ms=fixed_ms + penalty_ms,
            per_layer_ms=one_ms - fixed_ms,
        )

    def _path(self, options: Sequence[CandidateStage], ranked: Sequence[Sequence[PeerCandidate]], *, solo: bool) -> Path:
        assert options[0].start == 0 and options[-1].end == self._layers, "a path covers all layers"
        priced = [self._price(option.holder, option.end - option.start, solo=solo) for option in options]
        fingerprints = {option.holder.numerics for option in options}
        considered = [
            ScoredCandidate(stage, rank, candidate.node, terms(candidate.costs))
            for stage, candidates in enumerate(ranked)
            for rank, candidate in enumerate(candidates[:EXPLAINED_PER_STAGE])
        ]
        return Path(
            stages=tuple(
                PathStage(option.holder.node, option.holder.peer.address, option.start, option.end) for option in options
            ),
            numerics=fingerprints.pop() if len(fingerprints) == 1 else "",
            cost_ms=sum(each.total for each in priced),
            wait_ms=sum(each.queue for each in priced),
            considered=tuple(considered),
        )


def _at_rest(peer: Peer) -> Peer:
    load = msgspec.structs.replace(peer.load, running=0, waiting=0, kv_blocks_used=0, prefill_tokens_queued=0)
    return replace(peer, load=load)


@dataclass(frozen=True, slots=True)
class CandidateStage:
    """One stage of a path under consideration."""

    holder: SpanHolder
    start: int
    end: int
    idle_ms: float  # this stage and the cheapest rest, if nothing else ran
    loaded_ms: float  # the same with the estimated load
    onward_ms: float  # the rest of the path alone, loaded


@dataclass(frozen=True, slots=True)
class StageRate:
    """A holder's cost of a stage in ms, `fixed + layers * per_layer`; idle and loaded."""

    idle_fixed_ms: float
    idle_per_layer_ms: float
    fixed_ms: float
    per_layer_ms: float

    def idle(self, layers: int) -> float:
        return self.idle_fixed_ms + layers * self.idle_per_layer_ms

    def loaded(self, layers: int) -> float:
        return self.fixed_ms + layers * self.per_layer_ms


class PathSearch:
    """One search for a split path over one set of holders.

    `search` may be called once, as it draws from `rng` and advances the policy's counters.
    """

    def __init__(
        self,
        found: Sequence[SpanHolder],
        layers: int,
        rates: dict[NodeId, StageRate],
        as_candidate: Callable[[CandidateStage], PeerCandidate],
        policy: Policy,
        work: RequestWork,
        rng: Random,
    ) -> None:
        self._found = found
        self._layers = layers
        self._rates = rates
        self._as_candidate = as_candidate
        self._policy = policy
        self._work = work
        self._rng = rng
        ends = {end for holder in found for _, end in holder.spans}
        starts = {start for holder in found for start, _ in holder.spans}
        self._boundaries = sorted({0, layers} | starts | ends)
        self._last_end = {holder.node: max(end for _, end in holder.spans) for holder in found}
        self._idle_to_go, self._loaded_to_go = self._costs_to_go()
        self._dead_ends: set[tuple[int, frozenset[NodeId]]] = set()
        self._expansions = 0
        self.furthest = 0  # the layer up to which some partial path came
        self.ranked: list[list[PeerCandidate]] = []  # for each stage of the path, its candidates as the policy ranked them

    def search(self) -> list[CandidateStage] | None:
        """Stages that cover all layers, each node once; None if there are none (see `furthest`)."""
        return self._extend(0, frozenset())

    def _extend(self, layer: int, used: frozenset[NodeId]) -> list[CandidateStage] | None:
        """Stages from `layer` to the end without the `used` nodes; None if there are none."""
        self.furthest = max(self.furthest, layer)
        if layer == self._layers:
            return []
        # Of the used nodes, only those with layers behind this one can make a difference from here on.
        state = (layer, frozenset(node for node in used if self._last_end[node] > layer))
        if state in self._dead_ends or self._expansions >= MAX_EXPANSIONS:
            return None
        self._expansions += 1
        depth = len(self.ranked)
        self.ranked.append([])
        for option in self._options(layer, used, depth):
            rest = self._extend(option.end, used | {option.holder.node})
            if rest is not None:
                return [option, *rest]
            del self.ranked[depth + 1 :]
        del self.ranked[depth:]
        self._dead_ends.add(state)
        return None

    def _options(self, layer: int, used: frozenset[NodeId], depth: int) -> Iterator[CandidateStage]:
        """Yields the options near the best as the policy ranks them, then, in case those lead nowhere, all others by cost."""
        options = [option for option in self._stage_options(layer) if option.holder.node not in used]
        if not options:
            return
        limit_ms = NEAR_FACTOR * min(option.idle_ms for option in options) + NEAR_MS
        best: dict[NodeId, CandidateStage] = {}
        for option in options:
            rival = best.get(option.holder.node)
            if option.idle_ms <= limit_ms and (rival is None or (option.loaded_ms, -option.end) < (rival.loaded_ms, -rival.end)):
                best[option.holder.node] = option
        candidates = [self._as_candidate(option) for option in best.values()]
        ranked = self._policy.pick(candidates, self._work, self._rng)
        self.ranked[depth] = ranked
        yield from (best[candidate.node] for candidate in ranked)
        tried = {id(option) for option in best.values()}
        yield from sorted((option for option in options if id(option) not in tried), key=lambda option: option.loaded_ms)

    def _stage_options(self, layer: int) -> Iterator[CandidateStage]:
        """Yields all stages that begin at `layer` and from whose end some holder continues."""
        for holder in self._found:
            rate = self._rates[holder.node]
            for end in self._ends(layer, holder):
                if self._idle_to_go[end] < math.inf:
                    count = end - layer
                    onward_ms = self._loaded_to_go[end]
                    yield CandidateStage(
                        holder,
                        layer,
                        end,
                        rate.idle(count) + self._idle_to_go[end],
                        rate.loaded(count) + onward_ms,
                        onward_ms,
                    )

    def _ends(self, layer: int, holder: SpanHolder) -> list[int]:
        """Boundaries at which a stage of `holder` that begins at `layer` may end."""
        first = bisect_right(self._boundaries, layer)
        return self._boundaries[first : bisect_right(self._boundaries, holder.reach(layer))]

    def _costs_to_go(self) -> tuple[dict[int, float], dict[int, float]]:
        """Least cost from each boundary to the last layer, idle and loaded; infinite where no holder continues.

        Lower bounds: a node may occur twice in such a sum. `_extend` sees to it that none does in a path.
        """
        idle = dict.fromkeys(self._boundaries, math.inf)
        loaded = dict(idle)
        idle[self._layers] = loaded[self._layers] = 0.0
        for layer in reversed(self._boundaries[:-1]):
            for holder in self._found:
                rate = self._rates[holder.node]
                for end in self._ends(layer, holder):
                    idle[layer] = min(idle[layer], rate.idle(end - layer) + idle[end])
                    loaded[layer] = min(loaded[layer], rate.loaded(end - layer) + loaded[end])
        return idle, loaded
