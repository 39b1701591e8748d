"""What the tests of membership's cores are made of: one node among peers it has heard of, and shorthand."""

from __future__ import annotations

from random import Random
from typing import TypeVar

from membership.config import MembershipConfig
from membership.core import MembershipCore
from membership.effects import Effect, Send
from mesh.gossip import Ack, Alive, Claim, Gossip, Ping, Sender
from mesh.ids import Address, NodeId
from mesh.view import PeerState

CONFIG = MembershipConfig()
ME = NodeId("0" * 16)
E = TypeVar("E")


def peer_id(number: int) -> NodeId:
    return NodeId(f"{number:016x}")


def address_of(number: int) -> Address:
    return "10.0.0.1", 7000 + number


def alive(number: int, incarnation: int = 0, epoch: int = 1, name: str | None = None) -> Alive:
    host, port = address_of(number)
    return Alive(peer_id(number), epoch, incarnation, name or f"node-{number}", host, port)


def sender(number: int, incarnation: int = 0, epoch: int = 1, fingerprint: int = 0) -> Sender:
    return Sender(peer_id(number), epoch, incarnation, fingerprint)


def node_among(peers: int, *, seed: int = 1, config: MembershipConfig = CONFIG) -> MembershipCore:
    """A node that has heard of `peers` others, numbered from 1, and has told all it had to tell."""
    core = MembershipCore(alive(0), config, Random(seed), 0.0)
    for number in range(1, peers + 1):
        core.receive(address_of(number), gossip(number, alive(number)), 0.0)
    core.swim.rumours._by_node.clear()
    return core


def gossip(by: int, *claims: Claim, incarnation: int = 0) -> Gossip:
    return Gossip(sender(by, incarnation), claims)


def state(core: MembershipCore, number: int) -> PeerState | None:
    member = core.swim.members.get(peer_id(number))
    return member.state if member is not None else None


def only(kind: type[E], effects: list[Effect]) -> list[E]:
    return [effect for effect in effects if isinstance(effect, kind)]


def messages(effects: list[Effect], kind: type[E]) -> list[tuple[Address, E]]:
    return [(send.to, send.message) for send in only(Send, effects) if isinstance(send.message, kind)]


def run_to(core: MembershipCore, until: float, answers: bool = False) -> list[Effect]:
    """Ticks whenever something is due up to `until`; with `answers` every direct ping is acknowledged at once."""
    effects: list[Effect] = []
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
