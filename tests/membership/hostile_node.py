"""One real core in a table full of long names, and an adversary that may say anything from anywhere, also what is no message.

M8: a datagram fits its frame, each queued rumour fits some datagram, queue and tables are bounded. M9: no more bytes go to an
address that has proved nothing than came from it. M10: any bytes are a message within its bounds, or refused and change nothing.
"""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from membership.core.allowance import MAX_ACCOUNTS
from membership.core.config import MembershipConfig
from membership.core.core import MembershipCore
from membership.core.effects import MembershipEffect, SendDatagram, TryConnect
from membership.core.refusal_detection import MAX_CONNECT_PROBES
from mesh.ids import Address
from mesh.wire import datagram_codec, sync
from mesh.wire.gossip import (
    MAX_MESSAGE_BYTES,
    Ack,
    Alive,
    BadDatagram,
    Claim,
    ConnectCheck,
    Dead,
    Gossip,
    GossipMessage,
    Nack,
    Ping,
    PingReq,
    Suspect,
)
from tests.membership.pieces import ME, core_of, left, only, peer_id, sender, signed

MAX_MEMBERS = 40
CONFIG = MembershipConfig(members_max=MAX_MEMBERS)
STRANGERS: list[Address] = [("6.6.6.6", 6000 + number) for number in range(3)]
FIRST = 7  # members from the start, this node among them
HOST = "2001:0db8:0000:0000:0000:ff00:0042:8329"


def address_of(number: int) -> Address:
    return HOST, 7000 + number


def wordy(number: int, incarnation: int = 0) -> Alive:
    """As long as a name and an address may be."""
    return signed(Alive(peer_id(number), 1, incarnation, f"{number:032}", HOST, 7000 + number, f"{number % 2:016}"))


anybody = st.integers(0, 59)
members = st.integers(1, FIRST - 1)
counters = st.integers(0, 2)
seqs = st.integers(0, 5)
claims: st.SearchStrategy[Claim] = st.one_of(
    st.builds(wordy, anybody, counters),
    st.builds(Suspect, anybody.map(peer_id), st.just(1), counters, anybody.map(peer_id)),
    st.builds(Dead, anybody.map(peer_id), st.just(1), counters, anybody.map(peer_id)),
    st.builds(left, members.map(peer_id), st.just(1), counters),
)
bundles = st.lists(claims, max_size=6).map(tuple)
senders = st.builds(sender, anybody, counters)
targets = st.sampled_from([ME, *(peer_id(number) for number in range(1, 10))])
claimed: st.SearchStrategy[GossipMessage] = st.one_of(
    st.builds(Ping, senders, seqs, targets, bundles),
    st.builds(PingReq, senders, seqs, targets, bundles),
    st.builds(ConnectCheck, senders, seqs, targets, bundles),
    st.builds(Ack, senders, seqs, bundles),
    st.builds(Nack, senders, seqs, bundles),
    st.builds(Gossip, senders, bundles),
)
# Of a valid datagram: bytes overwritten at places, what is cut off its end, and what is hung on.
wounds = st.tuples(
    st.lists(st.tuples(st.integers(0, 1399), st.integers(0, 255)), max_size=4), st.integers(0, 80), st.binary(max_size=9)
)
Wound = tuple[list[tuple[int, int]], int, bytes]


