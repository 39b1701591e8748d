"""What two processes with one identity say to each other: the calls `membership.twin` and `membership.where`.

An answer is signed with the identity's own key over the asker's challenge: no other holder of the mesh key can pretend to be a
second process of a node, and no answer can be used again.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from mesh.ids import Address, NodeId
from mesh.wire.gossip import Host, Name, Port, Signature

TWIN_KIND = "membership.twin"  # the call {challenge, run} -> {answer, signature}
WHERE_KIND = "membership.where"  # the call {node} -> {host, port} of a live member, or {}
CHALLENGE_BYTES = 16
ASKER, ANSWERER = "asker", "answerer"
MAX_AGE_S = 1e10


class ProcessRun(msgspec.Struct, frozen=True):
    """One process, and how long it has lived, by its own clock."""

    host: Host
    port: Port
    name: Name
    age_s: Annotated[float, Meta(ge=0, le=MAX_AGE_S)]

    @property
    def address(self) -> Address:
        return self.host, self.port


class TwinAnswer(msgspec.Struct, frozen=True):
    """`stops`: which of the two is to stop, where the answerer judges: `ASKER`, `ANSWERER`; empty: the asker judges."""

    run: ProcessRun
    stops: str


class TwinQuestion(msgspec.Struct, frozen=True):
    challenge: Annotated[bytes, Meta(min_length=CHALLENGE_BYTES, max_length=CHALLENGE_BYTES)]
    run: ProcessRun


class SignedAnswer(msgspec.Struct, frozen=True):
    answer: TwinAnswer
    signature: Signature


_encode = msgspec.msgpack.Encoder().encode


def statement(node: NodeId, challenge: bytes, answer: TwinAnswer) -> bytes:
    """What the answerer signs. It begins with what it is, so the signature holds for nothing else."""
    run = answer.run
    return _encode(("twin", node, challenge, run.host, run.port, run.name, run.age_s, answer.stops))
