"""The file of a store: what was acknowledged is on disk, what failed left nothing, damage is seen before use."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mesh.errors import Refused
from mesh.ids import NodeId
from rag import search
from rag.index import Index, Tokenizer
from rag.replica import SHARDS, DocumentHead, shard_of
from rag.store import StoreCorrupt, StoreFile
from rag.wire import Operation
from tests.rag.fakes import DIM, HashingEmbedder

EMBEDDER = HashingEmbedder()
ALL = range(SHARDS)


def put(doc_id: str, hlc: int, *texts: str) -> Operation:
    spans, at = [], 0
    for text in texts:
        spans.append((at, at + len(text), text))
        at += len(text) + 1
    vectors = search.to_wire(EMBEDDER.embed(texts)) if texts else b""
    return Operation(DocumentHead(doc_id, hlc, NodeId("a"), name=f"{doc_id}.md", chunks=len(texts)), b"", tuple(spans), vectors)


def tombstone(doc_id: str, hlc: int) -> Operation:
    return Operation(DocumentHead(doc_id, hlc, NodeId("a"), deleted=True))


def vector(text: str) -> np.ndarray:
    found: np.ndarray = search.from_wire(search.to_wire(EMBEDDER.embed([text])), DIM)[0]
    return found


def texts_found(index: Index, query: str) -> set[str]:
    return {candidate.text for candidate in index.search(ALL, None, query, 50).candidates if any(candidate.counts)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pages.sqlite"


def test_what_was_written_is_there_after_reopening(path: Path) -> None:
    file = StoreFile(path, "e")
    assert file.open() == []
    operations = [put("one", 1, "red fox", "blue whale"), tombstone("two", 2), put("three", 3)]
    file.write(operations)
    file.close()
    again = StoreFile(path, "e")
    assert sorted(again.open(), key=lambda head: head.hlc) == [operation.head for operation in operations]
    assert again.operations(["three", "nothing", "one", "two"], 1 << 20) == [operations[2], operations[0], operations[1]]
    again.close()


def test_a_replaced_document_leaves_no_trace_of_the_old_one(path: Path) -> None:
    file = StoreFile(path, "e")
    file.open()
    file.write([put("one", 1, "red fox", "blue whale")])
    index = Index(path, DIM)
    assert texts_found(index, "fox") == {"red fox"}
    file.write([put("one", 2, "green frog")])
    assert texts_found(index, "fox whale") == set()
    assert texts_found(index, "frogs") == {"green frog"}
    dense = index.search(ALL, vector("fox"), "", 50)
    assert [candidate.text for candidate in dense.candidates] == ["green frog"]
    file.write([tombstone("one", 3)])
    assert index.search(ALL, vector("frog"), "frog", 50).candidates == ()
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO terms (terms, rank) VALUES ('integrity-check', 1)")  # raises if index and rows differ
    connection.close()
    index.close()
    file.close()


def test_an_index_kept_up_to_date_equals_one_made_anew(path: Path) -> None:
    file = StoreFile(path, "e")
    file.open()
    kept = Index(path, DIM)
    for hlc in range(1, 40):
        file.write([put(f"d{hlc * 7 % 11}", hlc, *(f"word{hlc} common text {part}" for part in range(hlc % 4)))])
        if hlc % 3 == 0:
            kept.search(ALL, vector("common"), "common", 5)
    fresh = Index(path, DIM)
    for query in ("common text", "word39 word38", "part"):
        assert kept.search(ALL, vector(query), query, 10) == fresh.search(ALL, vector(query), query, 10)
    for index in (kept, fresh):
        index.close()
    file.close()


def test_answers_do_not_depend_on_the_order_of_writes(tmp_path: Path) -> None:
    operations = [put(f"d{number}", 1, f"page {number} of the common book", "equal words") for number in range(20)]
    answers = []
    for name, order in (("a", operations), ("b", operations[::-1])):
        file = StoreFile(tmp_path / name, "e")
        file.open()
        for operation in order:
            file.write([operation])
        index = Index(tmp_path / name, DIM)
        found = index.search(ALL, vector("common book equal"), "common book equal", 7)
        answers.append((found.stats, sorted(found.candidates, key=lambda candidate: candidate.key)))
        index.close()
        file.close()
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "query", ['"', "fox OR whale", "NEAR(fox)", "text:fox", "f*", "'; DROP TABLE terms --", "(((", "\0", "fox" * 5000]
)
def test_no_query_is_read_as_a_query_language(path: Path, query: str) -> None:
    file = StoreFile(path, "e")
    file.open()
    file.write([put("one", 1, "red fox")])
    index = Index(path, DIM)
    index.search(ALL, None, query, 5)
    assert texts_found(index, "fox") == {"red fox"}
    index.close()
    file.close()


def test_function_words_are_left_out_unless_they_are_all_there_is() -> None:
    tokenizer = Tokenizer()
    assert tokenizer.terms("What is the Running of Foxes?") == ["fox", "run"]
    assert tokenizer.terms("to be or not to be") == ["be", "not", "or", "to"]
    assert tokenizer.terms("?!") == []
    tokenizer.close()


def test_a_full_disk_refuses_the_write_and_keeps_what_was_acknowledged(path: Path) -> None:
    file = StoreFile(path, "e")
    file.open()
    file.write([put("one", 1, "red fox")])
    assert file._connection is not None
    (pages,) = file._connection.execute("PRAGMA page_count").fetchone()
    file._connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(Refused, match="free some space"):
        file.write([put("small", 2, "a"), put("big", 3, *(f"words {number} " * 200 for number in range(50)))])
    assert file.operations(["one", "small", "big"], 1 << 20) == [put("one", 1, "red fox")]
    file._connection.execute("PRAGMA max_page_count = 1000000")
    file.write([put("small", 2, "a")])
    file.close()
    again = StoreFile(path, "e")
    assert {head.doc_id for head in again.open()} == {"one", "small"}
    again.close()


@pytest.mark.parametrize("damage", ["noise", "zeros inside", "cut", "other embedder"])
def test_damage_is_seen_at_open(path: Path, damage: str) -> None:
    file = StoreFile(path, "e")
    file.open()
    file.write([put(f"d{number}", 1, f"text {number} " * 50) for number in range(50)])
    file.close()
    raw = path.read_bytes()
    match damage:
        case "noise":
            path.write_bytes(b"no database at all" * 100)
        case "zeros inside":
            path.write_bytes(raw[: len(raw) // 2] + bytes(8192) + raw[len(raw) // 2 + 8192 :])
        case "cut":
            path.write_bytes(raw[: len(raw) - 3 * 4096])
    with pytest.raises(StoreCorrupt):
        StoreFile(path, "other" if damage == "other embedder" else "e").open()


WRITER = """
import sys
from pathlib import Path
from mesh.ids import NodeId
from rag.replica import DocumentHead
from rag.store import StoreFile
from rag.wire import Operation
file = StoreFile(Path(sys.argv[1]), "e")
file.open()
for hlc in range(1, 100000):
    text = f"text {hlc} " * 100
    vectors = b"\\0\\x3c" + bytes(126)
    file.write([Operation(DocumentHead(f"d{hlc}", hlc, NodeId("a"), chunks=1), b"", ((0, len(text), text),), vectors)])
    print(hlc, flush=True)
