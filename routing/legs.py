"""The search for a split path: which peer takes which layers, when no single one takes them all.

Costs are milliseconds and affine in the number of layers, so the cheapest way from a layer boundary to the end is a
dynamic programme over the boundaries. Its minimum is not simply taken: every entry would take the same one, on load
that is a second old. Instead the walk goes stage by stage. What does not change within seconds (compute, hops,
distance) filters the options to those near the best; among these the routing policy chooses by load, by default the
better of two drawn at random. In simulation that stretches requests 1.4 times where the global minimum stretches
them 2.1 times, and 5 times when load is five seconds old.

A path visits a node at most once: an engine knows a sequence by its attempt, not by the layers it came for.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mesh.ids import NodeId
from routing.holders import SpanHolder
from routing.policies import PeerCandidate, Policy
from routing.score import RequestWork

if TYPE_CHECKING:
    from random import Random

NEAR_FACTOR = 2.0
NEAR_MS = 5.0
"""An option is near the best while the unloaded rest of its path costs at most twice the best one's, plus 5 ms."""

MAX_EXPANSIONS = 20_000
"""Bound on the walk's backtracking. It is only ever needed where nodes hold several spans that others do not."""


@dataclass(frozen=True, slots=True)
class CandidateStage:
    """One stage of a path under consideration."""

    holder: SpanHolder
    start: int
    end: int
    idle_ms: float  # this stage and the cheapest rest, if nothing else ran
    loaded_ms: float  # the same with the load as it probably is
    onward_ms: float  # the rest alone, loaded


@dataclass(frozen=True, slots=True)
class StageRate:
    """A holder's cost of a stage: `fixed + layers * per_layer`, ms; unloaded and loaded."""

    idle_fixed_ms: float
    idle_per_layer_ms: float
    fixed_ms: float
    per_layer_ms: float

    def idle(self, layers: int) -> float:
        return self.idle_fixed_ms + layers * self.idle_per_layer_ms

    def loaded(self, layers: int) -> float:
        return self.fixed_ms + layers * self.per_layer_ms


Weigh = Callable[[CandidateStage], PeerCandidate]
"""A leg as a candidate of the routing policy."""


class PathSearch:
    """One search over one set of holders. `walk` may be called once; it draws from `rng` and moves the policy's counters."""

    def __init__(
        self,
        found: Sequence[SpanHolder],
        layers: int,
        rates: dict[NodeId, StageRate],
        weigh: Weigh,
        policy: Policy,
        work: RequestWork,
        rng: Random,
    ) -> None:
        self._found = found
        self._layers = layers
        self._rates = rates
        self._weigh = weigh
        self._policy = policy
        self._work = work
        self._rng = rng
        ends = {end for holder in found for _, end in holder.spans}
        starts = {start for holder in found for start, _ in holder.spans}
        self._boundaries = sorted({0, layers} | starts | ends)
        self._last_end = {holder.node: max(end for _, end in holder.spans) for holder in found}
        self._idle_to_go, self._loaded_to_go = self._costs_to_go()
        self._dead: set[tuple[int, frozenset[NodeId]]] = set()
        self._expansions = 0
        self.furthest = 0  # the layer up to which some path came
        self.ranked: list[list[PeerCandidate]] = []  # of each stage of the path, what the policy ranked

    def walk(self) -> list[CandidateStage] | None:
        """Stages that cover all layers, each node once; None: there are none (see `furthest`)."""
        return self._walk(0, frozenset())

    def _walk(self, layer: int, used: frozenset[NodeId]) -> list[CandidateStage] | None:
        self.furthest = max(self.furthest, layer)
        if layer == self._layers:
            return []
        # Of the nodes used, only those that hold layers further on can make a difference from here.
        state = (layer, frozenset(node for node in used if self._last_end[node] > layer))
        if state in self._dead or self._expansions >= MAX_EXPANSIONS:
            return None
        self._expansions += 1
        depth = len(self.ranked)
        self.ranked.append([])
        for leg in self._options(layer, used, depth):
            rest = self._walk(leg.end, used | {leg.holder.node})
            if rest is not None:
                return [leg, *rest]
            del self.ranked[depth + 1 :]
        del self.ranked[depth:]
        self._dead.add(state)
        return None

    def _options(self, layer: int, used: frozenset[NodeId], depth: int) -> Iterator[CandidateStage]:
        """What the policy ranks first; after it, only in case that leads nowhere, everything else by cost."""
        legs = [leg for leg in self._legs(layer) if leg.holder.node not in used]
        if not legs:
            return
        limit_ms = NEAR_FACTOR * min(leg.idle_ms for leg in legs) + NEAR_MS
        best: dict[NodeId, CandidateStage] = {}
        for leg in legs:
            rival = best.get(leg.holder.node)
            if leg.idle_ms <= limit_ms and (rival is None or (leg.loaded_ms, -leg.end) < (rival.loaded_ms, -rival.end)):
                best[leg.holder.node] = leg
        candidates = [self._weigh(leg) for leg in best.values()]
        ranked = self._policy.pick(candidates, self._work, self._rng)
        self.ranked[depth] = ranked
        yield from (best[candidate.node] for candidate in ranked)
        tried = {id(leg) for leg in best.values()}
        yield from sorted((leg for leg in legs if id(leg) not in tried), key=lambda leg: leg.loaded_ms)

    def _legs(self, layer: int) -> Iterator[CandidateStage]:
        """All stages that begin at `layer` and from whose end some way leads on."""
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
        """Least cost from each boundary to the last layer, unloaded and loaded; infinite where no way leads on.

        Nodes may repeat in these sums: they are a guide, the walk sees to the rest.
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
