"""Seals: what is opened, and why the rest is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.keys.seal import NONCES_REMEMBERED, REPLAY_WINDOW_S, KeySeal, PlainSeal, Seal, SealBroken, SealFault, _key_id

KEY, OTHER = b"k" * 32, b"o" * 32


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def fault(seal: Seal, datagram: bytes) -> SealFault:
    with pytest.raises(SealBroken) as broken:
        seal.open(datagram)
    return broken.value.fault


@pytest.mark.parametrize("seal", [KeySeal([KEY]), PlainSeal()])
def test_what_is_sealed_is_opened_and_is_longer_by_the_overhead(seal: Seal) -> None:
    for body in (b"", b"x", b"y" * 1300):
        datagram = seal.seal(body)
        assert len(datagram) == len(body) + seal.overhead_bytes
        assert seal.open(datagram) == body


def test_a_sealed_body_is_not_to_be_read_on_the_wire() -> None:
    assert b"gossip about somebody" not in KeySeal([KEY]).seal(b"gossip about somebody")


def test_every_fault_has_its_name() -> None:
    assert fault(KeySeal([KEY]), KeySeal([OTHER]).seal(b"x")) is SealFault.WRONG_KEY
    assert fault(KeySeal([KEY]), PlainSeal().seal(b"x" * 60)) is SealFault.WRONG_KEY
    assert fault(PlainSeal(), KeySeal([KEY]).seal(b"x")) is SealFault.WRONG_KEY
    assert fault(KeySeal([KEY], "here"), KeySeal([KEY], "there").seal(b"x")) is SealFault.WRONG_CLUSTER
    assert fault(PlainSeal("here"), PlainSeal("there").seal(b"x")) is SealFault.WRONG_CLUSTER
    assert fault(PlainSeal(), b"GET / HTTP/1.1\r\nHost: here\r\n\r\n") is SealFault.FOREIGN
    assert fault(KeySeal([KEY]), b"") is SealFault.FOREIGN
    assert fault(KeySeal([KEY]), KeySeal([KEY]).seal(b"")[:-1]) is SealFault.FOREIGN
    assert fault(KeySeal([KEY]), b"GM\x01\x01" + bytes(60)) is SealFault.OTHER_VERSION
    of_a_later_version = bytearray(KeySeal([KEY]).seal(b"x"))
    of_a_later_version[0] += 2
    assert fault(KeySeal([KEY]), bytes(of_a_later_version)) is SealFault.OTHER_VERSION


def test_two_keys_with_one_short_id_are_distinguished() -> None:
    named: dict[bytes, bytes] = {}
    numbers = (number.to_bytes(32, "big") for number in range(100_000))
    one, other = next((named[name], key) for key in numbers if named.setdefault(name := _key_id(key), key) != key)
    assert KeySeal([one, other]).open(KeySeal([other]).seal(b"x")) == b"x"
    assert KeySeal([other, one]).open(KeySeal([other]).seal(b"x")) == b"x"
    assert fault(KeySeal([one]), KeySeal([other]).seal(b"x")) is SealFault.DAMAGED


def test_a_replay_when_the_short_time_comes_round_again_is_refused() -> None:
    clock = Clock()
    seal = KeySeal([KEY], clock=clock)
    old = seal.seal(b"x")
    for turns in (1, 2, -1):
        clock.now = Clock().now + turns * 65_536 * 4
        assert fault(seal, old) is SealFault.DAMAGED
    clock.now = Clock().now
    assert seal.open(old) == b"x"


@pytest.mark.parametrize("hours", [1, 12, 36])
def test_a_clock_wrong_by_hours_is_distinguished_from_a_forgery(hours: int) -> None:
    clock = Clock()
    seal = KeySeal([KEY], clock=clock)
    datagram = seal.seal(b"x")
    for sign in (1, -1):
        clock.now = Clock().now + sign * hours * 3600
        assert fault(seal, datagram) is SealFault.REPLAYED


@pytest.mark.parametrize("seal", [KeySeal([KEY]), PlainSeal()])
def test_no_bit_may_change(seal: Seal) -> None:
    datagram = seal.seal(b"body")
    for bit in range(len(datagram) * 8):
        changed = bytearray(datagram)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SealBroken):
            seal.open(bytes(changed))


def test_the_cluster_is_authenticated_beyond_its_short_hash() -> None:
    here, there = KeySeal([KEY], "here"), KeySeal([KEY], "there")
    forged = here.seal(b"x")[:1] + there.seal(b"x")[1:3] + here.seal(b"x")[3:]
    assert fault(there, forged) is SealFault.DAMAGED


def test_a_datagram_is_opened_once_and_only_while_it_is_fresh() -> None:
    clock = Clock()
    seal = KeySeal([KEY], clock=clock)
    once, late, early = seal.seal(b"x"), seal.seal(b"x"), seal.seal(b"x")
    seal.open(once)
    assert fault(seal, once) is SealFault.REPLAYED
    clock.now += REPLAY_WINDOW_S + 5
    assert fault(seal, late) is SealFault.REPLAYED
    clock.now -= 2 * REPLAY_WINDOW_S + 10
    assert fault(seal, early) is SealFault.REPLAYED
    clock.now += REPLAY_WINDOW_S + 5
    assert seal.open(late) == b"x"


def test_the_memory_of_nonces_is_bounded_and_forgets_the_oldest_first() -> None:
    seal = KeySeal([KEY])
    first = seal.seal(b"")
    seal.open(first)
    for _ in range(NONCES_REMEMBERED):
        seal.open(last := seal.seal(b""))
    assert seal.open(first) == b""
    assert fault(seal, last) is SealFault.REPLAYED


def test_keys_rotate_without_a_gap() -> None:
    old, both, turned, new = KeySeal([KEY]), KeySeal([KEY, OTHER]), KeySeal([OTHER, KEY]), KeySeal([OTHER])
    assert both.open(old.seal(b"1")) == b"1"
    assert both.open(turned.seal(b"2")) == b"2"
    assert turned.open(both.seal(b"3")) == b"3"
    assert turned.open(new.seal(b"4")) == b"4"
    assert fault(new, old.seal(b"5")) is SealFault.WRONG_KEY


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_by_name(raw: bytes) -> None:
    for seal in (KeySeal([KEY]), PlainSeal()):
        assert fault(seal, raw) in SealFault


@given(st.binary(max_size=200))
def test_any_bytes_behind_a_right_head_are_refused_by_name(raw: bytes) -> None:
    for seal in (KeySeal([KEY]), PlainSeal()):
        assert fault(seal, seal.seal(b"")[:7] + raw) in SealFault


def test_a_seal_without_a_key_is_refused() -> None:
    with pytest.raises(ValueError, match="PlainSeal"):
        KeySeal([])
