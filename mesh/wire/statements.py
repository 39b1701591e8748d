"""What exactly a node signs when it speaks of itself: bytes that do not depend on how a claim happens to travel.

Each begins with what it is, so a signature under one kind of words never holds for another.
"""

from __future__ import annotations

import msgspec

from mesh.wire.gossip import Alive, Left

_encode = msgspec.msgpack.Encoder().encode


def alive_statement(claim: Alive) -> bytes:
    """I live in this run, at this incarnation, under this name, and am reached here."""
    return _encode(
        ("alive", claim.node, claim.epoch, claim.incarnation, claim.name, claim.host, claim.port, claim.region),
    )


def left_statement(claim: Left) -> bytes:
    """I am going, on purpose."""
    return _encode(("left", claim.node, claim.epoch, claim.incarnation))
