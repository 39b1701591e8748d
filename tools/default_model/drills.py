"""Copying and looking up with random words: what the model must be able to do before words mean anything. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from tools.default_model import names
from tools.default_model.prompts import REFUSAL
from tools.default_model.worlds import Asked, World


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