class HostileNode(RuleBasedStateMachine):
    """One adversarial run."""

    @initialize(seed=st.integers(0, 2**16))
    def start(self, seed: int) -> None:
        self.now = 0.0
        self.core: MembershipCore = core_of(wordy(0), CONFIG, Random(seed))
        self.came: Counter[Address] = Counter()
        self.went: Counter[Address] = Counter()
        self.asked: list[MembershipEffect] = []
        for number in range(1, FIRST):
            self.core.receive(address_of(number), Gossip(sender(number), (wordy(number),)), 0.0)

    def _carry_out(self, effects: list[MembershipEffect]) -> None:
        self.asked = [*self.asked, *effects][-50:]
        for send in only(SendDatagram, effects):
            datagram = datagram_codec.encode(send.message)
            assert len(datagram) <= MAX_MESSAGE_BYTES, f"M8: a datagram of {len(datagram)} bytes"
            assert len(datagram) == datagram_codec.encoded_bytes(send.message), "M9: what is counted is what is sent"
            self.went[send.to] += len(datagram)
            if send.to in STRANGERS:
                went, came = self.went[send.to], self.came[send.to]
                assert went <= came, f"M9: {went} bytes to a stranger for {came}"

    def _arrive(self, source: Address, datagram: bytes) -> None:
        self.came[source] += len(datagram)
        before = self._picture()
        try:
            message = datagram_codec.decode(datagram)
        except BadDatagram:
            assert self._picture() == before, "M10: what is refused changes nothing"
            return
        except Exception as error:
            raise AssertionError(f"M10: {datagram.hex()} is neither message nor BadDatagram") from error
        assert datagram_codec.decode(datagram_codec.encode(message)) == message, f"M10: no message of ours: {message}"
        self._carry_out(self.core.receive(source, message, self.now))

    def _picture(self) -> object:
        swim = self.core.swim
        received = [(rumour.claim, rumour.sent) for rumour in swim.state.rumours.by_node.values()]
        return [member.claim(ME) for member in swim.members], received, self.core.deadline, self.core.fingerprint

    # what the adversary may do

    @rule(by=members, message=claimed)
    def a_member_speaks(self, by: int, message: GossipMessage) -> None:
        """From its own address; in anybody's name."""
        self._arrive(address_of(by), datagram_codec.encode(message))

    @rule(by=members, first=st.integers(FIRST, 40), count=st.integers(5, 20))
    def a_member_tells_of_a_crowd(self, by: int, first: int, count: int) -> None:
        for number in range(first, first + count, 5):
            self._arrive(address_of(by), datagram_codec.encode(Gossip(sender(by), tuple(map(wordy, range(number, number + 5))))))

    @rule(source=st.sampled_from(STRANGERS), message=claimed)
    def a_stranger_speaks(self, source: Address, message: GossipMessage) -> None:
        self._arrive(source, datagram_codec.encode(message))

    @rule(source=st.sampled_from([address_of(1), STRANGERS[0]]), message=claimed, wound=wounds)
    def a_wounded_message_comes(self, source: Address, message: GossipMessage, wound: Wound) -> None:
        overwritten, cut_bytes, more = wound
        raw = bytearray(datagram_codec.encode(message))
        for at, value in overwritten:
            raw[at % len(raw)] = value
        self._arrive(source, bytes(raw[: len(raw) - cut_bytes] + more)[:MAX_MESSAGE_BYTES])

    @rule(
        message=claimed,
        at=st.sampled_from((0, 9, 17, 21, 25, 29, 33, 37, 39, 41)),
        bad=st.sampled_from([b"\xff\xff", b"\x7f\x80\x00\x00", b"\x7c\x00", b"\x80\x00", bytes(4)]),
    )
    def a_head_of_odd_numbers_comes(self, message: GossipMessage, at: int, bad: bytes) -> None:
        raw = datagram_codec.encode(message)
        self._arrive(address_of(2), raw[:at] + bad + raw[at + len(bad) :])

    @rule(raw=st.binary(max_size=60))
    def noise_comes(self, raw: bytes) -> None:
        self._arrive(STRANGERS[1], raw)

    @rule(raw=st.binary(max_size=60), wound=wounds)
    def a_wounded_call_comes(self, raw: bytes, wound: Wound) -> None:
        """M10, of what comes over streams."""
        tail = bytearray(sync.encode(self.core.ask()))
        for at, value in wound[0]:
            tail[at % len(tail)] = value
        for bad in (raw, bytes(tail) + wound[2]):
            try:
                asked = sync.decode_sync(bad)
            except sync.BadSync:
                continue
            except Exception as error:
                raise AssertionError(f"M10: {bad.hex()} is neither a call nor BadSync") from error
            self._carry_out(self.core.answer(peer_id(1), asked, self.now)[1])

    @rule(dt=st.floats(0.01, 3.0))
    def time_passes(self, dt: float) -> None:
        end = self.now + dt
        while self.core.deadline <= end:
            self.now = max(self.now, self.core.deadline)
            self._carry_out(self.core.tick(self.now))
        self.now = end

    @precondition(lambda self: self.asked)
    @rule(refused=st.none() | st.booleans())
    def whoever_was_asked_answers(self, refused: bool | None) -> None:
        """Also what was asked on strangers' behalf."""
        asked, self.asked = self.asked, []
        for effect in asked:
            if isinstance(effect, TryConnect):
                self._carry_out(self.core.tried(effect.number, refused, self.now))
            elif (
                isinstance(effect, SendDatagram)
                and isinstance(effect.message, Ping)
                and effect.message.target in self.core.swim.members
            ):
                member = self.core.swim.members[effect.message.target]
                by = sender(int(member.node, 16), member.incarnation, member.epoch)
                self._arrive(member.address, datagram_codec.encode(Ack(by, effect.message.seq)))

    # what holds at any time

    @invariant()
    def m8_queues_and_tables_are_bounded_and_every_rumour_fits_a_datagram(self) -> None:
        swim = self.core.swim
        count = sum(1 for _ in swim.members)
        assert count <= MAX_MEMBERS, f"M8: {count} members"
        assert len(swim.state.rumours) <= count, "M8: more rumours than members"
        assert swim.refusals.connect_probes <= MAX_CONNECT_PROBES and self.core.allowance.accounts <= MAX_ACCOUNTS, "M8"
        largest = Ping(swim.state.sender(self.now), 2**32 - 1, peer_id(1), where=bytes(32))
        for rumour in swim.state.rumours.by_node.values():
            assert len(datagram_codec.claim_bytes(rumour.claim)) == rumour.size_bytes, "M8: a rumour has its recorded size"
            assert rumour.size_bytes <= datagram_codec.claim_budget_bytes(largest), f"M8: {rumour.claim} can never be sent"
