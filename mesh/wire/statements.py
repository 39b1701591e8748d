"""The bytes that a node signs in claims about itself, independent of the encoding in which a claim travels.

Each statement begins with its kind, so a signature of one kind is never valid for another.
"""

from __future__ import annotations

import msgspec

from mesh.wire.gossip import Alive, Left

_encode = msgspec.msgpack.Encoder().encode


def alive_statement(claim: Alive) -> bytes:
    """Returns the statement that the node is alive in this epoch and incarnation, under this name and at this address."""
    return _encode(
        ("alive", claim.node, claim.epoch, claim.incarnation, claim.name, claim.host, claim.port, claim.region),
    )


def left_statement(claim: Left) -> bytes:
    """Returns the statement that the node leaves on purpose."""
    return _encode(("left", claim.node, claim.epoch, claim.incarnation))
