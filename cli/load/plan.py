"""What a load test sends, and when: decided before it begins, by one seed. No I/O but for reading a data set's file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.errors import BadRequest
from mesh.files import text_of

if TYPE_CHECKING:
    from random import Random

Conversation = tuple[dict[str, Any], ...]

WORDS = tuple(
    [
        "time",
        "river",
        "stone",
        "light",
        "paper",
        "garden",
        "window",
        "machine",
        "letter",
        "market",
        "winter",
        "signal",
        "copper",
        "engine",
        "harbor",
        "pocket",
        "silver",
        "mirror",
        "forest",
        "bridge",
        "candle",
        "thunder",
        "island",
        "ladder",
        "orange",
        "velvet",
        "rocket",
        "summer",
        "needle",
        "planet",
        "basket",
        "shadow",
    ]
)
PREFIX_GROUPS = 8
PREFIX_WORDS = 128
CHAT_TURNS = 3


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request. `at_s` after the start; None: as soon as a user is free."""

    number: int
    messages: Conversation
    at_s: float | None = None


def words(random: Random, number: int) -> str:
    return " ".join(random.choice(WORDS) for _ in range(number))


def user_turn(text: str) -> Conversation:
    return ({"role": "user", "content": text},)


def random_prompts(random: Random, length: int) -> Iterator[Conversation]:
    """Unrelated prompts of `length` words: nothing to be found in a prefix cache."""
    while True:
        yield user_turn(words(random, length))


def prefix_prompts(random: Random, length: int) -> Iterator[Conversation]:
    """Prompts that share one of `PREFIX_GROUPS` long beginnings, as with system prompts."""
    prefixes = [words(random, PREFIX_WORDS) for _ in range(PREFIX_GROUPS)]
    while True:
        yield user_turn(f"{random.choice(prefixes)} {words(random, length)}")


def chat_prompts(random: Random, length: int) -> Iterator[Conversation]:
    """Conversations: each request repeats the one before and adds a turn, up to `CHAT_TURNS`."""
    while True:
        conversation: Conversation = ()
        for _ in range(CHAT_TURNS):
            conversation = (*conversation, {"role": "user", "content": words(random, length)})
            yield conversation
            conversation = (*conversation, {"role": "assistant", "content": words(random, length)})


def file_prompts(path: Path) -> Iterator[Conversation]:
    """The lines of a file, over and over: JSON with `messages`, `prompt` or ShareGPT's `conversations`, or plain text.

    Raises:
        BadRequest: no such file, nothing in it, or JSON of another form (with the line's number).
    """
    try:
        lines = [(number, line) for number, line in enumerate(text_of(path.read_bytes()).splitlines(), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(
            f"--dataset: expected random, prefix, chat or a text file, got {str(path)!r}: {error}", "dataset"
        ) from None
    if not lines:
        raise BadRequest(f"--dataset: {path} is empty", "dataset")
    return cycle([_line_prompt(path, number, line) for number, line in lines])


def _line_prompt(path: Path, number: int, line: str) -> Conversation:
    if not line.lstrip().startswith("{"):
        return user_turn(line)
    try:
        row = json.loads(line)
        if "messages" in row:
            return tuple(dict(message) for message in row["messages"])
        if "prompt" in row:
            return user_turn(str(row["prompt"]))
        return user_turn(next(turn["value"] for turn in row["conversations"] if turn["from"] in ("human", "user")))
    except (ValueError, KeyError, TypeError, StopIteration):
        form = '{"messages": [...]}, {"prompt": "..."} or {"conversations": [...]}'
        raise BadRequest(f"--dataset: {path}, line {number}: expected {form}", "dataset") from None


def prompts(dataset: str, random: Random, length: int) -> Iterator[Conversation]:
    """The prompts of a data set by its name, or of a file. Raises BadRequest as `file_prompts` does."""
    match dataset:
        case "random":
            return random_prompts(random, length)
        case "prefix":
            return prefix_prompts(random, length)
        case "chat":
            return chat_prompts(random, length)
    return file_prompts(Path(dataset))


def arrivals_s(random: Random, rate: float, burstiness: float) -> Iterator[float]:
    """When requests arrive, in seconds from the start: `rate` a second on average, without end.

    The gaps are gamma distributed with shape `burstiness`: 1 is a Poisson process, less is burstier, more is
    steadier. Source: the request rates of vLLM's `bench serve`.
    """
    at_s = 0.0
    while True:
        yield at_s
        at_s += random.gammavariate(burstiness, 1.0 / (rate * burstiness))


def plan(
    messages: Iterator[Conversation], arrivals: Iterator[float] | None, requests: int | None, duration_s: float | None
) -> Iterator[PlannedRequest]:
    """The requests in order, until their number or their arrival is beyond the limit."""
    for number in count() if requests is None else range(requests):
        at_s = next(arrivals) if arrivals is not None else None
        if at_s is not None and duration_s is not None and at_s >= duration_s:
            return
        yield PlannedRequest(number, next(messages), at_s)
