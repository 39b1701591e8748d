"""Signatures of claims: which node made a statement."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.keys.signing import Ed25519Verifier, IdentityKey, node_of
from mesh.wire.gossip import Alive, Left
from mesh.wire.statements import alive_statement, left_statement

ONE, OTHER = IdentityKey(b"1" * 32), IdentityKey(b"2" * 32)
VERIFIER = Ed25519Verifier()


def test_a_node_is_its_key() -> None:
    assert VERIFIER.is_key_of(ONE.public_key, ONE.node)
    assert not VERIFIER.is_key_of(OTHER.public_key, ONE.node)
    assert not VERIFIER.is_key_of(ONE.public_key + b"\0", node_of(ONE.public_key + b"\0")), "a key has 32 bytes"


def test_a_statement_holds_under_its_own_key_alone() -> None:
    signature = ONE.sign(b"I live")
    assert VERIFIER.holds(ONE.public_key, b"I live", signature)
    assert not VERIFIER.holds(OTHER.public_key, b"I live", signature)
    assert not VERIFIER.holds(ONE.public_key, b"I left", signature)


@settings(max_examples=50)
@given(st.binary(max_size=40), st.binary(max_size=80))
def test_malformed_keys_and_signatures_hold_nothing_and_raise_nothing(key: bytes, signature: bytes) -> None:
    assert not VERIFIER.holds(key, b"I live", signature)
    assert not VERIFIER.holds(ONE.public_key, b"I live", signature)
    assert not VERIFIER.holds(b"\xff" * 32, b"I live", signature.ljust(64, b"\0")[:64])


def test_every_part_of_a_claim_and_its_kind_are_signed() -> None:
    claim = Alive(ONE.node, 1, 2, "name", "host", 3, "region")
    statements = {alive_statement(claim), left_statement(Left(ONE.node, 1, 2))}
    changed = {"node": OTHER.node, "epoch": 9, "incarnation": 9, "name": "x", "host": "x", "port": 9, "region": "x"}
    for part in changed:
        statements.add(alive_statement(msgspec.structs.replace(claim, **{part: changed[part]})))
    assert len(statements) == 2 + len(changed)


def test_a_seed_of_another_length_is_our_own_fault() -> None:
    with pytest.raises(ValueError):
        IdentityKey(b"short")


def test_a_key_does_not_show_its_seed() -> None:
    assert "1111" not in repr(ONE) and "seed" not in repr(ONE)
