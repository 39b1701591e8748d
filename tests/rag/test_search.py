from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag import search
from rag.embed import unit
from rag.search import ChunkCandidate, ShardResult, ShardStats


def unit_rows(seed: int, rows: int, dim: int = 48) -> np.ndarray:
    """Unit vectors as they come off the wire: [rows, dim] float32 with f16 values."""
    raw = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return search.from_wire(search.to_wire(unit(raw)), dim)


@settings(max_examples=25)
@given(st.integers(0, 1000))
def test_dense_scores_are_exact_so_no_order_of_addition_matters(seed: int) -> None:
    rows, query = unit_rows(seed, 4), unit_rows(seed + 1, 1)[0]
    _, scores = search.dense_top(rows, query, 10)
    for row, score in zip(rows, scores):
        exact = sum((Fraction(float(a)) * Fraction(float(b)) for a, b in zip(row, query)), Fraction(0))
        assert Fraction(float(score)) == exact


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 20))
def test_the_fast_pass_loses_none_of_the_best(seed: int, count: int) -> None:
    rows, query = unit_rows(seed, 200), unit_rows(seed + 1, 1)[0]
    rows[50:60] = rows[0]  # ties
    picked, scores = search.dense_top(rows, query, count)
    everything = np.sort(rows.astype(np.float64) @ query.astype(np.float64))[::-1]
    assert np.sort(scores)[::-1][:count].tolist() == everything[:count].tolist()
    assert len(picked) >= count


@pytest.mark.parametrize("raw", [b"\0", bytes(96), np.full(48, np.nan, "<f2").tobytes(), np.full(48, np.inf, "<f2").tobytes()])
def test_vectors_that_are_not_of_length_one_are_refused(raw: bytes) -> None:
    with pytest.raises(ValueError):
        search.from_wire(raw, 48)


def test_bm25_is_the_textbook_formula_and_alike_for_one_and_many() -> None:
    weights = [search.idf(100, 3), search.idf(100, 40)]
    expected = sum(w * c * 2.2 / (c + 1.2 * (0.25 + 0.75 * 12 / 10)) for w, c in zip(weights, (2, 1)))
    assert search.bm25((2, 1), 12, weights, 10.0) == pytest.approx(expected)
    many = search.bm25_rows(np.array([[2, 1], [0, 5]]), np.array([12, 7]), weights, 10.0)
    assert many.tolist() == [search.bm25((2, 1), 12, weights, 10.0), search.bm25((0, 5), 7, weights, 10.0)]
    assert search.idf(100, 3) == pytest.approx(math.log(97.5 / 3.5))
    assert search.idf(10, 9) > 0


def found(doc_id: str, dense: float | None, *counts: int, start: int = 0, text: str = "") -> ChunkCandidate:
    return ChunkCandidate(
        doc_id, start // 100, f"{doc_id}.md", start, start + 100, text or f"{doc_id} {start}", dense, counts, 10
    )


def stats(shard: int, chunks: int, *holding: int) -> ShardStats:
    return ShardStats(shard, chunks, 10 * chunks, holding)


def test_a_rare_term_counts_by_the_whole_store_and_not_by_its_shard() -> None:
    # "fox" is common in shard 0 and rare everywhere else; "whale" the other way round. Over all, whale is the rarer.
    answers = [
        ShardResult(("fox", "whale"), (stats(0, 10, 6, 1),), (found("a", None, 1, 0), found("b", None, 0, 1))),
        ShardResult(("fox", "whale"), (stats(1, 90, 30, 1),), (found("c", None, 1, 0),)),
    ]
    assert [candidate.doc_id for candidate in search.lexical_ranking(answers, 10)] == ["b", "a", "c"]


PARTS = [
    (stats(shard, 5, 1 + shard), [found(f"d{shard}{number}", 0.1 * number + 0.01 * shard, number % 3) for number in range(5)])
    for shard in range(4)
]


@given(st.permutations(range(4)), st.integers(1, 3))
def test_how_shards_are_grouped_over_nodes_does_not_change_the_answer(order: list[int], cut: int) -> None:
    def answer(shards: list[int]) -> ShardResult:
        return ShardResult(("t",), tuple(PARTS[i][0] for i in shards), tuple(c for i in shards for c in PARTS[i][1]))

    assert search.fuse([answer(order[:cut]), answer(order[cut:])], 8) == search.fuse([answer([0, 1, 2, 3])], 8)


def test_a_weight_of_zero_leaves_its_half_out() -> None:
    answer = ShardResult(("t",), (stats(0, 9, 1),), (found("dense", 0.9), found("both", 0.5, 1), found("words", None, 3)))
    assert [item.candidate.doc_id for item in search.fuse([answer], 5, text_weight=0.0)] == ["dense", "both"]
    assert [item.candidate.doc_id for item in search.fuse([answer], 5, embedding_weight=0.0)] == ["words", "both"]
    assert search.fuse([answer], 5)[0].candidate.doc_id == "both"
    assert search.fuse([answer], 5, text_weight=0.0)[0].score == 1.0


def test_equal_text_and_overlapping_spans_come_once() -> None:
    answer = ShardResult(
        (), (), (found("a", 0.9, start=0), found("a", 0.8, start=30), found("b", 0.7, text="a 0"), found("c", 0.6))
    )
    assert [item.candidate.key for item in search.fuse([answer], 5)] == [("a", 0), ("c", 0)]


def test_another_documents_near_equal_goes_before_a_repeat() -> None:
    answer = ShardResult((), (), (*(found("a", 0.9 - n / 100, start=200 * n) for n in range(4)), found("b", 0.5)))
    assert {item.candidate.doc_id for item in search.fuse([answer], 3)} == {"a", "b"}


def test_the_digest_names_contents_and_not_their_order() -> None:
    assert search.contents_digest({1: (2, 3), 0: (1, 1)}) == search.contents_digest({0: (1, 1), 1: (2, 3)})
    assert search.contents_digest({0: (1, 1)}) != search.contents_digest({0: (1, 2)})
