"""Everything that two nodes exchange or that a node keeps on disk, encoded from fixed values."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import torch

import mesh.manifest
import mesh.view
import mesh.wire.gossip
import mesh.wire.sync
import mesh.wire.twin
import node.engine.api
import node.engine.parallel.messages
import node.entry.path_queue
import node.host.identity
import node.host.known_peers
import node.requests
import node.serving.page_exchange
import node.serving.stages
import node.weights.record
import node.weights.store
import rag.clock
import rag.registry
import rag.replica
import rag.search
import rag.wire
from membership.trace import trace_format
from mesh.ids import ModelId, NodeId
from mesh.keys.keyring import Keyring, RingKey, save_keyring, wrap
from mesh.keys.mesh_key import derive, encode_key
from mesh.keys.seal import KeySeal, PlainSeal
from mesh.keys.signing import IdentityKey
from mesh.prefix import further_names, prefix_salt
from mesh.rendezvous import owners, score
from mesh.view import Facts, Load, Loading, ModelCard, Readiness, Span
from mesh.wire import datagram_codec, frames
from mesh.wire.facts_map import keys_of
from mesh.wire.gossip import (
    Ack,
    Alive,
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
from mesh.wire.load import pack_load
from mesh.wire.statements import alive_statement, left_statement
from mesh.wire.twin import statement
from node.checkpoints.safetensors_header import make_header
from node.engine.kv.page_store import layout_of, to_bytes
from node.http import sse
from rag.replica import DocumentHead, shard_of
from rag.store import StoreFile
from rag.wire import Operation, file_id
from tests.golden.samples import sample, structs_of

LONG_BYTES = 400
STRUCTS = [
    *(mesh.wire.gossip, mesh.wire.sync, mesh.wire.twin, mesh.view, mesh.manifest, trace_format),
    *(rag.clock, rag.registry, rag.replica, rag.search, rag.wire),
    *(
        node.requests,
        node.engine.api,
        node.engine.parallel.messages,
        node.serving.stages,
        node.serving.page_exchange,
        node.entry.path_queue,
    ),
    *(node.weights.record, node.weights.store, node.host.identity, node.host.known_peers),
]
LOAD = Load(1, 2, 3, 4, 5, 6.5, 7.25)
ID, OTHER, THIRD = NodeId("00" * 8), NodeId("1f" * 8), NodeId("ab" * 8)
KEY = bytes(range(32))
SENDER = Sender(ID, 4, 5, 0x0102030405060708, LOAD)


def encoded_structs(modules: Iterable[Any]) -> dict[str, str]:
    """The MessagePack of a sample of every struct, by the struct's name."""
    structs = [each for module in modules for each in structs_of(module)]
    return {each.__name__: shown(msgspec.msgpack.encode(sample(each))) for each in structs}


def encodings() -> dict[str, str]:
    """What other encoders make of fixed values, by a name that says where it travels or lies."""
    with mock.patch("os.urandom", lambda size: bytes(range(size))):
        return {name: shown(raw) for part in (_datagrams, _frames, _keys, _facts, _names, _files) for name, raw in part()}


def shown(raw: bytes) -> str:
    return raw.hex() if len(raw) <= LONG_BYTES else f"sha256 of {len(raw)} bytes: {hashlib.sha256(raw).hexdigest()}"


def _datagrams() -> Iterator[tuple[str, bytes]]:
    signature, public = bytes(range(64)), bytes(range(32))
    alive = Alive(OTHER, 1, 2, "name", "host.example", 7946, "region", signature, public)
    claims = (alive, Suspect(THIRD, 1, 2, OTHER), Dead(THIRD, 3, 4, OTHER), Left(THIRD, 5, 6, signature))
    messages: dict[str, GossipMessage] = {
        "ping": Ping(SENDER, 9, OTHER, claims),
        "ping with a coordinate": Ping(SENDER, 9, OTHER, (), bytes(range(20))),
        "ack": Ack(SENDER, 9, claims[:1]),
        "indirect ping": PingReq(SENDER, 9, OTHER),
        "nack": Nack(SENDER, 9),
        "gossip": Gossip(SENDER, claims),
        "connect check": ConnectCheck(SENDER, 9, OTHER),
        "connect checked": ConnectChecked(SENDER, 9, True, claims[1:]),
    }
    for name, message in messages.items():
        yield f"datagram/{name}", datagram_codec.encode(message)
    yield "statement/alive", alive_statement(alive)
    yield "statement/left", left_statement(Left(THIRD, 5, 6))
    yield "load", pack_load(LOAD, 8)


