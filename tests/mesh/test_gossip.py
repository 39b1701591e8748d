"""Datagrams: what fits, what is read back, and what garbage does."""

from __future__ import annotations

import math
import struct

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.ids import NodeId
from mesh.keys.seal import KeySeal, PlainSeal
from mesh.view import Load
from mesh.wire.datagram_codec import claim_budget_bytes, claim_bytes, decode, encode, encoded_bytes
from mesh.wire.gossip import (
    MAX_CLAIM_BYTES,
    MAX_COUNTER,
    MAX_DATAGRAM_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_SEAL_BYTES,
    Ack,
    Alive,
    BadDatagram,
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
)
from mesh.wire.load import LOAD_BYTES, pack_load, unpack_load

A, B = NodeId("a" * 16), NodeId("b" * 16)
SENDER = Sender(A, 1, 2, 2**64 - 1, Load(1, 2, 3, 4, 5, 6.5, 7.5), 12)
COUNTERS_AT = 43  # in a message
LONGEST = Alive(A, 2**48, 2**48, "n" * 32, "h" * 46, 65535, "r" * 16, b"s" * 64, b"k" * 32)

ids = st.text("0123456789abcdef", min_size=16, max_size=16).map(NodeId)
counters = st.integers(0, MAX_COUNTER)
signatures = st.binary(max_size=64)
names = st.text(max_size=10).filter(lambda name: len(name.encode()) <= 32)
claims = st.one_of(
    st.builds(Alive, ids, counters, counters, names, st.just("::1"), st.integers(0, 65535), st.just("r"), signatures),
    st.builds(Suspect, ids, counters, counters, ids, st.booleans()),
    st.builds(Dead, ids, counters, counters, ids, st.sampled_from(["timeout", "refused"])),
    st.builds(Left, ids, counters, counters, signatures),
)
claim_lists = st.lists(claims, max_size=18).map(tuple)
u16s, u32s = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)
rates = st.floats(0, 2.0**127, width=32), st.floats(0, 65504, width=16)
loads = st.builds(Load, u16s, u16s, u32s, u32s, u32s, *rates)
senders = st.builds(Sender, ids, counters, counters, st.integers(0, 2**64 - 1), loads, u16s, u16s)
messages = st.one_of(
    st.builds(Ping, senders, u32s, ids, claim_lists, st.none() | st.binary(max_size=32)),
    st.builds(Ack, senders, u32s, claim_lists, st.none() | st.binary(max_size=32)),
    st.builds(PingReq, senders, u32s, ids, claim_lists),
    st.builds(Nack, senders, u32s, claim_lists),
    st.builds(Gossip, senders, claim_lists),
    st.builds(ConnectCheck, senders, u32s, ids, claim_lists),
    st.builds(ConnectChecked, senders, u32s, st.booleans(), claim_lists),
)


@given(messages)
def test_a_message_is_read_back_as_it_was_written(message: GossipMessage) -> None:
    raw = encode(message)
    assert len(raw) == encoded_bytes(message)
    if len(raw) <= MAX_MESSAGE_BYTES:
        assert decode(raw) == message


@settings(max_examples=500)
@given(st.binary(max_size=MAX_MESSAGE_BYTES + 100))
def test_any_bytes_are_a_message_or_a_bad_datagram(raw: bytes) -> None:
    try:
        assert isinstance(decode(raw), GossipMessage)
    except BadDatagram:
        pass


@settings(max_examples=300)
@given(messages, st.data())
def test_a_message_with_a_changed_byte_decodes_or_is_a_bad_datagram(message: GossipMessage, data: st.DataObject) -> None:
    raw = bytearray(encode(message))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(raw))
    except BadDatagram:
        pass


@settings(max_examples=300)
@given(messages, st.binary(max_size=60))
def test_any_bytes_behind_a_right_head_are_claims_or_a_bad_datagram(message: GossipMessage, tail: bytes) -> None:
    bare = encode(message)[: 57 if isinstance(message, Ping) else 50]
    try:
        decode(bare + tail)
    except BadDatagram:
        pass


def test_every_message_ends_where_it_should() -> None:
    for message in (
        Ping(SENDER, 7, B),
        Ack(SENDER, 7),
        Gossip(SENDER),
        ConnectChecked(SENDER, 7, True),
        Nack(SENDER, 7, (Left(B, 1, 2),)),
    ):
        raw = encode(message)
        claimed_bytes = sum(len(claim_bytes(claim)) for claim in message.claims)
        for end in range(len(raw)):
            if not claimed_bytes or end != len(raw) - claimed_bytes - 2:
                with pytest.raises(BadDatagram):
                    decode(raw[:end])


@pytest.mark.parametrize(
    "load",
    [
        Load(step_ms=math.nan),
        Load(step_ms=-1.0),
        Load(step_ms=math.inf),
        Load(prefill_tok_s=math.nan),
        Load(prefill_tok_s=-1.0),
    ],
)
def test_a_load_that_cannot_be_is_refused(load: Load) -> None:
    figures = struct.pack("!HHIIIfeH", 0, 0, 0, 0, 0, load.prefill_tok_s, load.step_ms, 0)
    raw = encode(Gossip(SENDER))
    with pytest.raises(BadDatagram, match="load"):
        decode(raw[: COUNTERS_AT - 2 - LOAD_BYTES] + figures + raw[COUNTERS_AT - 2 :])


