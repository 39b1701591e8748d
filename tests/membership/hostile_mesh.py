"""Four real cores, and an adversary that orders all they say: what must hold after each step, and what once it rests.

The numbers of the checks are those of membership's invariants. M1: only its owner raises a node's epoch and incarnation. M2: what
is known of a node never goes back. M3: whoever lives is not dead to anybody for good. M4: whoever ended is suspected, and then
dead, in time. M5: all views become one. M6: who left comes back by a restart alone, and is never called dead. M7: no death by
hearsay: its host refuses, or the suspicion ran out. M8 and M10, and the half of M9 that is about strangers, are the business of
one node alone: `tests.membership.hostile_node`. The other half of M9, what a quiet mesh may send, is here.
Datagrams are delivered in any order, twice, or never; calls fail; nodes crash, fall silent, sleep, leave and restart, with their
epoch kept on disk or lost; members lie about one another, and forge one another's words.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from membership.core.core import MembershipCore
from membership.core.effects import MemberChanged, MembershipEffect, PingStream, SendDatagram, StartSync, TryConnect
from membership.core.members import Member
from mesh.ids import Address, NodeId
from mesh.view import PeerState
from mesh.wire.datagram_codec import decode, encode
from mesh.wire.gossip import REFUSED, TIMEOUT, Alive, Claim, Dead, Gossip, Suspect
from mesh.wire.sync import decode_sync, decode_synced
from mesh.wire.sync import encode as encode_sync
from tests.membership.pieces import CONFIG, address_of, alive, core_of, peer_id

NODES = 4
MAX_IN_FLIGHT = 200  # more are lost, the oldest first
WAY_S = 0.001
MIN_SUSPICION_S = CONFIG.suspicion_multiplier * CONFIG.suspicion_unit_s / 2  # after somebody else's verdict
SUSPECT_WITHIN_S = 30.0  # of three members each is probed, by one who trusts itself least every 7.2 s
DEAD_WITHIN_S = SUSPECT_WITHIN_S + CONFIG.stall_patience_s + 10.0  # it may have been seen to listen before it ended
ONE_VIEW_WITHIN_S = DEAD_WITHIN_S
SETTLE_S = 5.0  # what happened last is told, and points are
QUIET_S = 10.0
QUIET_BYTES_A_SECOND = 400  # a node; of four, some of whom may be dialled in vain
MAX_ANSWERS = 100  # one after another, before time goes on

EpochIncarnation = tuple[int, int]
numbers = st.integers(0, NODES - 1)
picks = st.integers(0, 10_000)
aheads = st.sampled_from(((0, 0), (0, 0), (0, 1), (0, 3), (1, 0)))
ways_to_end = st.sampled_from(("goodbye", "goodbye", "crash", "silence"))


def number_at(address: Address) -> int:
    return address[1] - address_of(0)[1]


class HostileMesh(RuleBasedStateMachine):
    """One adversarial run."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.cores: dict[int, MembershipCore] = {}
        self.up = set(range(NODES))
        self.refusing: set[int] = set()  # down, on a host that says so
        self.ended: set[tuple[NodeId, int]] = set()  # runs that did, by their epoch
        self.on_disk = dict.fromkeys(range(NODES), 1)
        self.in_flight: list[tuple[Address, Address, bytes]] = []
        self.errands: list[tuple[int, TryConnect | PingStream]] = []
        self.wanted: list[tuple[int, Address]] = []
        self.bytes_sent = 0
        self.broken = False
        # What was seen, by whom and of whom.
        self.known: dict[tuple[int, NodeId], EpochIncarnation] = {}
        self.claimed: dict[NodeId, EpochIncarnation] = {}  # the highest that its owner gave itself
        self.left_at: dict[tuple[int, NodeId], EpochIncarnation] = {}
        self.suspected_at: dict[tuple[int, NodeId], tuple[EpochIncarnation, float]] = {}

    @initialize(seed=st.integers(0, 2**16))
    def start(self, seed: int) -> None:
        words = [alive(number) for number in range(NODES)]
        self.cores = {number: core_of(words[number], CONFIG, Random(seed + number)) for number in range(NODES)}
        for number in range(NODES):
            for other in range(NODES):
                if other != number:
                    self._take(number, other, words[other])
                    self.cores[number].linked(peer_id(other))

    def _must(self, holds: bool, otherwise: str) -> None:
        """Raises AssertionError, and remembers that the run is over: what follows from a fault is not another one."""
        self.broken |= not holds
        assert holds, otherwise

    # how the cores' effects are carried out

    def _carry_out(self, number: int, effects: list[MembershipEffect]) -> None:
        for effect in effects:
            match effect:
                case SendDatagram(to=to, message=message):
                    self.in_flight.append((address_of(number), to, encode(message)))
                    self.bytes_sent += len(self.in_flight[-1][2])
                case TryConnect() | PingStream():
                    self.errands.append((number, effect))
                case StartSync(to=to):
                    self.wanted.append((number, to))
                case MemberChanged(node=node) if node != self.cores[number].me:
                    self._m2_does_not_go_back(number, self.cores[number].swim.members[node])
                    self._m6_who_left_comes_back_by_a_restart_alone(number, effect)
                    self._m7_nobody_dies_by_hearsay(number, effect)
                case _:
                    pass
        del self.in_flight[:-MAX_IN_FLIGHT]

    def _take(self, to: int, by: int, *claims: Claim) -> None:
        """A datagram of `by` that tells these."""
        received = Gossip(self.cores[by].swim.state.sender(self.now), claims)
        self._carry_out(to, self.cores[to].receive(address_of(by), received, self.now))

    def _deliver(self, source: Address, to: Address, datagram: bytes) -> None:
        if (number := number_at(to)) in self.up:
            self._carry_out(number, self.cores[number].receive(source, decode(datagram), self.now))

    def _exchange(self, asker: int, teller: int) -> None:
        """Both calls of it, through the codec."""
        synced, effects = self.cores[teller].answer(peer_id(asker), decode_sync(encode_sync(self.cores[asker].ask())), self.now)
        self._carry_out(teller, effects)
        wanted, effects = self.cores[asker].learn(address_of(teller), decode_synced(encode_sync(synced)), self.now)
        self._carry_out(asker, effects)
        if wanted is not None:
            _, effects = self.cores[teller].answer(peer_id(asker), decode_sync(encode_sync(wanted)), self.now)
            self._carry_out(teller, effects)

    def _run_errand(self, by: int, errand: TryConnect | PingStream) -> None:
        target = number_at(errand.to)
        if by not in self.up:
            return
        if isinstance(errand, TryConnect):
            refused = False if target in self.up else True if target in self.refusing else None
            self._carry_out(by, self.cores[by].tried(errand.number, refused, self.now))
        elif target in self.up:
            self._carry_out(by, self.cores[by].stream_answered(errand.seq, peer_id(target), self.now))

    def _break_links(self, number: int) -> None:
        for other in sorted(self.up - {number}):
            self._carry_out(other, self.cores[other].lost(peer_id(number), self.now, proven=True))

    def _end(self, number: int, way: str, unheard: bool) -> None:
        """`unheard`: what it said last is still under way."""
        if way == "goodbye":
            self._carry_out(number, self.cores[number].leave(self.now))
        self.up.discard(number)
        if not unheard:
            last = [datagram for datagram in self.in_flight if datagram[0] == address_of(number)]
            self.in_flight = [datagram for datagram in self.in_flight if datagram[0] != address_of(number)]
            for datagram in last:
                self._deliver(*datagram)
        self.ended.add((peer_id(number), self.cores[number].swim.myself.epoch))
        self.on_disk[number] = self.cores[number].swim.myself.epoch
        if way != "silence":
            self.refusing.add(number)
            self._break_links(number)
            while self.errands:  # a host refuses within a millisecond
                self._run_errand(*self.errands.pop(0))

    def _start_again(self, number: int, through: int, forgetful: bool, unheard: bool) -> None:
        """`forgetful`: as its first run did, for its disk is gone. `unheard`: all that is said of it at first is lost."""
        epoch = 1 if forgetful else self.on_disk[number] + 1
        self._break_links(number)  # what was left of them: its host answers again
        self.cores[number] = core_of(alive(number, epoch=epoch), CONFIG, Random(epoch), self.now)
        for memory in (self.known, self.left_at, self.suspected_at):
            for key in [key for key in memory if key[0] == number]:
                del memory[key]
        self.up.add(number)
        self.refusing.discard(number)
        for other in self.up - {number}:
            self.cores[number].linked(peer_id(other))
            self.cores[other].linked(peer_id(number))
        self._exchange(number, through)
        if unheard:
            self.in_flight.clear()

    # what the adversary may do

    @precondition(lambda self: self.in_flight)
    @rule(pick=picks, count=st.integers(1, 30), twice=st.booleans())
    def deliver(self, pick: int, count: int, twice: bool) -> None:
        """Some that were sent one after another; `twice`: they will come again."""
        place = pick % len(self.in_flight)
        some = self.in_flight[place : place + count]
        if not twice:
            del self.in_flight[place : place + count]
        for datagram in some:
            self._deliver(*datagram)

    @precondition(lambda self: self.in_flight)
    @rule(pick=picks, count=st.sampled_from((1, 5, 30, MAX_IN_FLIGHT)))
    def lose(self, pick: int, count: int) -> None:
        place = pick % len(self.in_flight) if count < MAX_IN_FLIGHT else 0
        del self.in_flight[place : place + count]

    @rule(dt=st.floats(0.01, 1.0))
    def it_looks_away(self, dt: float) -> None:
        self._go_on(lambda: False, dt)

    @rule(dt=st.floats(0.01, 3.0), asleep=st.none() | numbers)
    def time_passes(self, dt: float, asleep: int | None) -> None:
        """Timers fire when they are due, and nothing arrives; `asleep` learns at the end of how late it is."""
        end = self.now + dt
        while due := [(self.cores[n].deadline, n) for n in self.up if n != asleep and self.cores[n].deadline <= end]:
            self.now, number = max(self.now, min(due)[0]), min(due)[1]
            self._carry_out(number, self.cores[number].tick(self.now))
            assert self.cores[number].deadline > self.now, "a tick uses its deadline up"
        self.now = end
        if asleep in self.up and self.cores[asleep].deadline <= end:
            self._carry_out(asleep, self.cores[asleep].tick(end))

    @precondition(lambda self: self.errands)
    @rule(pick=picks)
    def a_connection_is_tried(self, pick: int) -> None:
        self._run_errand(*self.errands.pop(pick % len(self.errands)))

    @precondition(lambda self: self.wanted)
    @rule(pick=picks, fails=st.booleans())
    def an_exchange_is_made(self, pick: int, fails: bool) -> None:
        asker, to = self.wanted.pop(pick % len(self.wanted))
        if not fails and {asker, number_at(to)} <= self.up:
            self._exchange(asker, number_at(to))

    @precondition(lambda self: len(self.up) > 2)
    @rule(number=numbers, way=ways_to_end, unheard=st.sampled_from((False, False, True)))
    def one_ends(self, number: int, way: str, unheard: bool) -> None:
        if number in self.up:
            self._end(number, way, unheard)

    @rule(number=numbers, way=ways_to_end, through=numbers, forgetful=st.booleans(), unheard=st.booleans())
    def one_restarts(self, number: int, way: str, through: int, forgetful: bool, unheard: bool) -> None:
        if number in self.up and through in self.up - {number}:
            self._end(number, way, unheard)
            self._start_again(number, through, forgetful, unheard)

    @rule(number=numbers, through=numbers, forgetful=st.booleans(), unheard=st.booleans())
    def one_starts_again(self, number: int, through: int, forgetful: bool, unheard: bool) -> None:
        if number not in self.up and through in self.up:
            self._start_again(number, through, forgetful, unheard)

    @rule(number=numbers)
    def a_firewall_forgets_the_links_of_one(self, number: int) -> None:
        """It lives, and new ones are made at once."""
        if number in self.up:
            self._break_links(number)
            for other in self.up - {number}:
                self.cores[other].linked(peer_id(number))

    @rule(by=numbers, to=numbers, about=numbers, ahead=aheads, dead=st.booleans(), gone=st.booleans())
    def one_lies(self, by: int, to: int, about: int, ahead: EpochIncarnation, dead: bool, gone: bool) -> None:
        """That another is silent, or dead: it, or runs of it that never were. `gone`: one that is not there, if any is not."""
        down = sorted(set(range(NODES)) - self.up)
        about = down[about % len(down)] if gone and down else about
        if by != to and {by, to} <= self.up:
            mine = self.cores[about].swim.myself
            kind = Dead if dead or gone else Suspect
            self._take(to, by, kind(peer_id(about), mine.epoch + ahead[0], mine.incarnation + ahead[1], peer_id(by)))

    @rule(by=numbers, to=numbers, about=numbers)
    def one_lies_about_a_refusal(self, by: int, to: int, about: int) -> None:
        """That the host of another refuses, to one who holds a link with it."""
        if len({by, to, about} & self.up) == 3:
            mine = self.cores[about].swim.myself
            self._take(to, by, Dead(peer_id(about), mine.epoch, mine.incarnation, peer_id(by), REFUSED))

    @rule(to=numbers, about=numbers, ahead=st.integers(0, 2))
    def one_forges(self, to: int, about: int, ahead: int) -> None:
        """Words of another, without its key."""
        by = (to + 1) % NODES
        if by != about and {by, to} <= self.up:
            mine, key = self.cores[about].swim.myself, peer_id(about).encode()
            self._take(
                to, by, Alive(peer_id(about), mine.epoch, mine.incarnation + ahead, "evil", "6.6.6.6", 6, "", b"forged", key)
            )

    # what holds at any time

    @invariant()
    def m1_only_its_owner_raises_an_incarnation(self) -> None:
        for core in self.cores.values():
            me = core.swim.myself
            self.claimed[core.me] = max(self.claimed.get(core.me, (0, 0)), (me.epoch, me.incarnation))
        for number in sorted(self.up):
            for member in self.cores[number].swim.members:
                claimed = self.claimed[member.node]
                self._must(
                    (member.epoch, member.incarnation) <= claimed,
                    f"M1: {member.node} claimed {claimed} at most, {number} holds {member}",
                )
                self._must(member.address[0] != "6.6.6.6", f"M1: {number} believes what {member.node} never said")

    @invariant()
    def m2_what_is_known_of_a_node_never_goes_back(self) -> None:
        for number in sorted(self.up):
            for member in self.cores[number].swim.members:
                self._m2_does_not_go_back(number, member)

    def _m2_does_not_go_back(self, by: int, member: Member) -> None:
        standing = member.epoch, member.incarnation
        known, self.known[by, member.node] = self.known.get((by, member.node), standing), standing
        self._must(standing >= known, f"M2: {known} became {standing}")

    def _m6_who_left_comes_back_by_a_restart_alone(self, by: int, change: MemberChanged) -> None:
        """Or, where a restarted one lost its epoch, by its own word of a higher incarnation. M1 sees that it gave it."""
        key, member = (by, change.node), self.cores[by].swim.members[change.node]
        standing = member.epoch, member.incarnation
        if change.after is PeerState.LEFT:
            self.left_at[key] = standing
        elif key in self.left_at:
            self._must(change.after is not PeerState.DEAD or standing > self.left_at[key], "M6: who left is not called dead")
            self._must(standing > self.left_at.pop(key), f"M6: a ghost of {change.node}")

    def _m7_nobody_dies_by_hearsay(self, by: int, change: MemberChanged) -> None:
        key, member = (by, change.node), self.cores[by].swim.members[change.node]
        standing = member.epoch, member.incarnation
        if change.after is PeerState.SUSPECT and self.suspected_at.get(key, ((0, 0), 0.0))[0] != standing:
            self.suspected_at[key] = standing, self.now
        if PeerState.DEAD is change.after is member.state and change.before in (PeerState.ALIVE, PeerState.SUSPECT):
            if member.cause == REFUSED:
                self._must((change.node, member.epoch) in self.ended, "M7: no host refuses for a run that never ended")
                return
            suspected, since = self.suspected_at.get(key, ((0, 0), self.now))
            waited_s = self.now - since if suspected == standing else 0.0
            self._must(change.before is PeerState.SUSPECT and member.cause == TIMEOUT, f"M7: dead from {change.before}")
            self._must(waited_s >= MIN_SUSPICION_S - 1e-6, f"M7: dead {waited_s} s after it was first suspected")
        if change.after is PeerState.ALIVE:
            self.suspected_at.pop(key, None)

    # and once the adversary rests

    def teardown(self) -> None:
        if self.broken or not self.cores:
            return
        rested_at = self.now
        self._go_on(lambda: not self._not_yet_suspect(), SUSPECT_WITHIN_S)
        self._must(not self._not_yet_suspect(), f"M4: ended, and not suspected after {SUSPECT_WITHIN_S:g} s: {self._views()}")
        self._go_on(self._agreed, rested_at + ONE_VIEW_WITHIN_S - self.now)
        for by, views in self._views().items():
            for number in range(NODES):
                state = views.get(peer_id(number))
                self._must(number not in self.up or state is PeerState.ALIVE, f"M3: {number} lives, to {by} it is {state}")
                self._must(
                    number in self.up or state not in (PeerState.ALIVE, PeerState.SUSPECT), f"M4: {number} ended, {by}: {state}"
                )
        self._must(self._agreed(), f"M5: {ONE_VIEW_WITHIN_S:g} s later there are several views: {self._views()}")
        self._go_on(lambda: False, SETTLE_S)
        before = self.bytes_sent
        self._go_on(lambda: False, QUIET_S)
        each = (self.bytes_sent - before) / QUIET_S / len(self.up)
        self._must(each <= QUIET_BYTES_A_SECOND, f"M9: {each:.0f} bytes a second from each node of a quiet mesh")
        self._must(self._agreed(), f"M5: and they did not last: {self._views()}")

    def _go_on(self, until: Callable[[], bool], within_s: float) -> None:
        """In peace: all that is sent arrives, in order, a millisecond later."""
        end = self.now + within_s
        while not until() and self.now < end:
            for _ in range(MAX_ANSWERS):
                if not (self.in_flight or self.errands or self.wanted):
                    break
                self.now += WAY_S
                in_flight, self.in_flight = self.in_flight, []
                for datagram in in_flight:
                    self._deliver(*datagram)
                while self.errands:
                    self._run_errand(*self.errands.pop(0))
                while self.wanted:
                    self.an_exchange_is_made(0, fails=False)
            else:
                self._must(False, "M9: answers to answers without end")
            soonest = min(self.cores[number].deadline for number in self.up)
            self.time_passes(max(0.0, min(soonest, end) - self.now), asleep=None)

    def _not_yet_suspect(self) -> list[tuple[int, int]]:
        down = set(range(NODES)) - self.up
        views = self._views()
        return [(by, number) for by in views for number in down if views[by].get(peer_id(number)) is PeerState.ALIVE]

    def _views(self) -> dict[int, dict[NodeId, PeerState]]:
        return {by: {member.node: member.state for member in self.cores[by].swim.members} for by in sorted(self.up)}

    def _agreed(self) -> bool:
        """The living are alive to all the living, the others dead, departed or never met; and all fingerprints are equal."""
        if len({self.cores[number].fingerprint for number in self.up}) > 1:
            return False
        living = {peer_id(number) for number in self.up}
        alive_to = [{node for node, state in view.items() if state is PeerState.ALIVE} for view in self._views().values()]
        suspected = any(PeerState.SUSPECT in view.values() for view in self._views().values())
        return not suspected and all(seen == living for seen in alive_to)
