"""Answers while their nodes are killed: are they all given, exactly as undisturbed, and what does it cost?

`python -m bench.availability [--quick] [--seconds S] [--users N] [--out FILE]`; the last line is one JSON object.

Three nodes hold every layer of the default model twice, a fourth one holds none and is asked. Each question is answered
once undisturbed. Then as many users ask them again and again while stages are struck (`bench.violence`), and every
answer is compared in all it says: tokens, text, log-probabilities, why it ended. Clients do not retry: what they get is
the mesh's own work. Some of them hang up, most of those at the very moment of a strike.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psutil
import trio

from bench.machine import machine
from bench.violence import ENTRY, STAGES, Strike, Violence
from cli.local_mesh import LocalMesh
from mesh.client.client import AsyncClient
from mesh.client.flow import RetryBudget
from mesh.errors import MeshError

HANG_UP_SHARE = 0.1
STOP_SHARE = 0.3
TOPICS = ("the sea", "a lighthouse", "bread", "old maps", "a long winter", "two rivers")


@dataclass(frozen=True, slots=True)
class Question:
    kind: str
    params: Mapping[str, Any]


@dataclass(slots=True)
class Said:
    """One choice of an answer, as far as it came."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(slots=True)
class Outcome:
    """One request as its client saw it. Times in seconds on trio's clock."""

    question: Question
    began_s: float
    choices: dict[int, Said] = field(default_factory=dict)
    times_s: list[float] = field(default_factory=list)  # when tokens came
    ended_s: float = 0.0
    attempts: int = 0
    numerics: str = ""
    missing_tokens: int = 0
    duplicate_tokens: int = 0
    error: str = ""
    hung_up: bool = False
    stream: str = ""

    @property
    def tokens(self) -> int:
        return sum(len(said.tokens) for said in self.choices.values())

    @property
    def pause_s(self) -> float:
        return max((later - earlier for earlier, later in zip(self.times_s, self.times_s[1:])), default=0.0)


