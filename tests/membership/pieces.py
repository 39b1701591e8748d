"""What the tests of membership's cores are made of: one node among peers it has heard of, and shorthand."""

from __future__ import annotations

from random import Random
from typing import TypeVar

import msgspec

from membership.core.config import MembershipConfig
from membership.core.core import MembershipCore
from membership.core.effects import MembershipEffect, SendDatagram
from membership.simulation.signer import StandInSigner
from mesh.ids import Address, NodeId
from mesh.view import PeerState
from mesh.wire.gossip import Ack, Alive, Claim, Gossip, Left, Ping, Sender
from mesh.wire.statements import alive_statement, left_statement
from mesh.wire.sync import MemberRecord, decode_sync, decode_synced, encode

CONFIG = MembershipConfig()
ME = NodeId("0" * 16)
E = TypeVar("E")


def peer_id(number: int) -> NodeId:
    return NodeId(f"{number:016x}")


def address_of(number: int) -> Address:
    return "10.0.0.1", 7000 + number


def alive(number: int, incarnation: int = 0, epoch: int = 1, name: str | None = None) -> Alive:
    host, port = address_of(number)
    return signed(Alive(peer_id(number), epoch, incarnation, name or f"node-{number}", host, port))


def signed(claim: Alive) -> Alive:
    """Returns an own claim with the key, so that it is accepted for an unknown node too."""
    key = claim.node.encode()
    signature = StandInSigner(claim.node).sign(alive_statement(claim))
    return msgspec.structs.replace(claim, signature=signature, key=key if claim.incarnation == 0 else b"")


def left(node: NodeId, epoch: int, incarnation: int) -> Left:
    bare = Left(node, epoch, incarnation)
    return msgspec.structs.replace(bare, signature=StandInSigner(node).sign(left_statement(bare)))


def member_record(words: Alive, state: PeerState = PeerState.ALIVE, age_s: float = 0.0, cause: str = "") -> MemberRecord:
    """Returns another node's record of a node whose own claim is `words`."""
    key, signature = words.node.encode(), words.signature
    if state is PeerState.LEFT:
        signature = left(words.node, words.epoch, words.incarnation).signature
    place = words.name, words.host, words.port, words.region
    return MemberRecord(words.node, words.epoch, words.incarnation, state, *place, age_s, cause, key=key, signature=signature)


def core_of(me: Alive, config: MembershipConfig, rng: Random, now: float = 0.0) -> MembershipCore:
    return MembershipCore(me, StandInSigner(me.node), config, rng, now)


def sender(number: int, incarnation: int = 0, epoch: int = 1, fingerprint: int = 0) -> Sender:
    return Sender(peer_id(number), epoch, incarnation, fingerprint)


def node_among(peers: int, *, seed: int = 1, config: MembershipConfig = CONFIG, numbered: int = 0) -> MembershipCore:
    """Returns a node with `peers` members, numbered from 1, and no queued rumours."""
    core = core_of(alive(numbered), config, Random(seed))
    for number in range(1, peers + 1):
        core.receive(address_of(number), gossip(number, alive(number)), 0.0)
    core.swim.state.rumours.by_node.clear()
    return core


def gossip(by: int, *claims: Claim, incarnation: int = 0) -> Gossip:
    return Gossip(sender(by, incarnation), claims)


def exchange(asker: MembershipCore, teller: MembershipCore, now: float) -> None:
    """The two calls of an exchange, through the codec, as the shell makes them."""
    synced, _ = teller.answer(asker.me, decode_sync(encode(asker.ask())), now)
    wanted, _ = asker.learn(address_of(int(teller.me, 16)), decode_synced(encode(synced)), now)
    if wanted is not None:
        teller.answer(asker.me, decode_sync(encode(wanted)), now)


def state(core: MembershipCore, number: int) -> PeerState | None:
    member = core.swim.members.get(peer_id(number))
    return member.state if member is not None else None


def only(kind: type[E], effects: list[MembershipEffect]) -> list[E]:
    return [effect for effect in effects if isinstance(effect, kind)]


def messages(effects: list[MembershipEffect], kind: type[E]) -> list[tuple[Address, E]]:
    return [(send.to, send.message) for send in only(SendDatagram, effects) if isinstance(send.message, kind)]


def run_to(core: MembershipCore, until: float, answers: bool = False) -> list[MembershipEffect]:
    """Ticks whenever something is due up to `until`; with `answers` every direct ping is acknowledged at once."""
    effects: list[MembershipEffect] = []
    while core.deadline <= until:
        now = core.deadline
        new = core.tick(now)
        effects += new
        if answers:
            for to, ping in messages(new, Ping):
                member = core.swim.members[ping.target]
                by = Sender(ping.target, member.epoch, member.incarnation, core.fingerprint)
                effects += core.receive(to, Ack(by, ping.seq), now)
    return effects
