"""From worlds, prose, drills and talk to token rows. Pure: an example depends on the seed, its number and its stage alone.

A conversation opens with passages and a question and goes on with more questions about the same passages: one reading, several
lessons. Loss falls on answers, most on their labels (there the sentence is chosen, the rest is copying), and lightly on a
sample of all other text, so that the model knows English.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer

from tools.default_model import drills, talk
from tools.default_model.curriculum import STAGES
from tools.default_model.inquiries import Rarity, ask_about, stems, unanswerable
from tools.default_model.prompts import LABELS, MAX_LABELS, closed, grounded, label, opening, quotable, sentences
from tools.default_model.prose import Prose
from tools.default_model.vocabulary import load_tokenizer
from tools.default_model.worlds import Asked, World, make_world

CHARS_PER_TOKEN = 3.1  # a little under what is measured on passages, so that most examples fit
CHOICE_WEIGHT = 8.0  # of an answer's first token
TEXT_SHARE, TEXT_WEIGHT = 0.1, 0.3
SPARE = 1.1  # how much more is made than fits, so that rows fill up


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of packed examples. `segments` is 0 for padding, else one number an example in its row."""

    ids: np.ndarray  # [rows, tokens] int32
    positions: np.ndarray  # [rows, tokens] int16, from 0 in each example
    segments: np.ndarray  # [rows, tokens] int16
    weights: np.ndarray  # [rows, tokens] float32: of predicting the token after this one


@dataclass(frozen=True, slots=True)
class Example:
    ids: np.ndarray  # [n] int32
    weights: np.ndarray  # [n] float32, of predicting the token at this place


FOLLOW_UPS = (0, 2, 4, 6)  # more questions about the same passages: one reading, several lessons

Parts = list[tuple[str, bool]]  # text, and whether it is to be learned


