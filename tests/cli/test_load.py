"""Load: what is sent and when, what is measured, what is reported."""

from __future__ import annotations

import json
import statistics
from itertools import islice, pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cli.load.measure import measure
from cli.load.plan import PREFIX_WORDS, PlannedRequest, arrivals_s, plan, prompts, user_turn
from cli.load.report import RequestOutcome, objectives, percentile, report
from cli.main import app
from mesh.client.client import AsyncClient
from mesh.errors import BadRequest
from tests.cli.fake_mesh import error, fake_mesh

FIGURES = [
    *("duration", "completed", "failed", "success_rate", "request_throughput", "request_goodput", "output_throughput"),
    *(f"{kind}_{name}_ms" for kind in ("mean", "median", "p99") for name in ("ttft", "tpot", "itl", "e2el")),
    *("retries", "resumes", "missing_tokens", "duplicate_tokens"),
]


def text_of(messages: tuple[dict[str, str], ...]) -> str:
    return messages[-1]["content"]


@pytest.mark.parametrize("dataset", ["random", "prefix", "chat"])
def test_equal_seeds_plan_equal_requests(dataset: str) -> None:
    first, second, other = (list(islice(prompts(dataset, Random(seed), 8), 20)) for seed in (1, 1, 2))
    assert first == second != other


def test_prefix_prompts_share_few_long_beginnings() -> None:
    beginnings = [tuple(text_of(each).split()[:PREFIX_WORDS]) for each in islice(prompts("prefix", Random(1), 8), 100)]
    assert 1 < len(set(beginnings)) <= 8


def test_chat_prompts_grow_by_what_was_said_before() -> None:
    first, second, third, anew = islice(prompts("chat", Random(1), 8), 4)
    assert second[:1] == first
    assert third[:3] == second
    assert [message["role"] for message in third] == ["user", "assistant", "user", "assistant", "user"]
    assert len(anew) == 1


def test_a_file_is_read_a_prompt_a_line_over_and_over(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "m"}]},
        {"prompt": "p"},
        {"conversations": [{"from": "system", "value": "no"}, {"from": "human", "value": "h"}]},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join([*(json.dumps(row) for row in rows), "", "plain text"]))
    assert [text_of(each) for each in islice(prompts(str(file), Random(1), 8), 5)] == ["m", "p", "h", "plain text", "m"]


@pytest.mark.parametrize(
    ("content", "told"), [(None, "expected random, prefix, chat"), ("\n", "is empty"), ('ok\n{"x": 1}', "line 2")]
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, content: str | None, told: str) -> None:
    file = tmp_path / "prompts"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BadRequest, match=told):
        prompts(str(file), Random(1), 8)


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_spread_that_were_asked_for(burstiness: float) -> None:
    at_s = list(islice(arrivals_s(Random(1), 50.0, burstiness), 20_000))
    gaps = [later - earlier for earlier, later in pairwise(at_s)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.05)
    variation = statistics.pstdev(gaps) / statistics.fmean(gaps)
    assert variation == pytest.approx(burstiness**-0.5, rel=0.05)  # of a gamma distribution with this shape


def test_a_plan_ends_with_its_number_or_its_time() -> None:
    assert len(list(plan(prompts("random", Random(1), 2), None, 7, None))) == 7
    arrivals = iter([0.0, 0.5, 0.9, 1.1])
    assert [each.at_s for each in plan(prompts("random", Random(1), 2), arrivals, None, 1.0)] == [0.0, 0.5, 0.9]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_are_those_of_numpy(values: list[float], percent: float) -> None:
    import numpy as np

    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9, abs=1e-6)


TWO = [
    RequestOutcome(tokens=3, prompt_tokens=10, times_s=(0.1, 0.2, 0.4), took_s=0.5, retries=1, resumes=1),
    RequestOutcome(tokens=5, prompt_tokens=10, times_s=(0.3, 0.7), took_s=0.7),
]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("completed", 2),
        ("success_rate", 1.0),
        ("request_throughput", 1.0),
        ("output_throughput", 4.0),
        ("total_token_throughput", 14.0),
        ("mean_ttft_ms", 200.0),
        ("median_ttft_ms", 200.0),
        ("p99_ttft_ms", 298.0),
        ("mean_tpot_ms", 125.0),  # 300 ms over 2 tokens, 400 ms over 4: tokens that came together count each
        ("mean_itl_ms", (100 + 200 + 400) / 3),
        ("mean_e2el_ms", 600.0),
        ("std_e2el_ms", 100.0),
        ("retries", 1),
        ("resumes", 1),
    ],
)
def test_figures_are_what_their_names_say(name: str, value: float) -> None:
    assert report(TWO, 2.0, {})[name] == pytest.approx(value)


