"""The headline under violence, in short: `python -m bench.availability` does it for longer, and measures."""

from __future__ import annotations

import signal
from copy import deepcopy
from random import Random
from typing import Any

import pytest
import trio

from bench.availability import Outcome, Said, judged, measure, questions
from bench.violence import Strike
from cli.local_mesh import LocalMesh


@pytest.mark.e2e
@pytest.mark.timeout(180)
def test_answers_of_many_kinds_stay_exact_while_stages_are_killed_and_restarted() -> None:
    with LocalMesh() as mesh:
        figures = trio.run(measure, mesh, 4, 8.0, 100, Random(5), 0.0)

    assert figures["failures"] == figures["differing"] == []
    assert figures["requests"] >= 8 and figures["success_rate"] == figures["exact"] == 1.0
    assert figures["said_exact"] == figures["requests"]
    assert figures["missing_tokens"] == figures["duplicate_tokens"] == 0
    assert figures["kills"] >= 1 and set(figures["attempts"]) - {"1"}, "no answer was disturbed"
    assert figures["leaks"] == {}


def an_outcome(**changes: Any) -> Outcome:
    said = {0: Said([5, 6, 7], "abc", [], "length")}
    question = questions(3)[0]
    fields: dict[str, Any] = {"choices": said, "times_s": [1.0, 1.1, 3.1], "ended_s": 4.0, "attempts": 2, **changes}
    return Outcome(question, 0.0, **fields)


def test_the_judge_sees_one_other_token_a_failure_and_a_missing_one() -> None:
    reference, other = an_outcome(attempts=1), an_outcome()
    other.choices = deepcopy(other.choices)
    other.choices[0].tokens[1] = 9
    failed = an_outcome(error="RemoteError: 503", attempts=0)
    hung_up = an_outcome(choices={}, hung_up=True)
    strike = Strike("a", signal.SIGKILL, 2.0, 9.0)

    figures = judged([reference], [an_outcome(missing_tokens=1), other, failed, hung_up], [strike])

    assert (figures["requests"], figures["hang_ups"], figures["kills"], figures["stops"]) == (3, 1, 1, 0)
    assert figures["success_rate"] == 0.6667 and figures["exact"] == 0.5
    assert figures["missing_tokens"] == 1 and figures["attempts"] == {"2": 2}
    assert figures["pause_ms"]["kill"] == {"count": 2, "p50": 2000.0, "p99": 2000.0}
    assert [story["error"] for story in figures["failures"]] == ["RemoteError: 503"]
    assert len(figures["differing"]) == 1
