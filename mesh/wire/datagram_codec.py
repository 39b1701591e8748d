"""Encodes gossip messages: a head of fixed fields, then claims.

Head, big endian: kind 1, sender 8, fingerprint 8, load 24 (`mesh.wire.load`), lag in milliseconds 2, epoch and incarnation as
varints, then the fields of the kind: number 4, target 8, refused 1. A message without claims and coordinate ends here. Otherwise
one MessagePack array follows: the claims, each an array with its tag first and its ids as 8 bytes, and, in a ping or an ack, its
sender's network coordinate. A newer version may append elements to either array; an older version ignores them.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Final

import msgspec

from mesh.ids import NodeId
from mesh.wire.gossip import (
    MAX_CLAIMS,
    MAX_COUNTER,
    MAX_MESSAGE_BYTES,
    Ack,
    Alive,
    BadDatagram,
    Claim,
    ConnectCheck,
    ConnectChecked,
    Dead,
    Gossip,
    GossipMessage,
    Left,
    Nack,
    Ping,
    PingReq,
    Sender,
    Suspect,
    Where,
    load_is_sane,
)
from mesh.wire.load import LOAD_BYTES, pack_load, unpack_load

_KINDS: Final[tuple[type[GossipMessage], ...]] = (Ping, Ack, PingReq, Nack, Gossip, ConnectCheck, ConnectChecked)
_KIND_OF = {kind: number for number, kind in enumerate(_KINDS, 1)}
_WITH_TARGET = (Ping, PingReq, ConnectCheck)
_WITH_WHERE = (Ping, Ack)
_FRONT = struct.Struct("!B8sQ")
_LAG = struct.Struct("!H")
_NUMBER = struct.Struct("!I")
_LAG_AT = _FRONT.size + LOAD_BYTES
_COUNTERS_AT = _LAG_AT + _LAG.size
_U16 = 2**16 - 1
_COUNTER_BYTES = 7  # of a varint of 48 bits
_BIN_HEAD_BYTES = 2
_LIST_BYTES = 4  # the array heads before the claims, at most
_FIXED_BYTES = {
    kind: _COUNTERS_AT + (kind is not Gossip) * _NUMBER.size + (kind in _WITH_TARGET) * 8 + (kind is ConnectChecked)
    for kind in _KINDS
}
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[object])
_CLAIMS_CACHED = 8192  # a claim is sent about a dozen times, and its size is needed as often


def encode(message: GossipMessage) -> bytes:
    """Returns the bytes to seal. The caller keeps the claims within `claim_budget_bytes`."""
    sender = message.sender
    parts = [
        _FRONT.pack(_KIND_OF[type(message)], bytes.fromhex(sender.node), sender.fingerprint),
        pack_load(sender.load, sender.load_age_ms),
        _LAG.pack(min(sender.lag_ms, _U16)),
        _counter(sender.epoch),
        _counter(sender.incarnation),
    ]
    if not isinstance(message, Gossip):
        parts.append(_NUMBER.pack(message.seq))
    if isinstance(message, _WITH_TARGET):
        parts.append(bytes.fromhex(message.target))
    elif isinstance(message, ConnectChecked):
        parts.append(b"\1" if message.refused else b"\0")
    where = _where(message)
    if message.claims or where is not None:
        parts.append((b"\x91" if where is None else b"\x92") + _list_head(len(message.claims)))
        parts += [claim_bytes(claim) for claim in message.claims]
    if where is not None:
        parts.append(_encoder.encode(where))
    return b"".join(parts)


def encoded_bytes(message: GossipMessage) -> int:
    """Returns the length of `encode(message)` without encoding the message."""
    sender, claims = message.sender, message.claims
    size_bytes = _FIXED_BYTES[type(message)] + _counter_bytes(sender.epoch) + _counter_bytes(sender.incarnation)
    where = _where(message)
    if claims or where is not None:
        size_bytes += 1 + len(_list_head(len(claims))) + sum([len(claim_bytes(claim)) for claim in claims])
    return size_bytes if where is None else size_bytes + _BIN_HEAD_BYTES + len(where)


def _where(message: GossipMessage) -> bytes | None:
    return message.where if isinstance(message, _WITH_WHERE) else None


@lru_cache(_CLAIMS_CACHED)
def claim_bytes(claim: Claim) -> bytes:
    """Returns the bytes of one claim in a message."""
    match claim:
        case Suspect() | Dead():
            node, epoch, incarnation, by, *rest = msgspec.structs.astuple(claim)
            fields = (bytes.fromhex(node), epoch, incarnation, bytes.fromhex(by), *rest)
        case Alive() | Left():
            node, *rest = msgspec.structs.astuple(claim)
            fields = (bytes.fromhex(node), *rest)
    return _encoder.encode((claim.__struct_config__.tag, *fields))


def claim_budget_bytes(bare: GossipMessage) -> int:
    """Returns how many bytes of claims fit into `bare`, a message without claims."""
    return MAX_MESSAGE_BYTES - encoded_bytes(bare) - _LIST_BYTES


def decode(opened: bytes) -> GossipMessage:
    """Decodes the body of an opened seal.

    Raises:
        BadDatagram: too long, too short, of another shape, or out of bounds.
    """
    if len(opened) > MAX_MESSAGE_BYTES:
        raise BadDatagram(f"a message takes at most {MAX_MESSAGE_BYTES} bytes, got {len(opened)}")
    try:
        return _decoded(opened)
    except (msgspec.MsgspecError, struct.error, IndexError, ValueError, TypeError, RecursionError) as error:
        raise BadDatagram(f"not a gossip message: {error}") from None


def _decoded(opened: bytes) -> GossipMessage:
    number, node, fingerprint = _FRONT.unpack_from(opened)
    if not 1 <= number <= len(_KINDS):
        raise BadDatagram(f"no kind of message has the number {number}")
    load, age_ms = unpack_load(opened, _FRONT.size)
    if not load_is_sane(load):
        raise BadDatagram("a load record holds negative or infinite figures")
    (lag_ms,) = _LAG.unpack_from(opened, _LAG_AT)
    epoch, at = _read_counter(opened, _COUNTERS_AT)
    incarnation, at = _read_counter(opened, at)
    sender = Sender(NodeId(node.hex()), epoch, incarnation, fingerprint, load, age_ms, lag_ms)
    kind = _KINDS[number - 1]
    if kind is Gossip:
        return Gossip(sender, _read_tail(opened, at)[0])
    (seq,) = _NUMBER.unpack_from(opened, at)
    at += _NUMBER.size
    if kind in _WITH_TARGET:
        target = NodeId(_eight(opened[at : at + 8]).hex())
        claims, where = _read_tail(opened, at + 8)
        return Ping(sender, seq, target, claims, where) if kind is Ping else kind(sender, seq, target, claims)
    if kind is ConnectChecked:
        return ConnectChecked(sender, seq, opened[at] == 1, _read_tail(opened, at + 1)[0])
    claims, where = _read_tail(opened, at)
    return Ack(sender, seq, claims, where) if kind is Ack else Nack(sender, seq, claims)


def _read_tail(opened: bytes, at: int) -> tuple[tuple[Claim, ...], bytes | None]:
    """Returns the claims and the sender's network coordinate, None without one."""
    if at == len(opened):
        return (), None
    claims, *more = _decoder.decode(opened[at:])
    if not isinstance(claims, list) or len(claims) > MAX_CLAIMS:
        raise BadDatagram(f"expected a list of at most {MAX_CLAIMS} claims")
    where = msgspec.convert(more[0], Where | None, builtin_types=(bytes,)) if more else None
    return tuple(_read_claim(fields) for fields in claims), where