@pytest.mark.parametrize(
    "counter", [b"\x81\x80\x80\x80\x80\x80\x40", b"\x80\x80\x80\x80\x80\x80\x80\x01", b"\x80\x00", b"\x80" * 9]
)
def test_a_counter_out_of_bounds_or_with_excess_bytes_is_refused(counter: bytes) -> None:
    raw = encode(Gossip(SENDER))
    assert decode(raw[:COUNTERS_AT] + b"\x05" + raw[COUNTERS_AT + 1 :]).sender.epoch == 5
    with pytest.raises(BadDatagram):
        decode(raw[:COUNTERS_AT] + counter + raw[COUNTERS_AT + 1 :])


@pytest.mark.parametrize(
    "claim",
    [
        ["l", b"12345678", -1, 2],
        ["l", b"12345678", 1, 2**48 + 1],
        ["l", b"1234567", 1, 2],
        ["l", "1234567812345678", 1, 2],
        ["l", b"12345678"],
        ["l"],
        [],
        "l",
        ["x", b"12345678", 1, 2],
        ["s", b"12345678", 1, 2, b"1234567"],
        ["s", b"12345678", 1, 2],
        ["d", b"12345678", 1, 2, b"12345678", "longer than any"],
        [["l"], b"12345678", 1, 2],
    ],
)
def test_a_claim_out_of_bounds_is_refused(claim: object) -> None:
    assert decode(encode(Gossip(SENDER)) + msgspec.msgpack.encode([[["l", b"12345678", 1, 2]]])).claims
    with pytest.raises(BadDatagram):
        decode(encode(Gossip(SENDER)) + msgspec.msgpack.encode([[claim]]))


@pytest.mark.parametrize("tail", [[], [5], ["x"], {"a": 1}, 7, [[["l", b"12345678", 1, 2]] * 129], [[], "here"], [[], b"x" * 33]])
def test_a_tail_that_is_no_list_of_claims_is_refused(tail: object) -> None:
    with pytest.raises(BadDatagram):
        decode(encode(Ack(SENDER, 7)) + msgspec.msgpack.encode(tail))


def test_a_load_takes_24_bytes_and_values_above_the_highest_are_clipped() -> None:
    assert LOAD_BYTES == 24 == len(pack_load(Load()))
    load, age_ms = unpack_load(pack_load(Load(10**6, 10**6, 10**12, 10**12, 10**12, 1e300, 1e9), 10**9))
    assert load == Load(65535, 65535, 2**32 - 1, 2**32 - 1, 2**32 - 1, load.prefill_tok_s, 65504.0) and age_ms == 65535
    assert load.prefill_tok_s == pytest.approx(3.4e38)


def test_a_probe_and_its_answer_fit_the_budget_of_an_idle_mesh() -> None:
    sender = Sender(A, 100, 3, 2**64 - 1, Load(9, 9, 999, 9999, 9999, 1234.5, 12.5), 300, 40)
    sealed_bytes = sum(
        len(encode(message)) + KeySeal.overhead_bytes for message in (Ping(sender, 2**32 - 1, B), Ack(sender, 2**32 - 1))
    )
    assert sealed_bytes == 176


def test_a_name_is_measured_in_bytes_not_in_characters() -> None:
    with pytest.raises(ValueError, match="name may take 32 bytes"):
        Alive(A, 1, 1, "é" * 17, "h", 1)
    raw = msgspec.msgpack.encode([[["a", b"12345678", 1, 1, "é" * 17, "h", 1, ""]]])
    with pytest.raises(BadDatagram, match="name may take 32 bytes"):
        decode(encode(Gossip(SENDER)) + raw)


def test_too_many_bytes_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(BadDatagram, match="at most"):
        decode(encode(Gossip(SENDER, (LONGEST,) * 20)))


def test_a_newer_version_may_append_fields() -> None:
    raw = msgspec.msgpack.encode([[["l", bytes.fromhex(B), 1, 2, b"signature", "of a later version"]], b"here", {"more": 1}])
    assert decode(encode(Ack(SENDER, 7)) + raw) == Ack(SENDER, 7, (Left(B, 1, 2, b"signature"),), b"here")


def test_the_longest_claim_fits_its_limit_and_a_full_message_the_datagram() -> None:
    assert len(claim_bytes(LONGEST)) <= MAX_CLAIM_BYTES
    bare = Ping(SENDER, 2**32 - 1, B)
    fitting = (LONGEST,) * (claim_budget_bytes(bare) // len(claim_bytes(LONGEST)))
    full = encode(Ping(SENDER, 2**32 - 1, B, fitting))
    assert MAX_MESSAGE_BYTES - MAX_CLAIM_BYTES < len(full) <= MAX_MESSAGE_BYTES
    for seal in (PlainSeal(), KeySeal([bytes(32)])):
        assert seal.overhead_bytes <= MAX_SEAL_BYTES
        assert len(seal.seal(full)) <= MAX_DATAGRAM_BYTES


def test_a_usual_refutation_with_its_signature_takes_less_than_150_bytes() -> None:
    assert len(claim_bytes(Alive(A, 12, 3, "gpu-box-17-a1b2", "192.168.100.17", 7946, "eu-west", b"s" * 64))) < 150
