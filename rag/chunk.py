"""Splits a text into chunks that an embedder reads whole, along the text's own joints. Pure.

Joints, strongest first: a Markdown heading, a blank line, a line end, a sentence end, white space. Pieces between
joints are packed greedily up to a token budget; a heading always opens a new chunk unless the present one is
still small. The next chunk repeats the end of the one before, so that no sentence loses its neighbours to a cut.
A chunk is an exact slice of the text: `text[start:end]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

CHUNKER = "joints-1"  # names these rules: part of a document's rev, so changed rules mean changed chunks
MAX_TOKENS = 224  # with the embedder's own two, below the 256 that MiniLM reads
OVERLAP_TOKENS = 32
SMALL_TOKENS = 48  # a chunk below this goes on over a heading
MAX_PIECE_CHARS = 400  # longer words (base64, minified code) are cut

CountTokens = Callable[[Sequence[str]], list[int]]

_BLOCK = re.compile(r"(?:[^\n]*\S[^\n]*(?:\n|$))+|\n+|[^\S\n]+(?:\n|$)")
_SENTENCE = re.compile(r".+?(?:[.!?…。！？]+[\"')\]]*(?=\s)|\n|$)\s*", re.DOTALL)
_WORD = re.compile(rf"\S{{1,{MAX_PIECE_CHARS}}}\s*|\s+")
_HEADING = re.compile(r"#{1,6} \S|=+\n|\S[^\n]*\n(?:={3,}|-{3,})\s*(?:\n|$)")
_FENCE = re.compile(r"^(?:```|~~~)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Chunk:
    start: int
    end: int
    text: str


@dataclass(frozen=True, slots=True)
class _Piece:
    start: int
    end: int
    tokens: int
    heading: bool


def split(text: str, count_tokens: CountTokens) -> list[Chunk]:
    """The text's chunks in order. Together they hold every character that is not white space."""
    pieces = list(_pieces(text, count_tokens))
    chunks: list[Chunk] = []
    first = 0
    while first < len(pieces):
        last = _fill(pieces, first)
        start, end = _trimmed(text, pieces[first].start, pieces[last - 1].end)
        if start < end and (not chunks or end > chunks[-1].end):
            chunks.append(Chunk(start, end, text[start:end]))
        if last >= len(pieces):
            break
        first = _overlap_from(pieces, first, last)
    return chunks


def _fill(pieces: Sequence[_Piece], first: int) -> int:
    """Where the chunk that begins at piece `first` ends: as many pieces as fit, at least one, up to the next heading."""
    tokens, last = 0, first
    while last < len(pieces):
        piece = pieces[last]
        if last > first and (tokens + piece.tokens > MAX_TOKENS or (piece.heading and tokens >= SMALL_TOKENS)):
            break
        tokens += piece.tokens
        last += 1
    return last


def _overlap_from(pieces: Sequence[_Piece], first: int, last: int) -> int:
    """The piece that the next chunk begins with: a heading repeats nothing; else the last pieces, if the next still fits."""
    if pieces[last].heading:
        return last
    tokens, begin = 0, last
    while begin - 1 > first and tokens + pieces[begin - 1].tokens <= OVERLAP_TOKENS:
        tokens += pieces[begin - 1].tokens
        begin -= 1
    return begin if tokens + pieces[last].tokens <= MAX_TOKENS else last


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())


def _pieces(text: str, count_tokens: CountTokens) -> Iterator[_Piece]:
    """Blocks of the text; those over half the budget in sentences, those sentences still over it in words."""
    spans = list(_matches(_BLOCK, text, 0, len(text)))
    fences = _fenced(text)
    for span, tokens in zip(spans, _counts(text, spans, count_tokens)):
        heading = bool(_HEADING.match(text, span[0])) and not any(start <= span[0] < end for start, end in fences)
        if tokens <= MAX_TOKENS // 2:
            yield _Piece(*span, tokens, heading)
            continue
        sentences = list(_matches(_SENTENCE, text, *span))
        for position, (sentence, size) in enumerate(zip(sentences, _counts(text, sentences, count_tokens))):
            yield from _sentence(text, sentence, size, heading and position == 0, count_tokens)


def _sentence(text: str, span: tuple[int, int], tokens: int, heading: bool, count_tokens: CountTokens) -> Iterator[_Piece]:
    if tokens <= MAX_TOKENS:
        yield _Piece(*span, tokens, heading)
        return
    words = list(_matches(_WORD, text, *span))
    for word, size in zip(words, _counts(text, words, count_tokens)):
        if size <= MAX_TOKENS:
            yield _Piece(*word, size, False)
            continue
        for start in range(word[0], word[1], MAX_TOKENS // 4):  # a character is a few tokens at most
            end = min(start + MAX_TOKENS // 4, word[1])
            yield _Piece(start, end, min(size, MAX_TOKENS), False)


def _counts(text: str, spans: Sequence[tuple[int, int]], count_tokens: CountTokens) -> list[int]:
    return count_tokens([text[start:end] for start, end in spans]) if spans else []


def _matches(pattern: re.Pattern[str], text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Consecutive spans from `start` to `end`; what the pattern does not cover joins the span before it."""
    at = start
    for match in pattern.finditer(text, start, end):
        if match.end() > at:
            yield at, match.end()
            at = match.end()
    if at < end:
        yield at, end


def _fenced(text: str) -> list[tuple[int, int]]:
    """Spans of fenced code, where `# ` is a comment and no heading."""
    marks = [match.start() for match in _FENCE.finditer(text)]
    return list(zip(marks[::2], marks[1::2]))
