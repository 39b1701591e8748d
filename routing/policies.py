"""Routing policies: `Policy.pick(candidates, work, rng)` ranks the candidates for a stage, best first.

All policies get the same candidates, after the same filters, refusals and breakers, so that a benchmark compares only the choice.
With load that is a second old, the global minimum of the best score waits three times longer than the better of two drawn at
random, since every entry chooses the same peer. Hence the default policy: the least cost among two drawn at random, this node,
the peer with most of the prompt cached and the prompt's rendezvous home. Measured in `tests/routing/test_herd.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from mesh.errors import BadRequest
from mesh.ids import NodeId
from mesh.rendezvous import owners
from routing.score import RequestWork, ScoreTerms

if TYPE_CHECKING:
    from random import Random

EXPLORE = 0.01
"""Share of picks in random order: the averages of peers that are never chosen would never change."""

BOUND_ON_HOME = 1.25
"""A home is skipped while its load is above this many times the mean, plus one (bounded-load consistent hashing)."""


@dataclass(frozen=True)
class PeerCandidate:
    """One peer that could take the work. `price` is called once, and only by policies that compare costs."""

    node: NodeId
    price: Callable[[], ScoreTerms]
    load: float = 0.0  # sequences running and waiting there, by its load record and own dispatches
    in_flight: int = 0  # own dispatches running there
    response_ms: float = 0.0  # average of own dispatches there; 0: none yet
    onward_ms: float = 0.0  # cost of the rest of the path after this stage
    mine: bool = False  # this node itself

    @cached_property
    def costs(self) -> ScoreTerms:
        """The terms of the score, computed on first use."""
        return self.price()

    @property
    def cost_ms(self) -> float:
        return self.costs.total + self.onward_ms


class Policy(Protocol):
    """A way to choose among candidates; it may keep counters from pick to pick."""

    name: str

    def pick(self, candidates: Sequence[PeerCandidate], work: RequestWork, rng: Random) -> list[PeerCandidate]:
        """Ranks the candidates, best first, and leaves none out."""


class MeshScore:
    """The default: a small set ranked by cost, then the rest in random order."""

    name = "mesh"

    def pick(self, candidates: Sequence[PeerCandidate], work: RequestWork, rng: Random) -> list[PeerCandidate]:
        shuffled = rng.sample(candidates, len(candidates))
        if len(shuffled) <= 1:
            return shuffled
        if rng.random() < EXPLORE:
            return shuffled
        chosen = {candidate.node for candidate in shuffled[:2]}
        chosen.update(candidate.node for candidate in candidates if candidate.mine)
        chosen.update(warmest(candidates, work))
        chosen.update(home(candidates, work))
        drawn = [candidate for candidate in shuffled if candidate.node in chosen]
        rest = [candidate for candidate in shuffled if candidate.node not in chosen]
        return sorted(drawn, key=lambda candidate: candidate.cost_ms) + rest


class PowerOfTwo:
    """Two drawn at random by cost, then the rest in random order (Mitzenmacher 2001)."""

    name = "power_of_two"

    def pick(self, candidates: Sequence[PeerCandidate], work: RequestWork, rng: Random) -> list[PeerCandidate]:
        shuffled = rng.sample(candidates, len(candidates))
        return sorted(shuffled[:2], key=lambda candidate: candidate.cost_ms) + shuffled[2:]


class RandomChoice:
    """Uniformly random order."""

    name = "random"

    def pick(self, candidates: Sequence[PeerCandidate], work: RequestWork, rng: Random) -> list[PeerCandidate]:
        return rng.sample(candidates, len(candidates))


class RoundRobin:
    """In turn, by node id; each entry has its own turn, from a random start so that entries do not choose in step."""

    name = "round_robin"

    def __init__(self) -> None:
        self._last: NodeId | None = None

    def pick(self, candidates: Sequence[PeerCandidate], work: RequestWork, rng: Random) -> list[PeerCandidate]:
        ring = sorted(candidates, key=lambda candidate: candidate.node)
        if not ring:
            return []
        if self._last is None:
            first = rng.randrange(len(ring))
        else:
            last = self._last
            first = next((index for index, candidate in enumerate(ring) if candidate.node > last), 0)
        self._last = ring[first].node
        return ring[first:] + ring[:first]


class LeastConnections:
    """Fewest own dispatches in flight, ties at random: as classical proxies do, without load records of the peers."""

    name = "least_connections"

    def pick(self, candidates: Sequence[PeerCandidate], work: RequestWork, rng: Random) -> list[PeerCandidate]:
        return sorted(rng.sample(candidates, len(candidates)), key=lambda candidate: candidate.in_flight)


class WeightedResponseTime:
    """At random, with weight 1 / own average response time; a peer without one counts as the mean of the others."""

    name = "weighted_response_time"

    def pick(self, candidates: Sequence[PeerCandidate], work: RequestWork, rng: Random) -> list[PeerCandidate]:
        known = [candidate.response_ms for candidate in candidates if candidate.response_ms > 0.0]
        mean_ms = sum(known) / len(known) if known else 1.0
        # Draws without replacement: the least of exponential variables with rate 1/response (Efraimidis & Spirakis 2006).
        arrivals = [(rng.expovariate(1.0) * (candidate.response_ms or mean_ms), candidate) for candidate in candidates]
        return [candidate for _, candidate in sorted(arrivals, key=lambda arrival: (arrival[0], arrival[1].node))]


def warmest(candidates: Sequence[PeerCandidate], work: RequestWork) -> list[NodeId]:
    """The candidate that holds most of the prompt in its cache, if any holds some."""
    warm = [(work.cached_tokens.get(candidate.node, 0), candidate.node) for candidate in candidates]
    tokens, node = max(warm, default=(0, NodeId("")))
    return [node] if tokens > 0 else []


def home(candidates: Sequence[PeerCandidate], work: RequestWork) -> list[NodeId]:
    """The rendezvous home of the prompt's prefix, or the next node in its order that is not overloaded.

    All entries compute the same home without messages, so one peer caches the prefix: 0.80 of prompt tokens were cache hits in
    simulation, against 0.50 where each router uses only its own record of what it sent.
    """
    if not work.prefix_key or not candidates:
        return []
    load = {candidate.node: candidate.load for candidate in candidates}
    bound = BOUND_ON_HOME * (sum(load.values()) + 1.0) / len(load) + 1.0
    ranked = owners(work.prefix_key, load, len(load))
    return next(([node] for node in ranked if load[node] <= bound), [])


_POLICIES: dict[str, Callable[[], Policy]] = {
    "mesh": MeshScore,
    "round_robin": RoundRobin,
    "least_connections": LeastConnections,
    "weighted_response_time": WeightedResponseTime,
    "power_of_two": PowerOfTwo,
    "random": RandomChoice,
}

DEFAULT_POLICY = "mesh"


def policy_names() -> list[str]:
    """The names that `policy_named` accepts, the default first."""
    return list(_POLICIES)


def policy_named(name: str) -> Policy:
    """A new policy, with counters of its own; an empty name stands for the default.

    Raises:
        BadRequest: no such policy; the message lists the known ones.
    """
    make = _POLICIES.get(name or DEFAULT_POLICY)
    if make is None:
        raise BadRequest(f"unknown routing policy {name!r}; known are: {', '.join(_POLICIES)}", param="policy")
    return make()