def test_failures_count_against_success_and_not_into_the_times() -> None:
    failed = RequestOutcome(0, 0, (), 9.0, error="PeerLost: gone", missing_tokens=2, duplicate_tokens=1)
    figures = report([*TWO, failed], 2.0, {})
    assert figures["success_rate"] == pytest.approx(2 / 3)
    assert figures["mean_e2el_ms"] == pytest.approx(600.0)
    assert (figures["failed"], figures["missing_tokens"], figures["duplicate_tokens"]) == (1, 2, 1)
    assert figures["errors"] == {"PeerLost: gone": 1}


@pytest.mark.parametrize(
    ("limits", "good"),
    [({}, 2), ({"ttft": 150.0}, 1), ({"ttft": 150.0, "e2el": 400.0}, 0), ({"tpot": 120.0}, 1), ({"e2el": 700.0}, 2)],
)
def test_goodput_counts_what_met_every_objective(limits: dict[str, float], good: int) -> None:
    assert report(TWO, 1.0, limits)["request_goodput"] == good


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:fast", "speed:3", "e2el:0", "tpot:inf", "tpot:nan"])
def test_objectives_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="expected ttft:MS"):
        objectives([text])


def test_a_report_of_nothing_is_all_zeros() -> None:
    figures = report([], 0.0, {})
    assert {figures[name] for name in FIGURES} == {0}


async def test_requests_spread_over_all_nodes_and_every_token_is_accounted_for() -> None:
    with fake_mesh(3, cut_after=[3, 5]) as mesh:
        async with AsyncClient([mesh.url(0)], spread=True, draw=Random(1).random) as client:
            planned = plan(prompts("random", Random(1), 4), None, 30, None)
            outcomes, took_s = await measure(client, planned, 5, {"max_tokens": 12})
    figures = report(outcomes, took_s, {})
    assert (figures["completed"], figures["total_output_tokens"]) == (30, 360)
    assert (figures["resumes"], figures["retries"]) == (2, 2)
    assert (figures["missing_tokens"], figures["duplicate_tokens"]) == (0, 0)
    assert {request.node for request in mesh.posts("/v1/chat/completions")} == {0, 1, 2}


async def test_a_repeated_token_is_found() -> None:
    with fake_mesh(1, cut_after=[3], repeat=True) as mesh:
        async with AsyncClient([mesh.url(0)]) as client:
            outcomes, _ = await measure(client, iter([PlannedRequest(0, user_turn("x"))]), 1, {})
    assert [(outcome.error, outcome.duplicate_tokens) for outcome in outcomes] == [("", 1)]


async def test_a_failed_request_does_not_end_the_test() -> None:
    with fake_mesh(1, refusals=[error(400, "no")]) as mesh:
        async with AsyncClient([mesh.url(0)]) as client:
            outcomes, _ = await measure(client, iter([PlannedRequest(number, user_turn("x")) for number in range(3)]), 1, {})
    assert [outcome.error for outcome in outcomes] == ["BadRequest: no", "", ""]


async def test_a_request_that_had_to_wait_for_a_user_counts_its_wait() -> None:
    with fake_mesh(1) as mesh:
        async with AsyncClient([mesh.url(0)]) as client:
            await client.status()
            planned = iter([PlannedRequest(number, user_turn("x"), 0.0) for number in range(8)])
            outcomes, took_s = await measure(client, planned, 1, {})
    took = [outcome.took_s for outcome in outcomes]
    assert took == sorted(took)
    assert took[-1] == pytest.approx(took_s, abs=0.05)


def test_the_command_prints_the_report_as_json_and_as_a_table() -> None:
    with fake_mesh(2) as mesh:
        words = ["load", "--node", mesh.url(0), "--users", "2", "--requests", "4", "--max-tokens", "12"]
        printed = CliRunner().invoke(app, [*words, "--json"])
        table = CliRunner().invoke(app, [*words, "--rate", "1000", "--goodput", "e2el:60000"])
    figures = json.loads(printed.stdout)
    assert set(FIGURES) <= set(figures)
    assert (figures["completed"], figures["success_rate"]) == (4, 1.0)
    assert table.exit_code == 0
    assert "request_goodput" in table.stdout
    assert {request.json()["max_tokens"] for request in mesh.posts("/v1/chat/completions")} == {12}


def test_the_command_fails_when_a_request_did() -> None:
    with fake_mesh(1, refusals=[error(400, "no")]) as mesh:
        result = CliRunner().invoke(app, ["load", "--node", mesh.url(0), "--users", "1", "--requests", "2", "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["failed"] == 1


def test_no_node_is_told_in_one_line() -> None:
    with fake_mesh(1) as mesh:
        url = mesh.url(0)
    result = CliRunner().invoke(app, ["load", "--node", url, "--requests", "1"])
    assert result.exit_code == 1
    assert "connection refused" in result.stderr
    assert len(result.stderr.splitlines()) == 1
