"""The probes under way, and the pings sent for others. Verdicts are in `swim.py`, the choice of targets in `regions.py`.

Each probe has a number, so a late answer to an older one changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mesh.ids import Address, NodeId

if TYPE_CHECKING:
    from random import Random

_MAX_SEQUENCE = 2**32
_MAX_RELAYS = 1024  # pings under way for others; beyond it a request gets no answer, and its sender has other relays


@dataclass(slots=True)
class Probe:
    """One probe of this node, with the relays asked and their nacks."""

    seq: int
    target: NodeId
    sent_at: float
    indirect_at: float  # when relays are asked; infinite once they were
    ends_at: float
    relays: frozenset[NodeId] = frozenset()
    nacks: frozenset[NodeId] = frozenset()


@dataclass(frozen=True, slots=True)
class Relay:
    """A ping sent for another member: where its answer goes, under which number, and until when."""

    target: NodeId
    asker: Address
    asker_seq: int
    expires_at: float


class Probes:
    """Numbers and keeps the probes of this node, and the pings that it relays."""

    def __init__(self, rng: Random) -> None:
        self._seq = rng.randrange(_MAX_SEQUENCE)  # random, so that answers to a former run match no number
        self._relays: dict[int, Relay] = {}
        self.nacks_due: dict[int, float] = {}  # by number of the relayed ping: when the asker gets a nack
        self.under_way: dict[int, Probe] = {}

    @property
    def deadline(self) -> float:
        """When some probe next needs attention, in local monotonic seconds."""
        at = math.inf
        for probe in self.under_way.values():
            at = min(at, probe.indirect_at, probe.ends_at)
        return min(at, *self.nacks_due.values()) if self.nacks_due else at

    def next_seq(self) -> int:
        self._seq = (self._seq + 1) % _MAX_SEQUENCE
        return self._seq

    def start(self, target: NodeId, now: float, indirect_at: float, ends_at: float) -> Probe:
        probe = Probe(self.next_seq(), target, now, indirect_at, ends_at)
        self.under_way[probe.seq] = probe
        return probe

    def probing(self, target: NodeId) -> bool:
        return any(probe.target == target for probe in self.under_way.values())

    def answered(self, seq: int, by: NodeId) -> Probe | None:
        """Ends and returns the probe that `by` may answer under this number."""
        probe = self.under_way.get(seq)
        if probe is None or (by != probe.target and by not in probe.relays):
            return None
        return self.under_way.pop(seq)

    def delay(self, late_s: float, now: float) -> None:
        """Moves the ends of all probes: this process was suspended up to `now`, so their answers could not be read."""
        for probe in self.under_way.values():
            slept_s = min(late_s, now - probe.sent_at)
            probe.indirect_at += slept_s
            probe.ends_at += slept_s

    def nacked(self, seq: int, by: NodeId) -> None:
        """Records a relay's nack: it received the request, but no answer of the target."""
        probe = self.under_way.get(seq)
        if probe is not None and by in probe.relays:
            probe.nacks |= {by}

    def take_nacks_due(self, now: float) -> list[Relay]:
        """Returns the relayed pings whose target has not answered; each once."""
        due = [seq for seq, at in self.nacks_due.items() if at <= now]
        for seq in due:
            del self.nacks_due[seq]
        return [self._relays[seq] for seq in due if seq in self._relays]

    def relay(self, target: NodeId, asker: Address, asker_seq: int, now: float, nack_at: float, expires_at: float) -> int | None:
        """Returns a number for a ping sent for another member; None while too many are under way."""
        if len(self._relays) >= _MAX_RELAYS:
            self._relays = {seq: relay for seq, relay in self._relays.items() if relay.expires_at > now}
            if len(self._relays) >= _MAX_RELAYS:
                return None
        seq = self.next_seq()
        self._relays[seq] = Relay(target, asker, asker_seq, expires_at)
        self.nacks_due[seq] = nack_at
        return seq

    def relayed(self, seq: int, by: NodeId, now: float) -> Relay | None:
        """Ends and returns the relay that waits for this answer of `by`."""
        relay = self._relays.get(seq)
        if relay is None or relay.target != by:
            return None
        del self._relays[seq]
        self.nacks_due.pop(seq, None)
        return relay if relay.expires_at > now else None