"""


def test_a_killed_writer_loses_nothing_that_it_acknowledged(path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        acknowledged = 0
        for line in writer.stdout:
            acknowledged = int(line)
            if acknowledged == 30:
                writer.send_signal(signal.SIGKILL)
    file = StoreFile(path, "e")
    stored = {head.hlc for head in file.open()}
    assert set(range(1, acknowledged + 1)) <= stored and acknowledged >= 30
    assert len(file.operations([f"d{hlc}" for hlc in stored], 1 << 30)) == len(stored)
    index = Index(path, DIM)
    assert index.search(ALL, None, "text", 10).candidates
    index.close()
    file.close()


def test_operations_come_in_batches_of_bounded_size_and_at_least_one(path: Path) -> None:
    file = StoreFile(path, "e")
    file.open()
    file.write([put(f"d{number}", 1, "word " * 200) for number in range(5)])
    wanted = [f"d{number}" for number in range(5)]
    assert len(file.operations(wanted, 1)) == 1
    assert len(file.operations(wanted, 3000)) == 2
    assert len(file.operations(wanted, 1 << 20)) == 5
    file.close()


def test_a_forgotten_shard_is_gone_from_the_file_and_a_buried_past_too(path: Path) -> None:
    file = StoreFile(path, "e")
    file.open()
    file.write([put(f"d{number}", number + 1, f"text{number}") for number in range(10)])
    file.forget(ALL[:4])
    file.forget_until(5)
    file.close()
    again = StoreFile(path, "e")
    kept = {head.doc_id for head in again.open()}
    assert kept == {f"d{number}" for number in range(10) if shard_of(f"d{number}") >= 4 and number + 1 > 5}
    index = Index(path, DIM)
    found = texts_found(index, " ".join(f"text{number}" for number in range(10)))
    assert found == {f"text{doc_id[1:]}" for doc_id in kept}
    index.close()
    again.close()
