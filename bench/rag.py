"""Documents: how fast they are taken in, how fast and how well they are found.

`python -m bench.rag [--quick] [--nodes N]` runs N nodes in one process (real embedder, real files on
disk, calls by hand instead of sockets), takes in XQuAD-en's 240 paragraphs where its file is beside the repository
(`shared/data/xquad.en.json`), else this repository's own text, and asks its questions of every node in turn. A
paragraph is a document; a question's right document is the one it was written for. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from mesh.ids import Address, NodeId
from mesh.view import Facts, Peer, View
from mesh.wire.calls import CallReply, Header
from rag.embed import MiniLM
from rag.service import Documents
from rag.types import SearchResult

REPOSITORY = Path(__file__).resolve().parent.parent
XQUAD = REPOSITORY.parent / "shared" / "data" / "xquad.en.json"
WAYS = {"hybrid": (1.0, 1.0), "dense": (1.0, 0.0), "lexical": (0.0, 1.0)}
DEPTH = 10
STORE = "bench"


@dataclass(frozen=True, slots=True)
class Corpus:
    name: str
    documents: list[str]
    questions: list[tuple[str, int]]  # with the index of the right document


class InProcess:
    """N document services whose calls and gossip stay in this process."""

    def __init__(self, directory: Path, nodes: int) -> None:
        self.embedder = MiniLM()
        self.facts = {NodeId(f"{number:016x}"): Facts() for number in range(nodes)}
        self.services = {node: self._service(node, directory / node) for node in self.facts}

    def _service(self, me: NodeId, directory: Path) -> Documents:
        def view() -> View:
            return View(me, {node: Peer(node, node, self._address(node), facts=facts) for node, facts in self.facts.items()})

        def publish(record: dict[str, Any]) -> None:
            self.facts[me] = Facts(documents=record)

        async def call(to: Address, kind: str, header: Header, tail: bytes = b"", *, timeout_s: float = 10.0) -> CallReply:
            await trio.lowlevel.checkpoint()
            node = NodeId(f"{to[1]:016x}")
            return await self.services[node].handlers[kind](me, header, tail)

        return Documents(me, directory, self.embedder, view, call, publish, time.time)

    def _address(self, node: NodeId) -> Address:
        return "127.0.0.1", int(node, 16)


def xquad(limit: int | None) -> Corpus:
    """XQuAD's paragraphs and questions (deepmind/xquad, CC BY-SA 4.0); `limit` questions, spread evenly."""
    documents: list[str] = []
    questions: list[tuple[str, int]] = []
    for article in json.loads(XQUAD.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            questions += [(line["question"], len(documents)) for line in paragraph["qas"]]
            documents.append(paragraph["context"])
    step = 1 if limit is None else max(1, len(questions) // limit)
    return Corpus("xquad-en", documents, questions[::step])


def own_text() -> Corpus:
    """The docstrings' first lines of this repository asked of its modules: small, always there, no measure of quality."""
    documents: list[str] = []
    questions: list[tuple[str, int]] = []
    for path in sorted(REPOSITORY.glob("[mnr]*/*.py")):
        text = path.read_text(encoding="utf-8")
        if text.startswith('"""') and len(text) > 200:
            questions.append((text[3:].split("\n", 1)[0], len(documents)))
            documents.append(text)
    return Corpus("own-source", documents, questions)


async def measure(corpus: Corpus, nodes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-rag-") as directory:
        mesh = InProcess(Path(directory), nodes)
        async with trio.open_nursery() as nursery:
            for service in mesh.services.values():
                await nursery.start(service.run)
            ingest, ids = await _ingest(mesh, corpus)
            found = {way: await _ask(mesh, corpus, ids, *weights) for way, weights in WAYS.items()}
            same = await _identical(mesh, corpus)
            nursery.cancel_scope.cancel()
        size_bytes = _size_bytes(Path(directory))
    return {"ingest": ingest, "search": found, "identical_answers": same, "disk_bytes_per_node": size_bytes // nodes}


def _size_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*.sqlite*"))


async def _ingest(mesh: InProcess, corpus: Corpus) -> tuple[dict[str, Any], list[str]]:
    service = next(iter(mesh.services.values()))
    await service.create_store(STORE)
    started = time.perf_counter()
    mesh.embedder.embed_passages(["warm"])
    mesh.embedder.embed(["warm"])
    loaded = time.perf_counter()
    ids = []
    for number, text in enumerate(corpus.documents):
        file = await service.put_file(f"document-{number}.txt", text.encode())
        await service.attach(STORE, file.id)
        ids.append(file.id)
    took_s = time.perf_counter() - loaded
    chunks = service.store(STORE).chunks
    return {
        "embedder_load_s": round(loaded - started, 2),
        "passage_dtype": mesh.embedder.passage_dtype,
        "documents": len(ids),
        "chunks": chunks,
        "documents_per_s": round(len(ids) / took_s, 1),
        "chunks_per_s": round(chunks / took_s, 1),
    }, ids


async def _ask(mesh: InProcess, corpus: Corpus, ids: list[str], dense: float, lexical: float) -> dict[str, Any]:
    services = list(mesh.services.values())
    ranks: list[int | None] = []
    took_ms: list[float] = []
    for number, (question, right) in enumerate(corpus.questions):
        started = time.perf_counter()
        service = services[number % len(services)]
        result = await service.search(STORE, question, DEPTH, embedding_weight=dense, text_weight=lexical)
        took_ms.append(1000 * (time.perf_counter() - started))
        ranks.append(rank_of(result, ids[right]))
    took_ms.sort()
    return {
        "questions": len(ranks),
        "hit@1": round(sum(rank == 1 for rank in ranks) / len(ranks), 4),
        "hit@5": round(sum(rank is not None and rank <= 5 for rank in ranks) / len(ranks), 4),
        "nDCG@10": round(sum(1 / math.log2(1 + rank) for rank in ranks if rank) / len(ranks), 4),
        "median_ms": round(statistics.median(took_ms), 2),
        "p99_ms": round(took_ms[int(0.99 * (len(took_ms) - 1))], 2),
        "queries_per_s": round(1000 * len(took_ms) / sum(took_ms), 1),
    }


def rank_of(result: SearchResult, file_id: str) -> int | None:
    """The document's place among the distinct documents of the answer, from 1."""
    order = list(dict.fromkeys(passage.file_id for passage in result.passages))
    return order.index(file_id) + 1 if file_id in order else None


async def _identical(mesh: InProcess, corpus: Corpus) -> float:
    """The share of questions that all nodes answer with the same passages, scores and digest."""
    asked = corpus.questions[:: max(1, len(corpus.questions) // 50)]
    same = 0
    for question, _ in asked:
        results = [await service.search(STORE, question, DEPTH) for service in mesh.services.values()]
        same += all(result == results[0] for result in results)
    return same / len(asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="150 questions of each kind: within a minute on two cores")
    parser.add_argument("--nodes", type=int, default=3)
    arguments = parser.parse_args()
    corpus = xquad(150 if arguments.quick else None) if XQUAD.exists() else own_text()
    figures = trio.run(measure, corpus, arguments.nodes)
    command = "python -m bench.rag" + (" --quick" if arguments.quick else "") + f" --nodes {arguments.nodes}"
    print(json.dumps({"bench": "rag", "command": command, "corpus": corpus.name, "nodes": arguments.nodes, **figures}))


if __name__ == "__main__":
    main()
