"""The calls `membership.twin` and `membership.where` between two processes with one identity.

An answer is signed with the identity's key over the asker's challenge: another holder of the mesh key cannot pretend to be a
second process of a node, and no answer can be replayed.
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
    """One process, and its age by its own clock."""

    host: Host
    port: Port
    name: Name
    age_s: Annotated[float, Meta(ge=0, le=MAX_AGE_S)]

    @property
    def address(self) -> Address:
        return self.host, self.port


class TwinAnswer(msgspec.Struct, frozen=True):
    """`stops`: which of the two processes must stop: `ASKER`, `ANSWERER`; empty: the asker decides."""

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
    """Returns the bytes that the answerer signs. They begin with their kind, so the signature is valid for nothing else."""
    run = answer.run
    return _encode(("twin", node, challenge, run.host, run.port, run.name, run.age_s, answer.stops))
