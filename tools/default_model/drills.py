"""Copying and looking up with random words: what the model must be able to do before words mean anything. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from tools.default_model import names
from tools.default_model.prompts import ASSISTANT, MAX_LABELS, REFUSAL, label, opening
from tools.default_model.worlds import Asked, World

Parts = list[tuple[str, bool]]  # text, and whether it is to be learned


def words_of(chance: Random, pool: Sequence[str], count: int) -> list[str]:
    """Words of real text, of invented ones, and numbers."""
    return [
        str(chance.randint(0, 9999))
        if (draw := chance.random()) < 0.06
        else names.coined(chance, "", evaluation=False)
        if draw < 0.25
        else chance.choice(pool)
        for _ in range(count)
    ]


def echo(chance: Random, pool: Sequence[str], count: int) -> tuple[str, str]:
    """A run of words, and the same run again: the plainest reason to copy."""
    run = " ".join(words_of(chance, pool, count))
    return run, run


def recall(chance: Random, pool: Sequence[str], characters: int) -> Parts:
    """Labelled runs of words, then one word after another of them, each with the label of its run behind it: nothing but
    choosing, many times a row. Sometimes there is already something between word and label, as in a conversation."""
    offset = chance.randrange(MAX_LABELS)
    runs = _runs(chance, pool, max(2, characters // 45))
    parts: Parts = [(_told(runs, offset), False)]
    for _ in range(max(2, characters // 22)):
        place, words = _some(chance, runs, 1)
        if words:
            parts += [(f" {words[0]}{chance.choice(('', '', '?', ASSISTANT))}", False), (label(place, offset), True)]
    return parts


def quiz(chance: Random, pool: Sequence[str], characters: int) -> Parts:
    """The same with a few words of a run, asked as questions are."""
    offset = chance.randrange(MAX_LABELS)
    runs = _runs(chance, pool, max(2, characters // 60))
    parts: Parts = [(_told(runs, offset), False)]
    for _ in range(max(2, characters // 40)):
        place, words = _some(chance, runs, chance.choice((1, 2, 3)))
        if words:
            parts += [(opening(f" {' '.join(words)}{chance.choice(('', '?'))}"), False), (label(place, offset), True)]
    return parts


def _runs(chance: Random, pool: Sequence[str], count: int) -> list[list[str]]:
    return [words_of(chance, pool, chance.randint(1, 5)) for _ in range(count)]


def _told(runs: Sequence[Sequence[str]], offset: int) -> str:
    return "".join(f"{label(place, offset)} {' '.join(words)}\n" for place, words in enumerate(runs))


def _some(chance: Random, runs: Sequence[Sequence[str]], most: int) -> tuple[int, list[str]]:
    """A run's place and up to `most` of its words that no other run has; none where there are none."""
    place = chance.randrange(len(runs))
    own = [word for word in runs[place] if sum(word in words for words in runs) == 1]
    return place, chance.sample(own, min(most, len(own)))


def lookup(chance: Random, pool: Sequence[str], pieces: int, questions: int) -> World:
    """Sentences of random words; a question is some words of one of them, in another order, maybe with a foreign one."""
    sentences: list[list[str]] = []
    for _ in range(pieces):
        words = words_of(chance, pool, chance.randint(3, 12))
        if sentences and chance.random() < 0.3:  # half of another sentence: one word alone must not decide
            words[: len(words) // 2] = chance.choice(sentences)[: len(words) // 2]
        sentences.append(words)
    passages: list[list[str]] = []
    number_of: list[int] = []
    for words in sentences:
        if not passages or chance.random() < 0.5:
            passages.append([])
        passages[-1].append(f"{' '.join(words).capitalize()}.")
        number_of.append(len(passages))
    asked: list[Asked] = []
    for _ in range(questions):
        if chance.random() < 0.1:
            asked.append(Asked(" ".join(words_of(chance, pool, chance.randint(2, 4))) + "?", REFUSAL))
            continue
        index = chance.randrange(pieces)
        own = set(sentences[index])
        telling = chance.sample(sentences[index], min(len(own), chance.randint(2, 4)))
        if any(set(telling) <= set(other) for place, other in enumerate(sentences) if place != index):
            continue
        if chance.random() < 0.2:
            telling.append(chance.choice(pool))
        question = " ".join(telling) + "?"
        answer = f"{' '.join(sentences[index]).capitalize()}. [{number_of[index]}]"
        asked.append(Asked(chance.choice(("", "What about ", "Which has ")) + question, answer))
    return World(tuple(" ".join(passage) for passage in passages), tuple(asked))