class Maker:
    """Makes batches. One a process; building it reads the prose and counts its words (a few seconds)."""

    def __init__(self, prose: Prose, tokenizer: Tokenizer | None, seed: int) -> None:
        self._paragraphs = prose.paragraphs
        self._rarity = Rarity(prose.paragraphs)
        self._tokenizer = tokenizer
        self._seed = seed
        pool: dict[str, None] = {}
        for paragraph in prose.paragraphs[:20_000]:
            pool.update(dict.fromkeys(word for word in paragraph.lower().split() if word.isalpha() and len(word) > 2))
        self._pool = list(pool)
        self._labels = {tokenizer.token_to_id(each) for each in LABELS} if tokenizer else set()

    @classmethod
    def load(cls, work: Path, seed: int) -> Maker:
        return cls(Prose.load(work / "prose.json"), load_tokenizer(work / "tokenizer.json"), seed)

    def batch(self, number: int, stage: int, tokens: int) -> Batch:
        """Batch `number`: about `tokens` tokens in rows of the stage's length, filled longest example first."""
        length = STAGES[stage].row_tokens
        rows = max(1, tokens // length)
        chance = Random(f"{self._seed}/{number}/{stage}")
        examples: list[Example] = []
        while sum(len(example.ids) for example in examples) < SPARE * rows * length:
            drawn = [self._draw(chance, stage) for _ in range(max(8, rows * length // 800))]
            examples += [each for each in self._encoded(drawn, chance) if len(each.ids) <= length]
        return _packed(examples, rows, length)

    def texts(self, chance: Random) -> Iterator[str]:
        """Texts as they occur in training, without end: what a tokenizer is to know."""
        while True:
            for text, _ in self._draw(chance, len(STAGES) // 2):
                yield text

    def _draw(self, chance: Random, stage: int) -> Parts:
        mix, brief = STAGES[stage].mix, STAGES[stage].brief
        kind = chance.choices(list(mix), list(mix.values()))[0]
        longest = STAGES[stage].row_tokens * CHARS_PER_TOKEN
        characters = int(longest * chance.choice((0.25, 0.45, 0.7, 0.9)) * chance.uniform(0.8, 1.0))
        match kind:
            case "echo":
                first, again = drills.echo(chance, self._pool, min(120, characters // 14))
                return [(f"{first}\n", False), (closed(again), True)]
            case "recall":
                return drills.recall(chance, self._pool, characters)
            case "quiz":
                return drills.quiz(chance, self._pool, characters)
            case "lookup":
                pieces = min(24, max(2, characters // 75))
                return self._conversation(drills.lookup(chance, self._pool, pieces, chance.randint(2, 7)), chance, brief)
            case "world":
                return self._conversation(self._world(chance, characters), chance, brief)
            case "prose":
                return self._conversation(self._inquiry(chance, characters), chance, brief)
        said = talk.turns(chance, " ".join(drills.words_of(chance, self._pool, chance.randint(1, 3))))
        return _turns([(question, answer) for question, answer in said])

    def _world(self, chance: Random, characters: int) -> World:
        fillers: list[str] = []
        if chance.random() < 0.3:
            for paragraph in chance.sample(self._paragraphs, max(1, characters // 800)):
                filler = chance.choice(sentences(paragraph))
                if len(filler) <= 200 and filler.endswith("."):
                    fillers.append(filler)
                    characters -= len(filler)
        return make_world(chance, max(2, characters // 60), chance.randint(3, 7), fillers)

    def _inquiry(self, chance: Random, characters: int) -> World:
        """Passages of real prose, next to one another in their source or from anywhere, and questions made from them."""
        count = chance.randint(1, 5)
        share = characters // count
        together = chance.random() < 0.5
        at = chance.randrange(len(self._paragraphs))
        passages: list[str] = []
        for _ in range(count):
            at = at if together else chance.randrange(len(self._paragraphs))
            text = self._paragraphs[at % len(self._paragraphs)]
            while len(text) < share * 0.8:
                at += 1
                text += chance.choice((" ", "\n\n")) + self._paragraphs[at % len(self._paragraphs)]
            at += 1
            passages.append(_batch(text, share))
        asked = ask_about(passages, self._rarity, chance, chance.randint(3, 7))
        if chance.random() < 0.25:
            foreign = unanswerable(passages, chance.choice(self._paragraphs), self._rarity, chance)
            asked += [foreign] if foreign and stems(foreign.question) else []
        chance.shuffle(asked)
        return World(tuple(passages), tuple(asked))

    def _conversation(self, world: World, chance: Random, brief_share: float) -> Parts:
        """Questions about the same passages: one reading, several lessons. In some all answers break off behind their labels:
        choosing is what takes long to learn, so most of such a row teaches it."""
        if not world.asked:
            return []
        offset = chance.choice((0, chance.randrange(MAX_LABELS)))
        lines = quotable(world.passages)
        labels = {line: label(place, offset) for place, line in reversed(list(enumerate(lines)))}
        asked = world.asked if (brief := chance.random() < brief_share) else world.asked[: 1 + chance.choice(FOLLOW_UPS)]
        parts: Parts = []
        for each in asked:
            content = each.question if parts else grounded(each.question, world.passages, offset)
            chosen = labels.get(each.answer, LABELS[0])
            parts += [(opening(content), False), (chosen if brief else closed(f"{chosen}{each.answer}"), True)]
        return parts

    def _encoded(self, drawn: Sequence[Parts], chance: Random) -> list[Example]:
        assert self._tokenizer is not None
        texts = [text for parts in drawn for text, _ in parts]
        encodings = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        examples = []
        for parts in drawn:
            ids: list[int] = []
            weights: list[float] = []
            for _, learned in parts:
                piece = next(encodings).ids
                ids += piece
                if learned:
                    weights += [CHOICE_WEIGHT if token in self._labels else 1.0 for token in piece]
                else:
                    weights += [TEXT_WEIGHT if chance.random() < TEXT_SHARE else 0.0 for _ in piece]
            if ids:
                examples.append(Example(np.array(ids, np.int32), np.array(weights, np.float32)))
        return examples


def asked_text(asked: Asked, passages: Sequence[str]) -> str:
    """The prompt of a question about passages, up to where the answer begins."""
    return opening(grounded(asked.question, passages))


def _turns(said: Sequence[tuple[str, str]]) -> Parts:
    parts: Parts = []
    for content, answer in said:
        parts += [(opening(content), False), (closed(answer), True)]
    return parts


def _batch(text: str, characters: int) -> str:
    """At most about `characters` of it, whole sentences."""
    if len(text) <= characters:
        return text
    end = text.rfind(". ", 0, characters)
    return text[: end + 1] if end > 0 else text[: max(characters, 200)]


def _packed(examples: Sequence[Example], rows: int, length: int) -> Batch:
    """The longest first, each into the fullest row that has room; what finds none is left out."""
    ids = np.zeros((rows, length), np.int32)
    positions = np.zeros((rows, length), np.int16)
    segments = np.zeros((rows, length), np.int16)
    weights = np.zeros((rows, length), np.float32)
    used = [0] * rows
    numbers = [0] * rows
    for example in sorted(examples, key=lambda each: -len(each.ids)):
        size = len(example.ids)
        row = max((each for each in range(rows) if used[each] + size <= length), key=used.__getitem__, default=None)
        if row is None:
            continue
        start = used[row]
        numbers[row] += 1
        ids[row, start : start + size] = example.ids
        positions[row, start : start + size] = np.arange(size)
        segments[row, start : start + size] = numbers[row]
        weights[row, start : start + size - 1] = example.weights[1:]
        used[row] += size
    return Batch(ids, positions, segments, weights)
