"""`mesh load`: the command."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING, Annotated

import typer

from cli import options, output
from cli.load import plan, report
from mesh.errors import BadRequest
from mesh.json_object import JsonObject

if TYPE_CHECKING:
    from mesh.client.params import ChatParams


def load(
    users: Annotated[int, typer.Option("--users", min=1, help="How many requests are open at once, at most.")] = 8,
    requests: Annotated[
        int | None, typer.Option("--requests", min=1, help="How many requests; 10 a user, unless --duration is given.")
    ] = None,
    duration: Annotated[float | None, typer.Option("--duration", min=0.1, help="For how many seconds requests begin.")] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", min=0.001, help="Arrivals a second; without it, each user asks again at once.")
    ] = None,
    burstiness: Annotated[float, typer.Option("--burstiness", min=0.01, help="1: Poisson; less is burstier.")] = 1.0,
    dataset: Annotated[str, typer.Option("--dataset", help="random, prefix, chat, or a file with a prompt a line.")] = "random",
    input_words: Annotated[int, typer.Option("--input-words", min=1, help="Length of made-up prompts.")] = 32,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Length of the answers, exactly.")] = 64,
    goodput: Annotated[
        list[str],
        typer.Option("--goodput", metavar="NAME:MS", help="What counts as good: ttft, tpot, e2el; repeatable."),
    ] = [],  # noqa: B006
    model: options.ModelOption = None,
    temperature: options.TemperatureOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the prompts, arrivals and answers.")] = 0,
    node: options.NodeOption = [],  # noqa: B006
    api_key: options.ApiKeyOption = None,
    json: options.JsonOption = False,
) -> None:
    """Put load on a mesh and report it as vLLM's serving benchmark does, with every lost or repeated token counted."""
    limits_ms = report.objectives(goodput)
    if requests is None and duration is None:
        requests = 10 * users
    random = Random(seed)
    messages = plan.prompts(dataset, random, input_words)
    arrivals = plan.arrivals_s(Random(seed + 1), rate, burstiness) if rate is not None else None
    planned = plan.plan(messages, arrivals, requests, duration)
    params = options.sampling(max_tokens, temperature, seed, model)
    params["ignore_eos"] = True

    import trio

    urls = [url for given in node or [options.DEFAULT_NODE] for url in given.split(",") if url]
    outcomes, took_s = trio.run(run, urls, api_key, planned, users, params, duration, None if json else requests)
    if not outcomes:
        raise BadRequest("expected requests, got a plan without any; raise --duration or --requests", "duration")
    figures = report.report(outcomes, took_s, limits_ms)
    if json:
        output.as_json(figures)
    else:
        show(figures)
    if figures["failed"] or figures["missing_tokens"] or figures["duplicate_tokens"]:
        raise typer.Exit(1)


async def run(
    urls: list[str],
    api_key: str | None,
    planned: Iterator[plan.PlannedRequest],
    users: int,
    params: ChatParams,
    duration_s: float | None,
    total: int | None,
) -> tuple[list[report.RequestOutcome], float]:
    """Checks that a node answers, then measures. Raises what `AsyncClient` raises when none does."""
    from cli.load.measure import measure
    from mesh.client.client import AsyncClient

    async with AsyncClient([url if "://" in url else f"http://{url}" for url in urls], api_key, spread=True) as client:
        await client.status()
        with output.Bar(total or 0, "requests", shown=total is not None) as bar:
            return await measure(client, planned, users, params, duration_s, lambda outcome: bar.advance("requests"))


def show(figures: JsonObject) -> None:
    """One row a figure."""
    rows = [
        (name, f"{value:.2f}" if isinstance(value, float) else str(value)) for name, value in figures.items() if name != "errors"
    ]
    output.table(("FIGURE", "VALUE"), rows, empty="")
    for error, times in figures["errors"].items():
        output.note(f"{times} x {error}")
