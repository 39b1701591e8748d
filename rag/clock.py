"""Hybrid logical clock: time stamps that agree with wall time when clocks are good and with causality always.

A stamp is 48 bits of Unix milliseconds and a 16-bit counter in one integer, with the node's id to break ties.
A node that has seen a stamp issues greater ones, whatever its own clock reads. A stamp far ahead of our clock is
refused: accepted, it would win every later write until real time had caught up with it.
Source: Kulkarni et al., "Logical Physical Clocks" (2014).
"""

from __future__ import annotations

import msgspec

from mesh.ids import NodeId

COUNTER_BITS = 16
MAX_AHEAD_S = 60.0


class HybridTimestamp(msgspec.Struct, frozen=True, order=True, array_like=True):
    """The time and the writer of an entry. Ordered: the greater stamp wins everywhere."""

    hlc: int
    node: NodeId


def hlc_of(unix_s: float) -> int:
    """The smallest clock value of that moment."""
    return int(unix_s * 1000) << COUNTER_BITS


def unix_s_of(hlc: int) -> float:
    return (hlc >> COUNTER_BITS) / 1000


def is_too_far_ahead(hlc: int, now_s: float) -> bool:
    """Whether a peer's stamp must be refused: its clock, or ours, is wrong by more than `MAX_AHEAD_S`."""
    return hlc > hlc_of(now_s + MAX_AHEAD_S)


class HybridClock:
    """One node's clock. `now_s` is Unix time and may jump in any direction."""

    def __init__(self, node: NodeId, latest: int = 0) -> None:
        self.node = node
        self.latest = latest

    def observe(self, hlc: int) -> None:
        """Takes note of a stamp that was accepted, or found on disk at start."""
        self.latest = max(self.latest, hlc)

    def next(self, now_s: float) -> HybridTimestamp:
        """A stamp greater than every one issued or observed before."""
        self.latest = max(self.latest + 1, hlc_of(now_s))
        return HybridTimestamp(self.latest, self.node)