def _read_claim(fields: object) -> Claim:
    if not isinstance(fields, list):
        raise BadDatagram("expected a claim as a list")
    tag, node, *rest = fields
    if tag in ("s", "d"):
        rest[2] = _eight(rest[2]).hex()
    claim: Claim = msgspec.convert([tag, _eight(node).hex(), *rest], Claim, builtin_types=(bytes,))
    return claim


def _eight(raw: object) -> bytes:
    if not isinstance(raw, bytes) or len(raw) != 8:
        raise BadDatagram("an id takes 8 bytes")
    return raw


def _counter(number: int) -> bytes:
    """Returns a varint: 7 bits a byte, lowest first; all bytes but the last have their top bit set."""
    if number < 0x80:
        return bytes((number,))
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _counter_bytes(number: int) -> int:
    return 1 if number < 0x80 else (number.bit_length() + 6) // 7


def _read_counter(raw: bytes, at: int) -> tuple[int, int]:
    """Returns the varint that begins at `at`, and the index behind its last byte."""
    number = 0
    for step in range(_COUNTER_BYTES):
        byte = raw[at + step]
        number |= (byte & 0x7F) << 7 * step
        if byte < 0x80:
            if number > MAX_COUNTER or (not byte and step):
                raise BadDatagram("a counter is out of bounds, or longer than it needs to be")
            return number, at + step + 1
    raise BadDatagram("a counter without an end")


def _list_head(length: int) -> bytes:
    """Returns MessagePack's head of an array of `length` elements."""
    return bytes((0x90 | length,)) if length < 16 else b"\xdc" + length.to_bytes(2, "big")
