"""Real models with and without guesses: the same tokens and logits, for any sampling parameters and any split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mesh.ids import StreamId
from node.engine.api import SequenceKey, TokenOut
from node.engine.scheduling.speculation import StepCosts
from tests.engine.test_prefix_cache import SplitPath, bits, numbers
from tests.engine.test_worker import Running, opening, running

PROMPT = numbers(1, 20) * 3
ANSWER = 48
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.3, "seed": 1},
    {"temperature": 0.8, "seed": 2, "top_k": 3},
    {"temperature": 0.5, "seed": 3, "frequency_penalty": 0.4, "repetition_penalty": 1.1},
    {"temperature": 0.4, "seed": 4, "top_p": 0.7, "stop_token_ids": tuple(range(400, 420)), "min_tokens": 9},
]


def guesses(*engines: Running) -> tuple[int, int]:
    statistics = engines[0].engine.statistics().scheduler
    return statistics.guessed_tokens, statistics.true_guesses


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["copying-llama", "copying-mistral"])
def test_no_guess_changes_a_token_or_a_logit(
    name: str, dtype: str, checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepCosts, "pays", lambda *given: True)  # otherwise measured step times decide what is guessed
    directory = checkpoint_of(name)
    with running((directory, 0, 4), dtype=dtype, speculates=False) as plain:
        path = SplitPath((plain, 0, 4))
        expected = [bits(path.answer(f"s{n}", PROMPT, **{"max_tokens": ANSWER, **each})) for n, each in enumerate(SAMPLINGS)]
        assert guesses(plain) == (0, 0)
    with running((directory, 0, 4), dtype=dtype) as solo:
        path = SplitPath((solo, 0, 4))
        for n, each in enumerate(SAMPLINGS):
            assert bits(path.answer(f"s{n}", PROMPT, **{"max_tokens": ANSWER, **each})) == expected[n], each
        guessed, true = guesses(solo)
        assert 0 < true < guessed, "some guesses must be right and some wrong"
    with running((directory, 0, 2), dtype=dtype) as first, running((directory, 2, 4), dtype=dtype, step_tokens=7) as last:
        path = SplitPath((first, 0, 2), (last, 2, 4))
        for n, each in enumerate(SAMPLINGS):
            assert bits(path.answer(f"s{n}", PROMPT, **{"max_tokens": ANSWER, **each})) == expected[n], each
        assert 0 < guesses(first)[1] < guesses(first)[0] and guesses(last) == (0, 0), "the first stage guesses"


def test_an_attempt_lost_during_guesses_replays_to_the_same_tokens(
    checkpoint_of: Callable[[str], Path],
) -> None:
    directory = checkpoint_of("copying-llama")
    sampling: dict[str, Any] = {"max_tokens": ANSWER, "temperature": 0.3, "seed": 1}
    with running((directory, 0, 4), speculates=False) as plain:
        expected = [out.token for out in SplitPath((plain, 0, 4)).answer("plain", PROMPT, **sampling)]
    with running((directory, 0, 3)) as first, running((directory, 1, 4)) as last:
        path = SplitPath((first, 0, 3), (last, 3, 4))
        for lost_after in (1, 5, 17, 30, 46):
            before = opening("lost", 3, 4, PROMPT, attempt=lost_after, **sampling)
            last.engine.open(before)
            first.engine.open(opening("lost", 0, 3, PROMPT, attempt=lost_after, **sampling))
            seen: list[int] = []
            while len(seen) < lost_after:
                out = last.next()
                if isinstance(out, TokenOut) and out.key == before.key:
                    seen.append(out.token)
            for engine in (first, last):
                engine.engine.close(before.key)
            assert seen == expected[:lost_after]
            so_far = PROMPT + tuple(seen)
            again = {**sampling, "prompt": len(PROMPT), "attempt": 100 + lost_after}
            path.stages[1][0].engine.open(opening("lost", 2, 4, so_far, **again))
            first.engine.open(opening("lost", 0, 2, so_far, **again))
            rest: list[int] = []
            while len(rest) < ANSWER - lost_after:
                out = last.next()
                if isinstance(out, TokenOut) and out.key == SequenceKey(StreamId("lost"), 0, 100 + lost_after):
                    rest.append(out.token)
            assert rest == expected[lost_after:]
            first.engine.close(SequenceKey(StreamId("lost"), 0, 100 + lost_after))
        assert guesses(first)[0] > 0


def test_guesses_in_a_batch_change_no_other_sequence(checkpoint_of: Callable[[str], Path]) -> None:
    directory = checkpoint_of("copying-qwen3")
    wanted = {f"s{n}": {"max_tokens": ANSWER, **each} for n, each in enumerate(SAMPLINGS)}
    with running((directory, 0, 4), speculates=False) as plain:
        expected = {}
        for name, each in wanted.items():
            plain.engine.open(opening(name, 0, 4, PROMPT, **each))
            expected[name] = plain.tokens_of(opening(name).key)
    with running((directory, 0, 4), step_tokens=40) as together:
        for name, each in wanted.items():
            together.engine.open(opening(name, 0, 4, PROMPT, **each))
        drawn: dict[str, list[int]] = {name: [] for name in wanted}
        unfinished = len(wanted)
        while unfinished:
            out = together.next()
            assert isinstance(out, TokenOut), out
            drawn[out.key.stream].append(out.token)
            unfinished -= out.finish is not None
        assert drawn == expected
        assert guesses(together)[1] > 0
