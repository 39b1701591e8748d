"""Two live processes with one identity: the copy of a data directory, a cloned image. Finds them, and says which one stops.

Words of this node that this process never said are of a former run, or of a twin. Only the place where they say that they live
tells: a process that answers there, with the identity's own key, is a twin; where none answers, it was a former run and this one
goes beyond its words. Until that is known nothing is said against them: two twins would otherwise outbid each other without end.

Of two twins the younger stops. Both must come to the same verdict although ages are measured at two places, so one of them
judges, the one with the lower address, once; the other is told when it asks. Each believes only what it has asked for itself.
"""

from __future__ import annotations

from membership.core.effects import FindTwin, MembershipEffect, ProcessDisplaced, TwinSeen
from mesh.ids import Address
from mesh.wire.gossip import Alive
from mesh.wire.twin import ANSWERER, ASKER, ProcessRun, TwinAnswer

ASK_AGAIN_S = 10.0  # an address where no twin answered is not asked again sooner: stale words come many times
ASKING_S = 5.0  # longer than a call may take: then its answer is not to be expected any more
REMEMBERED_S = 60.0  # a verdict; a twin that has stopped by then may have been started again
MAX_ADDRESSES = 16


class Twins:
    """What one process knows of others with its identity."""

    def __init__(self, me: Alive, now: float) -> None:
        self._address, self._name = me.address, me.name
        self._began = now
        self._asked_at: dict[Address, float] = {}  # not answered yet
        self._no_twin_at: dict[Address, float] = {}  # no twin answered there
        self._yields_at: dict[Address, float] = {}  # the twin there is the one to stop
        self._verdicts: dict[Address, tuple[float, bool]] = {}  # where this process judges: when, and whether it stops itself

    def run(self, now: float) -> ProcessRun:
        """This process, as it tells a twin of itself."""
        host, port = self._address
        return ProcessRun(host, port, self._name, max(0.0, now - self._began))

    def own_claim_received(self, place: Address, now: float) -> tuple[bool, list[MembershipEffect]]:
        """Words of this identity that another process said at `place`. Whether to go beyond them now, and what to find out."""
        if place == self._address or self._lately(self._yields_at, place, now, REMEMBERED_S):
            return True, []
        if self._lately(self._no_twin_at, place, now, ASK_AGAIN_S):
            return True, []
        return False, self._ask(place, now)

    def asked(self, by: ProcessRun, now: float) -> tuple[TwinAnswer, list[MembershipEffect]]:
        """A process that claims this identity asks: it may be a twin, so it is asked in turn."""
        if by.address == self._address:
            return TwinAnswer(self.run(now), ""), []
        stops = ""
        if self._judges(by):
            stops = ANSWERER if self._stops(by, now) else ASKER
        return TwinAnswer(self.run(now), stops), [TwinSeen(by), *self._ask(by.address, now)]

    def found(self, place: Address, answer: TwinAnswer | None, now: float) -> list[MembershipEffect]:
        """What came of a `FindTwin`: the answer of a process with this identity's key; None: there is none."""
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
        """This process's verdict, which stands for a while: the younger stops, of equals the one with the higher address."""
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
