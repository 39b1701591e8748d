"""Questions about real prose: a sentence, and words that point to it and to no other sentence around. Pure.

Nobody wrote questions for docstrings, so they are made from the sentences: part of the words left out, some inflected,
a question word in the gap, the order kept or not. A question is used only if it fits its sentence clearly better than
every other one in the context, by the rarity of the words they share. So the model learns what a search engine knows,
and on real English: which words of a question tell.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from random import Random

from tools.default_model.prompts import REFUSAL, sentences
from tools.default_model.worlds import Asked

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_'-]*")
STOP_WORDS = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "to",
        "in",
        "on",
        "at",
        "by",
        "for",
        "with",
        "from",
        "as",
        "and",
        "or",
        "but",
        "if",
        "is",
        "are",
        "was",
        "were",
        "be",
        "been",
        "being",
        "it",
        "its",
        "this",
        "that",
        "these",
        "those",
        "not",
        "no",
        "can",
        "will",
        "may",
        "must",
        "should",
        "would",
        "could",
        "has",
        "have",
        "had",
        "do",
        "does",
        "did",
        "which",
        "who",
        "whom",
        "what",
        "when",
        "where",
        "why",
        "how",
        "there",
        "then",
        "than",
        "so",
        "such",
        "he",
        "she",
        "they",
        "them",
        "his",
        "her",
        "their",
        "you",
        "your",
        "we",
        "our",
        "i",
        "also",
        "any",
        "all",
        "each",
        "into",
        "over",
        "under",
        "more",
        "most",
        "other",
        "only",
        "same",
        "up",
        "out",
        "about",
    ]
)
_VERB = re.compile(
    r"^((?:The|A|An|This|Each|Every|Its)?\s?[\w'-]+(?:\s[\w'-]+){0,3}?) "
    r"(returns|uses|gives|takes|makes|holds|keeps|needs|allows|provides|contains|represents|raises|creates|computes|defines|"
    r"describes|performs|supports|requires|specifies|stores|controls|determines|indicates|means|works|starts|sends|reads|writes) "
)
_IS = re.compile(r"^((?:The|A|An)?\s?[\w'-]+(?:\s[\w'-]+){0,4}?) (is|are|was|were) ")
MARGIN = 1.25  # how much better than the next best the sentence must fit
NEAR_NOTHING = 0.25  # a question that fits nothing better than this part of itself has no answer there


class Rarity:
    """How much a word tells: the logarithm of one over the share of paragraphs that have it."""

    def __init__(self, paragraphs: Iterable[str]) -> None:
        counts: Counter[str] = Counter()
        total = 0
        for paragraph in paragraphs:
            counts.update(set(stems(paragraph)))
            total += 1
        self._counts, self._total = counts, total

    def of(self, stem: str) -> float:
        return math.log(1.0 + self._total / (1.0 + self._counts[stem]))

    def fit(self, asked: Iterable[str], told: set[str]) -> float:
        """The weight of the stems of a question that a sentence has too; a tenth of it is lost over its length."""
        return sum(self.of(stem) for stem in asked if stem in told) * (1.0 - 0.1 * min(1.0, len(told) / 60.0))


def stem(word: str) -> str:
    """Near enough for English: `serving`, `served`, `serves` fall together."""
    word = word.lower().removesuffix("'s")
    for ending in ("ingly", "ing", "edly", "ed", "ies", "es", "s", "ly", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def stems(text: str) -> list[str]:
    """Stems of the words that tell something."""
    return [stem(word) for word in _WORD.findall(text) if word.lower() not in STOP_WORDS]


def ask_about(passages: Sequence[str], rarity: Rarity, chance: Random, wanted: int) -> list[Asked]:
    """Up to `wanted` questions with their answers; fewer where the sentences are too much alike."""
    pieces = [(piece, number) for number, text in enumerate(passages, start=1) for piece in sentences(text)]
    told = [set(stems(piece)) for piece, _ in pieces]
    candidates = [index for index, (piece, _) in enumerate(pieces) if len(told[index]) >= 4 and len(piece) <= 320]
    chance.shuffle(candidates)
    found: list[Asked] = []
    for index in candidates:
        if len(found) == wanted:
            break
        piece, number = pieces[index]
        question = _question(piece, rarity, chance)
        if question and _stands_out(question, index, told, rarity):
            found.append(Asked(question, f"{piece} [{number}]"))
    return found


def unanswerable(passages: Sequence[str], elsewhere: str, rarity: Rarity, chance: Random) -> Asked | None:
    """A question about `elsewhere`, a paragraph that is not among `passages`; None where they might answer it after all."""
    question = _question(chance.choice(sentences(elsewhere)), rarity, chance)
    asked = set(stems(question))
    if len(asked) < 2:
        return None
    told = [set(stems(piece)) for text in passages for piece in sentences(text)]
    best = max((rarity.fit(asked, each) for each in told), default=0.0)
    return Asked(question, REFUSAL) if best < NEAR_NOTHING * sum(map(rarity.of, asked)) else None


def _stands_out(question: str, index: int, told: Sequence[set[str]], rarity: Rarity) -> bool:
    asked = set(stems(question))
    own = rarity.fit(asked, told[index])
    others = max((rarity.fit(asked, each) for other, each in enumerate(told) if other != index), default=0.0)
    return own > 6.0 and own > MARGIN * others and told[index] not in [*told[:index], *told[index + 1 :]]


def _question(piece: str, rarity: Rarity, chance: Random) -> str:
    text = piece.rstrip(".!?:")
    draw = chance.random()
    if draw < 0.35 and (plain := _by_grammar(text, chance)):
        return plain
    if draw < 0.75:
        return _with_a_gap(text, rarity, chance)
    return _by_words(text, rarity, chance)


def _by_grammar(text: str, chance: Random) -> str:
    """`The cache stores blocks` -> `What does the cache store?`; `X is a kind of Y` -> `What is X?`"""
    if match := _VERB.match(text):
        subject, verb = match.groups()
        return f"{chance.choice(('What does', 'What does', 'When does', 'How does'))} {_lowered(subject)} {verb[:-1]}?"
    if match := _IS.match(text):
        subject, verb = match.groups()
        return f"{chance.choice(('What', 'What', 'How', 'Where'))} {verb} {_lowered(subject)}?"
    return ""


def _lowered(subject: str) -> str:
    first, _, rest = subject.partition(" ")
    lowered = first.lower() if first in ("The", "A", "An", "This", "Each", "Every", "Its") else first
    return f"{lowered} {rest}".strip()


def _with_a_gap(text: str, rarity: Rarity, chance: Random) -> str:
    """The sentence without a span of it, a question word in front or in the gap, other words dropped or inflected."""
    words = text.split()
    size = max(1, min(len(words) // 2, chance.randint(1, 6)))
    start = chance.randint(0, len(words) - size)
    gap = words[start : start + size]
    before, after = words[:start], words[start + size :]
    if len(before) + len(after) > 14:  # a question is short: keep what is near the gap
        keep = chance.randint(5, 12)
        before, after = before[-keep:], after[: max(0, keep - len(before[-keep:]))]
    asks = _question_word(gap, chance)
    kept = [[_bent(word, chance) for word in part if chance.random() > 0.12] for part in (before, after)]
    order = chance.random()
    if order < 0.45:
        parts = [[asks], kept[1], kept[0]]
    elif order < 0.8:
        parts = [[asks], kept[0], kept[1]]
    else:
        parts = [kept[0], [asks.lower()], kept[1]]
    question = " ".join(word for part in parts for word in part).rstrip(",;:")
    return question[:1].upper() + question[1:] + "?" if question else ""


def _question_word(gap: Sequence[str], chance: Random) -> str:
    if any(word[0].isdigit() for word in gap):
        return chance.choice(("How many", "When", "What number", "How much", "In which year"))
    if gap[0] in ("because", "since", "due"):
        return "Why"
    if gap[0] in ("if", "when", "after", "before", "while", "until"):
        return "When"
    if gap[0] in ("in", "at", "on", "from", "under"):
        return chance.choice(("Where", "In what", "From where"))
    if gap[0] in ("by", "with", "through", "using"):
        return "How"
    return chance.choice(("What", "What", "What", "Which", "Who", "What is", "What does", "How does"))


def _by_words(text: str, rarity: Rarity, chance: Random) -> str:
    """A few telling words, as people type them into a search box or a hurried question."""
    words = list(dict.fromkeys(word for word in _WORD.findall(text) if word.lower() not in STOP_WORDS))
    words.sort(key=lambda word: -rarity.of(stem(word)) * chance.uniform(0.4, 1.0))
    chosen = words[: chance.randint(2, 6)]
    chance.shuffle(chosen)
    bent = " ".join(_bent(word, chance) for word in chosen)
    start = chance.choice(
        ("", "", "What about {}?", "What is said about {}?", "Tell me about {}.", "How does {} work?", "Why {}?")
    )
    return start.format(bent) if start else bent


def _bent(word: str, chance: Random) -> str:
    """Now and then another form of the word: a question seldom repeats the sentence's grammar."""
    if chance.random() > 0.2 or len(word) < 5 or not word.isalpha():
        return word
    for ending, others in (("ies", ("y",)), ("ing", ("", "s", "ed")), ("ed", ("", "ing", "s")), ("s", ("",))):
        if word.endswith(ending):
            return word[: -len(ending)] + chance.choice(others)
    return word + chance.choice(("s", "ing", "ed", "s"))
