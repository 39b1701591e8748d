"""What the model is asked in the evaluation, and what counts as right.

Every task is a question with passages as a node would retrieve them. The prompts are made by `rag.context` and the model's own
chat template: the same text that a node makes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rag.chunk import split
from rag.context import build
from rag.types import Passage
from tools.default_model.bm25 import Bm25
from tools.default_model.prompts import sentences
from tools.default_model.prose import Prose
from tools.default_model.worlds import make_world

QUESTIONS = Path(__file__).with_name("docs_questions.json")
XQUAD_PASSAGES = 3
DOCS_PASSAGES = 4
_MARK = re.compile(r"\s*\[(\d{1,2})\]\s*$")


@dataclass(frozen=True, slots=True)
class Task:
    """`answers` are the texts of which the output must hold one; empty: the only right answer is the refusal."""

    kind: str  # world, unanswerable, xquad or docs
    question: str
    passages: tuple[str, ...]
    answers: tuple[str, ...]
    number: int = 0  # of the passage to cite; 0: not judged
    source: str = "notes.md"


def prompt(task: Task) -> str:
    """The user's message that a node makes of it."""
    passages = [Passage("file-0", task.source, text, 0, len(text), 1.0) for text in task.passages]
    return build(task.question, passages, budget_tokens=1 << 30, count_tokens=len).prompt


def quoted(output: str) -> tuple[str, int]:
    """An output without its citation, and the number it cites (0: none)."""
    match = _MARK.search(output)
    return (output[: match.start()].strip(), int(match.group(1))) if match else (output.strip(), 0)


def holds(output: str, answers: Sequence[str]) -> bool:
    plain = _plain(output)
    return any(_plain(answer) in plain for answer in answers)


def best_sentence(task: Task) -> str:
    """The rule to beat: the sentence with the highest BM25 score, with its passage's number."""
    marked = [(piece, number) for number, text in enumerate(task.passages, start=1) for piece in sentences(text)]
    piece, number = marked[Bm25([piece for piece, _ in marked]).best(task.question, 1)[0]]
    return f"{piece} [{number}]"


def worlds(count: int, seed: int) -> Iterator[Task]:
    """Questions about invented worlds whose names do not occur in training."""
    chance = Random(f"evaluation/{seed}")
    made = 0
    while made < count:
        world = make_world(chance, statements=chance.randint(4, 16), questions=2, evaluation=True)
        for asked in world.asked:
            sentence, number = quoted(asked.answer)
            if not asked.answerable:
                yield Task("unanswerable", asked.question, world.passages, ())
            else:
                yield Task("world", asked.question, world.passages, (sentence,), number)
            made += 1


def unanswerable_prose(prose: Prose, count: int, seed: int) -> Iterator[Task]:
    """Questions of invented worlds over passages of real prose."""
    chance = Random(f"unanswerable/{seed}")
    for _ in range(count):
        asked = make_world(chance, 4, 1, evaluation=True).asked[0]
        yield Task("unanswerable", asked.question, tuple(chance.sample(prose.paragraphs, 3)), ())


def xquad(path: Path, count: int, seed: int) -> Iterator[Task]:
    """Questions of XQuAD in English, spread over its articles, the right paragraph among others of other articles."""
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    chance = Random(f"xquad/{seed}")
    asked = [
        (number, paragraph["context"], each["question"], tuple(answer["text"] for answer in each["answers"]))
        for number, article in enumerate(articles)
        for paragraph in article["paragraphs"]
        for each in paragraph["qas"]
    ]
    for number, context, question, answers in chance.sample(asked, min(count, len(asked))):
        others = [
            paragraph["context"] for at, article in enumerate(articles) if at != number for paragraph in article["paragraphs"]
        ]
        passages = [context, *chance.sample(others, XQUAD_PASSAGES - 1)]
        chance.shuffle(passages)
        yield Task("xquad", question, tuple(passages), answers)


def documents(project: Path) -> Iterator[Task]:
    """The hand-written questions, with the passages of all documents that BM25 finds: the right one may be missing."""
    pages = [*sorted(project.glob("*.md")), *sorted((project / "docs").rglob("*.md"))]
    chunks = [chunk.text for page in pages for chunk in split(page.read_text(encoding="utf-8"), _pieces)]
    index = Bm25(chunks)
    for each in json.loads(QUESTIONS.read_text(encoding="utf-8")):
        found = tuple(chunks[number] for number in index.best(each["question"], DOCS_PASSAGES))
        yield Task("docs", each["question"], found, tuple(each["answers"]), source=each["document"])


def _pieces(texts: Sequence[str]) -> list[int]:
    """About as many as MiniLM's tokens: words, and marks by themselves."""
    return [len(re.findall(r"\w{1,6}|[^\w\s]", text)) for text in texts]


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[`*]", "", text).lower().split())
