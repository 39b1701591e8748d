from __future__ import annotations

import re
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from rag import chunk
from tests.rag.fakes import HashingEmbedder

COUNT = HashingEmbedder().count_tokens
PIECES = [
    "# A heading\n",
    "A sentence. ",
    "word ",
    "\n\n",
    "```\n# no heading\n```\n",
    "x" * 500,
    "ünï ",
    "- item\n",
    "Q? ",
    "\n   \n",
    "Title\n=====\n",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=300).map("".join) | st.text(max_size=400)


@given(TEXTS)
def test_chunks_are_slices_in_order_that_leave_out_white_space_alone(text: str) -> None:
    chunks = chunk.split(text, COUNT)
    covered = 0
    for piece in chunks:
        assert text[piece.start : piece.end] == piece.text and piece.text.strip() == piece.text != ""
        assert text[covered : piece.start].strip() == ""
        assert piece.end > covered
        covered = piece.end
    assert text[covered:].strip() == ""


@given(TEXTS)
def test_no_chunk_is_longer_than_the_embedder_reads(text: str) -> None:
    for piece in chunk.split(text, COUNT):
        assert COUNT([piece.text])[0] <= 250


def test_a_long_text_is_cut_at_sentences_and_neighbours_share_one() -> None:
    text = " ".join(f"Sentence number {number} says a little about the matter at hand." for number in range(100))
    chunks = chunk.split(text, COUNT)
    assert len(chunks) > 4
    for left, right in pairwise(chunks):
        assert right.start < left.end  # overlap
        assert right.text.startswith("Sentence") and left.text.endswith(".")
        assert 150 < COUNT([left.text])[0] <= chunk.MAX_TOKENS


def test_a_heading_opens_a_chunk_once_the_one_before_is_not_small() -> None:
    body = "Plain words in a row make up this paragraph. " * 10
    text = f"# One\n\n{body}\n\n## Two\n\n{body}\n\nThree\n-----\n\n{body}"
    starts = [piece.text.split("\n", 1)[0] for piece in chunk.split(text, COUNT)]
    assert starts == ["# One", "## Two", "Three"]


def test_short_sections_share_a_chunk() -> None:
    assert len(chunk.split("# One\n\na\n\n# Two\n\nb\n\n# Three\n\nc", COUNT)) == 1


def test_a_comment_in_fenced_code_is_no_heading() -> None:
    body = "word " * 60
    text = f"{body}\n\n```\n# comment\nrun\n```\n\nafter"
    assert all(not re.match("# comment", piece.text) for piece in chunk.split(text, COUNT))


def test_a_word_without_end_is_cut() -> None:
    def bytes_as_tokens(texts: object) -> list[int]:
        return [len(text) for text in texts]  # type: ignore[attr-defined]

    chunks = chunk.split("x" * 5000, bytes_as_tokens)
    assert "".join(text.text for text in chunks).startswith("x" * 5000)
    assert all(len(piece.text) <= chunk.MAX_TOKENS for piece in chunks)
