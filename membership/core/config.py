"""The numbers of membership, with their units, bounds and reasons. The defaults are for one LAN."""

from __future__ import annotations

from dataclasses import dataclass, fields

# (lowest, highest) allowed value of every field; outside them the protocol's guarantees do not hold.
_BOUNDS: dict[str, tuple[float, float]] = {
    "probe_period_s": (0.05, 60),
    "probe_round_s": (0.05, 60),
    "probe_timeout_s": (0.01, 30),
    "indirect_peers": (0, 16),
    "suspicion_unit_s": (0.01, 60),
    "suspicion_multiplier": (1, 32),
    "suspicion_max_factor": (1, 16),
    "confirmations": (0, 16),
    "gossip_period_s": (0.02, 10),
    "gossip_peers": (1, 16),
    "eager_peers": (0, 16),
    "push_peers": (0, 16),
    "transmit_multiplier": (1, 16),
    "redial_period_s": (0.1, 3600),
    "forget_s": (1, 30 * 86400),
    "members_max": (2, 16_000),
    "lag_tolerance_s": (0.01, 10),
    "exchange_gap_s": (0.01, 60),
    "exchange_pace_s": (0.0, 10),
    "exchange_patience_s": (0.0, 0.01),
    "watched_peers": (0, 16),
    "stall_patience_s": (0, 3600),
}


@dataclass(frozen=True, slots=True)
class MembershipConfig:
    """Periods, time-outs and fan-outs of failure detection and dissemination.

    Raises:
        ValueError: a number is outside its bounds, or the times of a probe leave no room for one another.
    """

    probe_period_s: float = 0.8  # one member is probed each period: nearly all that an idle mesh sends
    probe_round_s: float = 0.5  # from a ping to the suspicion of a member that answers no probe: routing avoids it from then on
    probe_timeout_s: float = 0.2  # then relays are asked to probe; above any LAN round trip, even of a busy process
    indirect_peers: int = 3
    suspicion_unit_s: float = 0.5
    suspicion_multiplier: float = 4.0  # shortest suspicion: this * log10(live), at least this, units: 2 s up to 10 nodes
    suspicion_max_factor: float = 3.0  # an unconfirmed suspicion lasts this much longer
    confirmations: int = 3  # independent ones that bring suspicion down to its shortest (Lifeguard's K)
    gossip_period_s: float = 0.1  # while rumours are queued
    gossip_peers: int = 3
    eager_peers: int = 3  # fresh news goes to so many at once, outside the copy budget
    push_peers: int = 2  # a facts record too large for a datagram goes to so many at once, by call
    transmit_multiplier: int = 4
    redial_period_s: float = 2.0  # one dead member or absent seed is tried each period, so that partitions heal
    forget_s: float = 72 * 3600.0  # how long the dead and the departed are remembered
    members_max: int = 4096  # table bound: an older tombstone makes room, else newcomers are refused
    lag_tolerance_s: float = 0.1  # a tick later than this means that this process was suspended: its own timers prove nothing
    exchange_gap_s: float = 0.5  # between two exchanges with one peer
    exchange_pace_s: float = 0.02  # between any two exchanges of this node
    exchange_patience_s: float = 0.0001  # for each member: a difference that rumours remove by then is not worth a whole digest
    stall_patience_s: float = 30.0  # a suspect that still listens is dead only after so long: its process exists
    watched_peers: int = 4  # ring successors to which links are kept; both ends watch, so a node is watched by twice as many

    def __post_init__(self) -> None:
        for field in fields(self):
            low, high = _BOUNDS[field.name]
            if not low <= (value := getattr(self, field.name)) <= high:
                raise ValueError(f"{field.name} must be from {low:g} to {high:g}, got {value!r}")
        if not self.probe_timeout_s < self.probe_round_s <= self.probe_period_s:
            raise ValueError("probe_timeout_s must be below probe_round_s, for indirect probes, and that at most probe_period_s")