def questions(tokens: int) -> list[Question]:
    """One of each kind that a replay could get wrong. `tokens`: length of an answer."""
    plain: list[dict[str, Any]] = [
        {"seed": 11, "temperature": 1.0},
        {"seed": 12, "temperature": 0.0},
        {"seed": 13, "temperature": 0.8, "top_p": 0.9, "top_k": 50},
        {"seed": 14, "temperature": 1.0, "frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.2},
        {"seed": 15, "temperature": 1.0, "n": 2, "max_tokens": tokens // 2},
        {"seed": 16, "temperature": 1.0, "logprobs": True, "top_logprobs": 3},
    ]
    kinds = ("sampled", "greedy", "top_p", "penalties", "n=2", "logprobs")
    return [
        Question(kind, {"max_tokens": tokens, "ignore_eos": True, "messages": _about(topic), **params})
        for kind, topic, params in zip(kinds, TOPICS, plain)
    ]


def stopped_at(outcome: Outcome) -> Question:
    """The same question with a stop string that its answer reaches late, in the middle of a token or over several."""
    text = outcome.choices[0].text
    at = len(text) * 3 // 4
    return Question("stop", {**outcome.question.params, "stop": [text[at : at + 5]]})


def _about(topic: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Tell me of {topic}."}]


async def ask(client: AsyncClient, question: Question, hang_up: trio.CancelScope | None = None) -> Outcome:
    """`hang_up`: the client goes when it is cancelled."""
    outcome = Outcome(question, trio.current_time())
    try:
        with hang_up or nullcontext():
            async with await client.chat(
                question.params["messages"],
                stream=True,
                return_token_ids=True,
                **{name: value for name, value in question.params.items() if name != "messages"},
            ) as stream:
                async for chunk in stream:
                    _take(outcome, chunk)
                outcome.attempts, outcome.numerics = stream.mesh.get("attempts", 0), stream.mesh.get("numerics", "")
                outcome.missing_tokens = stream.progress.missing_tokens
                outcome.duplicate_tokens = stream.progress.duplicate_tokens
                outcome.stream = stream.id
    except MeshError as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.hung_up = hang_up is not None and hang_up.cancelled_caught
    outcome.ended_s = trio.current_time()
    return outcome


def _take(outcome: Outcome, chunk: Mapping[str, Any]) -> None:
    for choice in chunk.get("choices") or ():
        said = outcome.choices.setdefault(choice["index"], Said())
        tokens = choice.get("token_ids") or ()
        if tokens:
            outcome.times_s.append(trio.current_time())
        said.tokens += tokens
        said.text += (choice.get("delta") or {}).get("content") or ""
        said.logprobs += (choice.get("logprobs") or {}).get("content") or ()
        said.finish_reason = choice.get("finish_reason") or said.finish_reason


async def undisturbed(client: AsyncClient, users: int, tokens: int) -> tuple[list[Outcome], float]:
    """The reference for every question, asked by as many users as later, and how long it took.

    Raises:
        MeshError: an undisturbed answer failed.
    """
    begun_s = trio.current_time()
    references = await _ask_all(client, questions(tokens), users)
    took_s = trio.current_time() - begun_s
    references += await _ask_all(client, [stopped_at(references[0])], 1)
    for reference in references:
        if reference.error:
            raise MeshError(f"an undisturbed answer failed ({reference.question.kind}): {reference.error}")
    return references, took_s


async def _ask_all(client: AsyncClient, asked: Sequence[Question], users: int) -> list[Outcome]:
    outcomes: list[Outcome] = []
    slots = trio.Semaphore(users)

    async def one(question: Question) -> None:
        async with slots:
            outcomes.append(await ask(client, question))

    async with trio.open_nursery() as nursery:
        for question in asked:
            nursery.start_soon(one, question)
    return sorted(outcomes, key=lambda outcome: asked.index(outcome.question))


async def disturbed(
    client: AsyncClient, violence: Violence, asked: Sequence[Question], users: int, seconds: float, stop_share: float
) -> tuple[list[Outcome], float]:
    """Users ask while the mesh is struck; no question is asked after `seconds`. All outcomes, and how long it took."""
    outcomes: list[Outcome] = []
    begun_s, rng = trio.current_time(), violence.rng

    async def user() -> None:
        while trio.current_time() < begun_s + seconds:
            leaves = trio.CancelScope() if rng.random() < HANG_UP_SHARE else None
            if leaves is not None:
                violence.hang_ups.append(leaves)
            outcomes.append(await ask(client, rng.choice(asked), leaves))
            if leaves in violence.hang_ups:
                violence.hang_ups.remove(leaves)

    async with trio.open_nursery() as nursery:
        for _ in range(users):
            nursery.start_soon(user)
        await violence.run(stop_share, begun_s + seconds)
    return outcomes, trio.current_time() - begun_s


# --- what it comes to


def judged(references: Sequence[Outcome], outcomes: Sequence[Outcome], strikes: Sequence[Strike]) -> dict[str, Any]:
    """The figures of the disturbed phase; clients that hung up count only as such."""
    expected = {reference.question.kind: reference.choices for reference in references}
    stayed = [outcome for outcome in outcomes if not outcome.hung_up]
    answered = [outcome for outcome in stayed if not outcome.error]
    exact = [outcome for outcome in answered if outcome.choices == expected[outcome.question.kind]]
    resumed = [outcome for outcome in answered if outcome.attempts > 1]
    kills = [strike for strike in strikes if strike.with_signal.name == "SIGKILL"]
    return {
        "requests": len(stayed),
        "success_rate": round(len(answered) / max(1, len(stayed)), 4),
        "exact": round(len(exact) / max(1, len(answered)), 4),
        "said_exact": sum(outcome.numerics == "exact" for outcome in answered),
        "kills": len(kills),
        "stops": len(strikes) - len(kills),
        "hang_ups": len(outcomes) - len(stayed),
        "attempts": dict(sorted(Counter(str(outcome.attempts) for outcome in answered).items())),
        "pause_ms": {
            "kill": _quantiles_ms([one.pause_s for one in resumed if _struck(one, strikes) == "SIGKILL"]),
            "stop": _quantiles_ms([one.pause_s for one in answered if _struck(one, strikes) == "SIGSTOP"]),
        },
        "ttft_ms": _quantiles_ms(_first_s(answered)),
        "missing_tokens": sum(outcome.missing_tokens for outcome in outcomes),
        "duplicate_tokens": sum(outcome.duplicate_tokens for outcome in outcomes),
        "kinds": dict(sorted(Counter(outcome.question.kind for outcome in answered).items())),
        "failures": [_story(outcome) for outcome in stayed if outcome.error][:20],
        "differing": [_story(outcome) for outcome in answered if outcome not in exact][:20],
    }


def _struck(outcome: Outcome, strikes: Sequence[Strike]) -> str:
    """The signal of the only strike that fell into the answer; empty where there was none, or several."""
    signals = [strike.with_signal.name for strike in strikes if outcome.began_s < strike.at_s < outcome.ended_s]
    return signals[0] if len(signals) == 1 else ""


def _first_s(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.times_s[0] - outcome.began_s for outcome in outcomes if outcome.times_s]


def _quantiles_ms(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    if not ordered:
        return {"count": 0}
    at = {name: ordered[min(len(ordered) - 1, int(len(ordered) * share))] for name, share in (("p50", 0.5), ("p99", 0.99))}
    return {"count": len(ordered), **{name: round(value * 1e3, 1) for name, value in at.items()}}


def _story(outcome: Outcome) -> dict[str, Any]:
    return {
        "kind": outcome.question.kind,
        "stream": outcome.stream,
        "tokens": outcome.tokens,
        "attempts": outcome.attempts,
        "took_s": round(outcome.ended_s - outcome.began_s, 1),
        "error": outcome.error,
    }


async def measure(
    mesh: LocalMesh, users: int, seconds: float, tokens: int, rng: Random, stop_share: float = STOP_SHARE
) -> dict[str, Any]:
    """Starts the nodes, and everything after that. Raises MeshError when the mesh does not come up or does not recover."""
    started = await trio.to_thread.run_sync(mesh.start_all, {ENTRY: ("--layers", "none"), **STAGES})
    entry, stages = started[0], dict(zip(STAGES, started[1:]))
    process = psutil.Process(entry.pid)
    async with (
        httpx.AsyncClient(timeout=30.0, trust_env=False) as http,
        AsyncClient([entry.http], budget=RetryBudget(retries=0)) as client,
    ):
        violence = Violence(mesh, entry, stages, http, rng)
        await violence.whole()
        references, undisturbed_s = await undisturbed(client, users, tokens)
        rss_bytes = process.memory_info().rss
        outcomes, disturbed_s = await disturbed(
            client, violence, [reference.question for reference in references], users, seconds, stop_share
        )
        leaks = await violence.at_rest()
    for outcome in sorted(outcomes, key=lambda one: one.pause_s)[-5:]:
        print(f"pause {outcome.pause_s:.2f} s: {_story(outcome)}", file=sys.stderr)
    return {
        **judged(references, outcomes, violence.strikes),
        "ttft_undisturbed_ms": _quantiles_ms(_first_s(references)),
        "tok_s": {
            "undisturbed": round(sum(reference.tokens for reference in references[:-1]) / undisturbed_s, 1),
            "disturbed": round(sum(outcome.tokens for outcome in outcomes) / disturbed_s, 1),
        },
        "whole_again_s": _seconds([strike.whole_at_s - strike.at_s for strike in violence.strikes]),
        "leaks": leaks,
        "entry_rss_mib": [round(size / 2**20, 1) for size in (rss_bytes, process.memory_info().rss)],
    }


def _seconds(seconds: list[float]) -> list[float]:
    """Shortest and longest."""
    return [round(min(seconds), 1), round(max(seconds), 1)] if seconds else []


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="ends within a minute on two cores")
    parser.add_argument("--seconds", type=float, help="how long questions are asked under violence (120; quick: 25)")
    parser.add_argument("--users", type=int, default=4, help="how many ask at once")
    parser.add_argument("--tokens", type=int, default=120, help="length of an answer")
    parser.add_argument("--seed", type=int, default=1, help="of who is struck when, and what is asked")
    parser.add_argument("--logs", type=Path, help="keep the nodes' logs and data here")
    parser.add_argument("--out", type=Path, help="also write the JSON object here")
    options = parser.parse_args()
    seconds = options.seconds or (25.0 if options.quick else 120.0)
    with LocalMesh(options.logs) as mesh:
        figures = trio.run(measure, mesh, options.users, seconds, options.tokens, Random(options.seed))
    report = {
        "bench": "availability",
        "command": f"python -m bench.availability --seconds {seconds:g} --users {options.users} --seed {options.seed}",
        **figures,
        "isa": machine()["isa"],
        "machine": machine(),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
