"""The shared state of one failure detector: this node, the members, and pending claims and changes.

Refutation (`refutation.py`), claim processing (`claims.py`), refusal detection (`refusal_detection.py`) and probing (`swim.py`)
share one `NodeState`. Changes of members are collected here until a call from outside ends with `flush`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from membership.core.claim_verifier import ClaimVerifier
from membership.core.config import MembershipConfig
from membership.core.dissemination import Rumours, transmit_limit
from membership.core.distances import Distances
from membership.core.effects import MemberForgotten, MembershipEffect, SendDatagram, StartSync
from membership.core.exchanges import Exchanges
from membership.core.health import LAG_MAX_S, LocalHealth
from membership.core.members import Member, Members, description_of
from membership.core.regions import some_gossip_peers
from membership.facts.fingerprint import Fingerprint
from mesh.ids import Address, NodeId
from mesh.keys.signing import Signer
from mesh.view import Load, PeerState
from mesh.wire.datagram_codec import claim_budget_bytes
from mesh.wire.gossip import ZERO_LOAD, Alive, Claim, Gossip, GossipMessage, Sender

if TYPE_CHECKING:
    from random import Random

WAY_FACTOR = 3.0  # a probe waits for so many expected round trips


class NodeState:
    """The state that the parts of one failure detector share. No decisions about members here."""

    def __init__(
        self,
        me: Alive,
        signer: Signer,
        config: MembershipConfig,
        rng: Random,
        now: float,
        fingerprint: Fingerprint,
        table: type[Members] = Members,
    ) -> None:
        """`table`: the class of the member table; the simulator has its own."""
        self.me: NodeId = me.node
        self.config = config
        self.rng = rng
        self.left = False  # this node left or was displaced: it sends nothing more
        self.verifier = ClaimVerifier(signer)
        self.rumours = Rumours()
        self.myself = Member(me.node, description_of(me), me.epoch, me.incarnation, PeerState.ALIVE, now)
        self.myself.key, self.myself.signature = self.verifier.key, self.verifier.signed(me).signature
        self.members = table(self.myself, fingerprint)
        self.load, self.load_at = ZERO_LOAD, now
        self.health = LocalHealth()
        self.distances = Distances(rng)
        self.linked: dict[NodeId, int] = {}  # links open with each peer, in either direction
        self.behind = False  # a claim referred to a node's own claim that has not arrived here
        self.next_gossip_at = now
        self._news: dict[NodeId, Claim] = {}
        self._changes: list[MembershipEffect] = []
        self._exchanges = Exchanges(config, now)

    @property
    def is_pending(self) -> bool:
        """There are changes or claims that `flush` would send."""
        return bool(self._changes or self._news)

    def set_load(self, load: Load, now: float) -> None:
        """Stores this node's own load, which every later message carries."""
        self.load, self.load_at = load, now

    def sender(self, now: float) -> Sender:
        age_ms = max(0, round((now - self.load_at) * 1000))
        lag_ms = round(self.health.lag_s(now) * 1000)
        me, fingerprint = self.myself, self.members.fingerprint.value
        return Sender(self.me, me.epoch, me.incarnation, fingerprint, self.load, age_ms, lag_ms)

    def suspected(self) -> list[Member]:
        return [self.members[node] for node in sorted(self.members.suspects)] if self.members.suspects else []

    def filled(self, bare: GossipMessage, first: Sequence[Claim]) -> GossipMessage:
        """Returns `bare` with `first` and as many rumours as fit the datagram."""
        if not first and not self.rumours.by_node:
            return bare
        limit = transmit_limit(self.config.transmit_multiplier, self.members.live_count)
        claims = self.rumours.take(claim_budget_bytes(bare), limit, first)
        return msgspec.structs.replace(bare, claims=claims)

    def queue_claim(self, claim: Claim) -> None:
        """Queues a claim: to a few peers with the next `flush`, then with whatever is sent."""
        self.rumours.put(claim)
        self._news[claim.node] = claim

    def note(self, change: MembershipEffect) -> None:
        self._changes.append(change)

    def take_changes(self) -> list[MembershipEffect]:
        changes, self._changes = self._changes, []
        return changes

    def flush(self, now: float, without: tuple[NodeId, ...] = ()) -> list[MembershipEffect]:
        """Takes the pending changes, and sends the pending claims to a few peers at once, not to those `without`."""
        effects = self.take_changes()
        if effects:
            self._exchanges.note(self.members.fingerprint.value, now)
        if self._news:
            news, self._news = self._news, {}
            if self.next_gossip_at <= now:  # there was nothing to send until now
                self.next_gossip_at = now + self.config.gossip_period_s
            bare = Gossip(self.sender(now))
            claims = Rumours().take(claim_budget_bytes(bare), 1, list(news.values()))
            for peer in some_gossip_peers(self.members, self.config.eager_peers, self.rng, without):
                effects.append(SendDatagram(self.members.address_of(peer), Gossip(bare.sender, claims)))
        return effects

    def forget(self, member: Member) -> None:
        """Removes all that is stored about a member that is gone."""
        self.members.forget(member.node)
        self.distances.forget(member)
        self.rumours.forget(member.node)
        self.note(MemberForgotten(member.node))

    def request_exchange(self, address: Address, now: float) -> bool:
        """Asks for an exchange, unless this peer, or this node, had one a moment ago."""
        if not self._exchanges.take(address, now):
            return False
        self.note(StartSync(address))
        return True

    def compare(self, fingerprint: int, address: Address, now: float) -> None:
        """Compares with a peer's fingerprint. A difference starts an exchange, unless rumours will remove it soon."""
        mine = self.members.fingerprint.value
        self._exchanges.note(mine, now)
        if fingerprint != mine and self._exchanges.settled(self.members.live_count, now):
            self.request_exchange(address, now)

    def slack_s(self, member: Member | None, now: float) -> float:
        """How much longer than usual an answer of `member` may take: its lag, ours, and a longer round trip."""
        if member is None:
            return min(LAG_MAX_S, self.health.lag_s(now))
        far_s = max(0.0, WAY_FACTOR * self.distances.expected_s(member) - self.config.probe_timeout_s)
        return min(LAG_MAX_S, self.health.lag_s(now) + member.lag_s + far_s)