def _frames() -> Iterator[tuple[str, bytes]]:
    yield "frame/call", frames.encode(frames.Frame("stage.open", {"a": [1, "two", None]}, b"tail", 7))
    yield "frame/reply", frames.encode(frames.Frame("stage.open", {"pages": 3}, b"", 7, True, LOAD))
    yield "frame/one way", frames.encode(frames.Frame("stage.hidden", {}, bytes(8)))
    chunk = {"id": "chatcmpl-1", "mesh": {"seq": 3}, "choices": [{"delta": {"content": "é"}}]}
    yield "sse/chunk", sse.encode([chunk])
    yield "sse/chunk with an id", sse.encode([chunk], with_ids=True)
    yield "sse/error", sse.encode_error({"error": {"message": "m", "type": "t", "param": None, "code": None}})


def _keys() -> Iterator[tuple[str, bytes]]:
    identity = IdentityKey(KEY)
    yield "node id of a key", identity.node.encode()
    yield "signature", identity.sign(b"statement")
    yield "key file", encode_key(KEY).encode()
    for label in ("gossip seal", "key wrap", "key name", "tls authority"):
        yield f"derived key/{label}", derive(KEY, label)
    yield "seal/key", KeySeal([KEY], "mesh", lambda: 1e9).seal(b"body")
    yield "seal/plain", PlainSeal("mesh").seal(b"body")
    yield "key of a rotation, wrapped", wrap(RingKey(2, bytes(32)), RingKey(1, KEY))
    answer = sample(mesh.wire.twin.TwinAnswer)
    yield "statement/twin", statement(ID, bytes(16), answer)


def _facts() -> Iterator[tuple[str, bytes]]:
    model = ModelId("tiny")
    facts = Facts(
        http="http://127.0.0.1:8000",
        version="0.1.0",
        pid=7,
        spans=(Span(model, 0, 4),),
        models=(ModelCard(model, 4, 64, "a" * 64, "numerics", manifest="a" * 64),),
        loading={model: sample(Loading)},
        documents={"digest": "x"},
        readiness=Readiness.STALLED,
    )
    for key, value in sorted(keys_of(facts).items()):
        yield f"facts/{key}", value


def _names() -> Iterator[tuple[str, bytes]]:
    salt = prefix_salt(KEY, "tenant", "weights")
    yield "prefix salt", salt
    yield "prefix names", b"".join(further_names(salt, [], list(range(100))))
    yield "rendezvous owners", " ".join(owners(b"key", [ID, OTHER, THIRD], 2)).encode()
    yield "rendezvous score", repr(score(b"key", ID, 2.0)).encode()
    yield "shard of a document", repr(shard_of("document")).encode()
    yield "file id", file_id("a.md", b"text").encode()


def _files() -> Iterator[tuple[str, bytes]]:
    tensors = [mesh.manifest.TensorEntry("a.weight", "F32", (2, 3), b""), mesh.manifest.TensorEntry("b", "BF16", (5,), b"")]
    yield "safetensors header", make_header(tensors)[0]
    entry = mesh.manifest.FileEntry("config.json", 2, mesh.manifest.digest_of(b"{}"))
    yield "manifest", mesh.manifest.encode(mesh.manifest.Manifest(mesh.manifest.FORM, (entry,), ()))
    page = {2: torch.arange(12, dtype=torch.float32).view(2, 3, 2), 3: torch.ones(2, 3, 2)}
    yield "page", to_bytes(page)
    yield "page layout", layout_of(page).name
    with tempfile.TemporaryDirectory() as folder:
        save_keyring(Path(folder) / "mesh.key", Keyring((RingKey(1, KEY), RingKey(2, bytes(32)))))
        yield "key ring file", (Path(folder) / "mesh.key").read_bytes()
        yield "store schema", _schema(Path(folder) / "store").encode()


def _schema(path: Path) -> str:
    import sqlite3

    store = StoreFile(path, "embedder")
    store.open()
    store.write([Operation(DocumentHead("d", 1, ID, chunks=0), b"", (), b"")])
    store.close()
    with sqlite3.connect(path) as database:
        rows = database.execute("select type, name, tbl_name, sql from sqlite_master order by name").fetchall()
    database.close()
    return json.dumps(rows)
