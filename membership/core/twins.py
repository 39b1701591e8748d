"""Twins: two live processes with one identity, from a copied data directory or image. Finds them, and decides which one stops.

An own claim that this process did not make comes from a former run or from a twin. The address in the claim decides: a process
that answers there with the identity's key is a twin; if none answers, it was a former run, and this process refutes its claim.
Until then nothing is refuted: two twins would otherwise raise their counts against each other without end.

Of two twins the younger stops. Both must reach the same decision although ages are measured at two places, so the process with
the lower address decides, once, and the other receives the decision with an answer. Each accepts only answers to its own calls.
"""

from __future__ import annotations

from membership.core.effects import FindTwin, MembershipEffect, ProcessDisplaced, TwinSeen
from mesh.ids import Address
from mesh.wire.gossip import Alive
from mesh.wire.twin import ANSWERER, ASKER, ProcessRun, TwinAnswer

ASK_AGAIN_S = 10.0  # an address where no twin answered is not asked again sooner: stale claims arrive many times
ASKING_S = 5.0  # longer than a call may take
REMEMBERED_S = 60.0  # a verdict; a twin that has stopped by then may have been started again
MAX_ADDRESSES = 16


class Twins:
    """The search of one process for others with its identity, and its decisions about them."""

    def __init__(self, me: Alive, now: float) -> None:
        self._address, self._name = me.address, me.name
        self._began = now
        self._asked_at: dict[Address, float] = {}  # not answered yet
        self._no_twin_at: dict[Address, float] = {}  # no twin answered there
        self._yields_at: dict[Address, float] = {}  # the twin there is the one to stop
        self._verdicts: dict[Address, tuple[float, bool]] = {}  # where this process judges: when, and whether it stops itself

    @property
    def remembered(self) -> int:
        """The largest number of addresses that one of the tables holds; at most `MAX_ADDRESSES`."""
        return max(len(kept) for kept in (self._asked_at, self._no_twin_at, self._yields_at, self._verdicts))

    def run(self, now: float) -> ProcessRun:
        """Returns the description of this process that its twins receive."""
        host, port = self._address
        return ProcessRun(host, port, self._name, max(0.0, now - self._began))

    def own_claim_received(self, place: Address, now: float) -> tuple[bool, list[MembershipEffect]]:
        """Handles a claim of this identity made by another process at `place`.

        Returns whether to refute it now, and the calls that decide it otherwise.
        """
        if place == self._address or self._lately(self._yields_at, place, now, REMEMBERED_S):
            return True, []
        if self._lately(self._no_twin_at, place, now, ASK_AGAIN_S):
            return True, []
        return False, self._ask(place, now)

    def asked(self, by: ProcessRun, now: float) -> tuple[TwinAnswer, list[MembershipEffect]]:
        """Answers a process that claims this identity; it may be a twin, so it is called in turn."""
        if by.address == self._address:
            return TwinAnswer(self.run(now), ""), []
        stops = ""
        if self._judges(by):
            stops = ANSWERER if self._stops(by, now) else ASKER
        return TwinAnswer(self.run(now), stops), [TwinSeen(by), *self._ask(by.address, now)]

    def found(self, place: Address, answer: TwinAnswer | None, now: float) -> list[MembershipEffect]:
        """Applies the outcome of a `FindTwin`: the answer of a process with this identity's key; None: no twin answered."""
        self._asked_at.pop(place, None)
        if answer is None or answer.run.address == self._address:  # no process, or this one by another address
            self._note(self._no_twin_at, place, now)
            return []
        twin = answer.run
        stops = self._stops(twin, now) if self._judges(twin) else answer.stops == ASKER
        if stops:
            return [TwinSeen(twin), ProcessDisplaced(twin)]
        for address in (place, twin.address):
            self._note(self._yields_at, address, now)
        return [TwinSeen(twin)]

    def _ask(self, place: Address, now: float) -> list[MembershipEffect]:
        if self._lately(self._yields_at, place, now, ASK_AGAIN_S) or self._lately(self._asked_at, place, now, ASKING_S):
            return []
        self._note(self._asked_at, place, now)
        return [FindTwin(place)]

    def _judges(self, twin: ProcessRun) -> bool:
        return self._address < twin.address

    def _stops(self, twin: ProcessRun, now: float) -> bool:
        """Returns whether this process stops: the younger does, of equals the one with the higher address. Kept for a while."""
        at, verdict = self._verdicts.get(twin.address, (0.0, False))
        if twin.address not in self._verdicts or now - at > REMEMBERED_S:
            verdict = now - self._began < twin.age_s
            self._verdicts.pop(twin.address, None)
            self._verdicts[twin.address] = now, verdict
            while len(self._verdicts) > MAX_ADDRESSES:
                del self._verdicts[next(iter(self._verdicts))]
        return verdict

    @staticmethod
    def _note(times: dict[Address, float], place: Address, now: float) -> None:
        times.pop(place, None)
        times[place] = now
        while len(times) > MAX_ADDRESSES:
            del times[next(iter(times))]

    @staticmethod
    def _lately(times: dict[Address, float], place: Address, now: float, within_s: float) -> bool:
        return place in times and now - times[place] < within_s
