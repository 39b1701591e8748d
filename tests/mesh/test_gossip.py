"""Datagrams: what fits, what is read back, and what garbage does."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.gossip import (
    MAX_CLAIM_BYTES,
    MAX_DATAGRAM_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_SEAL_BYTES,
    Ack,
    Alive,
    BadDatagram,
    Dead,
    Gossip,
    Left,
    Message,
    Ping,
    PingReq,
    Sender,
    Suspect,
    claim_budget_bytes,
    decode,
    encode,
    encoded_bytes,
)
from mesh.ids import NodeId
from mesh.seal import KeySeal, PlainSeal
from mesh.view import Load

A, B = NodeId("a" * 16), NodeId("b" * 16)
SENDER = Sender(A, 1, 2, 2**64 - 1, Load(1, 2, 3, 4, 5, 6.5, 7.5), 12)
LONGEST = Alive(A, 2**48, 2**48, "n" * 32, "h" * 46, 65535, "r" * 16, b"s" * 64, b"k" * 32)

ids = st.text("0123456789abcdef", min_size=16, max_size=16).map(NodeId)
counters = st.integers(0, 2**48)
signatures = st.binary(max_size=64)
names = st.text(max_size=10).filter(lambda name: len(name.encode()) <= 32)
claims = st.one_of(
    st.builds(Alive, ids, counters, counters, names, st.just("::1"), st.integers(0, 65535), st.just("r"), signatures),
    st.builds(Suspect, ids, counters, counters, ids),
    st.builds(Dead, ids, counters, counters, ids),
    st.builds(Left, ids, counters, counters, signatures),
)
claim_lists = st.lists(claims, max_size=8).map(tuple)
senders = st.builds(Sender, ids, counters, counters, st.integers(0, 2**64 - 1), st.just(SENDER.load), st.integers(0, 2**31))
seqs = st.integers(0, 2**32)
messages = st.one_of(
    st.builds(Ping, senders, seqs, ids, claim_lists),
    st.builds(Ack, senders, seqs, claim_lists),
    st.builds(PingReq, senders, seqs, ids, claim_lists),
    st.builds(Gossip, senders, claim_lists),
)


@given(messages)
def test_a_message_is_read_back_as_it_was_written(message: Message) -> None:
    assert decode(encode(message)) == message


@settings(max_examples=500)
@given(st.binary(max_size=MAX_MESSAGE_BYTES + 100))
def test_any_bytes_are_a_message_or_a_bad_datagram(raw: bytes) -> None:
    try:
        assert isinstance(decode(raw), Message)
    except BadDatagram:
        pass


@settings(max_examples=300)
@given(messages, st.data())
def test_a_message_with_one_byte_changed_is_a_message_or_a_bad_datagram(message: Message, data: st.DataObject) -> None:
    raw = bytearray(encode(message))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(raw))
    except BadDatagram:
        pass


@pytest.mark.parametrize(
    "bad",
    [
        Sender(A, 1, 2, 3, Load(running=-1)),
        Sender(A, 1, 2, 3, Load(step_ms=math.nan)),
        Sender(A, 1, 2, 3, Load(prefill_tok_s=math.inf)),
        Sender(NodeId("A" * 16), 1, 2, 3),
        Sender(NodeId("a" * 16 + "\n"), 1, 2, 3),
        Sender(NodeId("a" * 15), 1, 2, 3),
        Sender(A, -1, 2, 3),
        Sender(A, 2**48 + 1, 2, 3),
    ],
)
def test_a_sender_out_of_bounds_is_refused(bad: Sender) -> None:
    with pytest.raises(BadDatagram):
        decode(encode(Gossip(bad)))


def test_a_name_is_measured_in_bytes_not_in_characters() -> None:
    with pytest.raises(ValueError, match="name may take 32 bytes"):
        Alive(A, 1, 1, "é" * 17, "h", 1)
    raw = msgspec.msgpack.encode(["say", msgspec.to_builtins(SENDER), [["a", A, 1, 1, "é" * 17, "h", 1, ""]]])
    with pytest.raises(BadDatagram):
        decode(raw)


def test_too_many_bytes_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(BadDatagram, match="at most"):
        decode(encode(Gossip(SENDER, (LONGEST,) * 20)))


def test_a_newer_version_may_append_fields() -> None:
    raw = msgspec.msgpack.encode(["l", B, 1, 2, b"signature", "of a later version"])
    message = msgspec.msgpack.encode(["say", msgspec.to_builtins(SENDER), [msgspec.Raw(raw)], {"more": 1}])
    assert decode(message) == Gossip(SENDER, (Left(B, 1, 2, b"signature"),))


def test_the_longest_claim_fits_its_limit_and_a_full_message_the_datagram() -> None:
    assert encoded_bytes(LONGEST) <= MAX_CLAIM_BYTES
    bare = Ping(SENDER, 2**32, B)
    fitting = (LONGEST,) * (claim_budget_bytes(bare) // encoded_bytes(LONGEST))
    full = encode(Ping(SENDER, 2**32, B, fitting))
    assert MAX_MESSAGE_BYTES - MAX_CLAIM_BYTES < len(full) <= MAX_MESSAGE_BYTES
    for seal in (PlainSeal(), KeySeal([bytes(32)])):
        assert seal.overhead_bytes <= MAX_SEAL_BYTES
        assert len(seal.seal(full)) <= MAX_DATAGRAM_BYTES


def test_a_usual_refutation_with_its_signature_takes_less_than_150_bytes() -> None:
    assert encoded_bytes(Alive(A, 12, 3, "gpu-box-17-a1b2", "192.168.100.17", 7946, "eu-west", b"s" * 64)) < 150
