"""How long a suspect may take to refute: Lifeguard's dynamic suspicion time-out.

Source: Dadgar, Phillips, Currey, "Lifeguard: SWIM-ing with Situational Awareness" (arXiv 1707.00788), section IV-B.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from mesh.ids import NodeId


def remaining_s(confirmations: int, expected: int, elapsed_s: float, min_s: float, max_s: float) -> float:
    """Time left before a suspect is declared dead; negative or zero means now.

    Each independent confirmation shortens the wait, logarithmically, from `max_s` (none) to `min_s` (`expected`
    or more). With none expected, as in a mesh too small to give any, the wait is `min_s`.
    Source: Lifeguard, section IV-B: max(min, max - (max - min) * log(C + 1) / log(K + 1)).
    """
    if expected < 1:
        return min_s - elapsed_s
    share = math.log(confirmations + 1) / math.log(expected + 1)
    return max(min_s, max_s - (max_s - min_s) * share) - elapsed_s


def minimum_s(multiplier: float, live: int, unit_s: float) -> float:
    """The shortest suspicion in a mesh of `live` members: rumours need time in log(n) to reach all members, and back.

    Source: memberlist's `suspicionTimeout`: multiplier * max(1, log10(n)) * unit, which is its probe period.
    """
    return multiplier * max(1.0, math.log10(max(1, live))) * unit_s


def expected_confirmations(wanted: int, live: int) -> int:
    """Returns how many members can confirm a suspicion: all but the accuser and the suspect, at most `wanted`."""
    return max(0, min(wanted, live - 2))


@dataclass(slots=True)
class Suspicion:
    """One member's running suspicion at one node. A named accuser counts once, however often its claim arrives."""

    started_at: float
    expected: int
    min_s: float
    max_s: float
    first: NodeId | None  # the first accuser, which exports of this suspicion name; None: an exchange did not contain it
    accusers: set[NodeId] = field(default_factory=set)
    slack_s: float = 0.0  # reported lag of the member and of this node
    stall_patience_s: float = 0.0
    listens: bool = False  # its process exists
    stalled: bool = False  # its process exists, but it was silent until the deadline
    cap_s: float = math.inf  # bound on the wait once another member declared the death

    def __post_init__(self) -> None:
        if self.first is not None:
            self.accusers.add(self.first)

    @property
    def confirmations(self) -> int:
        """Accusers beyond the first. An unnamed first one may be the next one named, so it counts for nothing."""
        return max(0, len(self.accusers) - 1)

    @property
    def deadline(self) -> float:
        """When the suspect is declared dead, or stalled if it listens, in local monotonic seconds."""
        wait_s = min(self.cap_s, remaining_s(self.confirmations, self.expected, 0.0, self.min_s, self.max_s)) + self.slack_s
        return self.started_at + (max(wait_s, self.stall_patience_s) if self.stalled else wait_s)

    def confirm(self, accusers: Iterable[NodeId]) -> bool:
        """Adds accusers; returns whether one of them is new and still counts, so that the claim is worth passing on."""
        news = set(accusers) - self.accusers
        if not news or self.confirmations >= self.expected:
            return False
        self.accusers |= news
        return True
