"""What travels between nodes and what lies on their disks is today what it was: releases that differ in code form one mesh."""

from __future__ import annotations

import lzma

import msgspec
import pytest

from membership.simulation.signer import StandInVerifier
from membership.trace import trace_format
from membership.trace.replay import replay
from tests.golden.encodings import STRUCTS, encoded_structs, encodings
from tests.golden.golden import TRACE, golden
from tests.golden.samples import sample, structs_of
from tests.membership.test_trace import recorded_run

# The base of all recorded inputs has no form of its own.
KNOWN = [each for module in STRUCTS for each in structs_of(module) if each is not trace_format._Input]


def test_every_struct_is_encoded_as_before() -> None:
    assert encoded_structs(STRUCTS) == golden("structs")


@pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.__name__)
def test_a_struct_comes_back_from_its_bytes(kind: type[msgspec.Struct]) -> None:
    made = sample(kind)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=kind) == made


def test_every_other_encoding_is_as_before() -> None:
    assert encodings() == golden("encodings")


def test_a_trace_of_the_first_release_is_replayed_to_the_last_effect() -> None:
    recorded = lzma.decompress(TRACE.read_bytes())
    found = replay(trace_format.read(recorded), StandInVerifier())
    assert found.exact and found.agreed == found.inputs > 300
    assert recorded_run(0)[0].dump() == recorded, "the same seed, the same inputs, answers and file"
