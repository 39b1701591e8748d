"""What a peer sends is checked before it is stored."""

from __future__ import annotations

import msgspec
import pytest

from mesh.errors import BadRequest
from mesh.ids import NodeId
from rag import search, wire
from rag.clock import hlc_of
from rag.registry import FILES, StoreEntry, store_id
from rag.replica import DocumentHead, ShardDigest
from rag.report import MAX_PUBLISHED_BYTES, published
from rag.wire import Operation, Summary, file_id, flaw_of
from tests.rag.fakes import DIM, HashingEmbedder

NOW_S = 1_800_000_000.0
ENTRY = StoreEntry(store_id("s"), "s", 0, "e", 1, NodeId("a"))
VECTORS = search.to_wire(HashingEmbedder().embed(["text"]))
GOOD = Operation(DocumentHead("d", hlc_of(NOW_S), NodeId("a"), chunks=1), b"", ((0, 4, "text"),), VECTORS)


def changed(**fields: object) -> Operation:
    head = {name: value for name, value in fields.items() if name in DocumentHead.__struct_fields__}
    rest = {name: value for name, value in fields.items() if name not in head}
    return msgspec.structs.replace(GOOD, head=msgspec.structs.replace(GOOD.head, **head), **rest)


def test_a_sound_operation_has_no_flaw() -> None:
    assert flaw_of(GOOD, ENTRY, DIM, NOW_S) is None
    assert flaw_of(Operation(DocumentHead("d", 5, NodeId("a"), deleted=True)), ENTRY, DIM, NOW_S) is None
    content = b"bytes"
    upload = Operation(DocumentHead(file_id("a.md", content), 5, NodeId("a"), name="a.md", size_bytes=5), content)
    assert flaw_of(upload, FILES, DIM, NOW_S) is None
    assert flaw_of(msgspec.structs.replace(upload, content=b"other"), FILES, DIM, NOW_S) is not None


@pytest.mark.parametrize(
    "operation",
    [
        changed(doc_id=""),
        changed(doc_id="x" * 1000),
        changed(hlc=0),
        changed(hlc=1 << 63),
        changed(hlc=hlc_of(NOW_S + 3600)),
        changed(deleted=True),
        changed(chunks=2),
        changed(vectors=b""),
        changed(vectors=VECTORS[:-2]),
        changed(vectors=bytes(len(VECTORS))),
        changed(spans=((0, 9, "text"),)),
        changed(spans=((-4, 0, "text"),)),
    ],
)
def test_a_flawed_operation_is_refused_with_a_reason(operation: Operation) -> None:
    assert flaw_of(operation, ENTRY, DIM, NOW_S)


@pytest.mark.parametrize("tail", [b"", b"\xc1", b"\x81", msgspec.msgpack.encode({"a": 1}), msgspec.msgpack.encode([[1]])])
def test_a_tail_that_is_not_what_it_should_be_is_a_bad_request(tail: bytes) -> None:
    with pytest.raises(BadRequest):
        wire.decoded(wire.OPERATIONS, tail)


def test_a_header_survives_the_journey_and_a_wrong_one_is_a_bad_request() -> None:
    call = wire.SearchCall(ENTRY, [0, 3], True, 50, "words")
    assert wire.call_of(wire.SearchCall, wire.header_of(call)) == call
    for header in ({}, {**wire.header_of(call), "shards": "all"}, {**wire.header_of(call), "entry": [1]}):
        with pytest.raises(BadRequest):
            wire.call_of(wire.SearchCall, header)
    with pytest.raises(BadRequest):
        wire.check_shards([0, 8])


def test_a_summary_is_gossiped_whole_while_small_and_by_name_when_large() -> None:
    small = Summary([ENTRY], {ENTRY.id: {"3": ShardDigest(1, 2**64 - 1, 1, 1, 7)}})
    assert msgspec.convert(published(small), Summary) == small
    entries = [StoreEntry(store_id(f"s{n}"), f"s{n}", 0, "e", 1, NodeId("a")) for n in range(7000)]
    large = published(Summary(entries))
    assert len(msgspec.msgpack.encode(large)) < 200 < MAX_PUBLISHED_BYTES
    assert large["brief"] and not large["stores"]
    assert published(Summary(entries[1:]))["brief"] != large["brief"]
