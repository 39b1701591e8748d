"""Limits the bytes sent to an unproven address to the bytes received from it, so that no node amplifies a flood.

The source address of a datagram can be forged, and answers carry claims: a ping of 40 bytes may draw 1,400. So an address is
unproven unless a member has claimed it in a signed claim. Bytes received from an unproven address are credited to its account
and bytes sent there are debited. Claims that the account does not cover are left out, and an answer that does not fit without
claims is not sent. An honest node that is not a member yet loses nothing that it needs: an ack is shorter than its ping.
Source: the anti-amplification limit of QUIC (RFC 9000, section 8.1), with a factor of 1.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from membership.core.effects import MembershipEffect, SendDatagram
from mesh.wire.datagram_codec import encoded_bytes

if TYPE_CHECKING:
    from membership.core.members import Members
    from mesh.ids import Address
    from mesh.wire.gossip import GossipMessage

MAX_ACCOUNTS = 1024
KEPT_S = 30.0  # longer than any answer takes, relayed answers included


@dataclass(slots=True)
class Account:
    left_bytes: int
    at: float  # time of the last datagram from the address


class Allowance:
    """Keeps an account of bytes for each unproven address."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._accounts: dict[Address, Account] = {}
        self.dropped: Counter[str] = Counter()  # "strangers": no account was free; "uncovered": an answer not sent

    @property
    def accounts(self) -> int:
        """The number of unproven addresses with an account."""
        return len(self._accounts)

    def credit(self, source: Address, message: GossipMessage, now: float) -> bool:
        """Credits a received datagram to its address. Returns False if all accounts are taken: the datagram must be dropped."""
        member = self._members.get(message.sender.node)
        if member is not None and member.address == source:
            if self._accounts:
                self._accounts.pop(source, None)
            return True
        account = self._accounts.get(source)
        if account is None:
            if len(self._accounts) >= MAX_ACCOUNTS:
                self._accounts = {at: kept for at, kept in self._accounts.items() if now - kept.at < KEPT_S}
                if len(self._accounts) >= MAX_ACCOUNTS:
                    self.dropped["strangers"] += 1
                    return False
            account = self._accounts[source] = Account(0, now)
        account.left_bytes += encoded_bytes(message)
        account.at = now
        return True

    def covered(self, effects: list[MembershipEffect]) -> list[MembershipEffect]:
        """Returns the effects without the claims and datagrams that no account covers."""
        if not self._accounts:
            return effects
        return [kept for effect in effects if (kept := self._covered(effect)) is not None]

    def _covered(self, effect: MembershipEffect) -> MembershipEffect | None:
        account = self._accounts.get(effect.to) if isinstance(effect, SendDatagram) else None
        if (
            not isinstance(effect, SendDatagram)
            or account is None
            or any(member.address == effect.to for member in self._members)
        ):
            return effect
        message = effect.message
        while message.claims and encoded_bytes(message) > account.left_bytes:
            message = msgspec.structs.replace(message, claims=message.claims[:-1])
        if (size_bytes := encoded_bytes(message)) > account.left_bytes:
            self.dropped["uncovered"] += 1
            return None
        account.left_bytes -= size_bytes
        return SendDatagram(effect.to, message)
