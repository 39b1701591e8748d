"""Carries a load plan out: trio, one `AsyncClient`, streams only. Each request begins at a random live node."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import trio

from cli.load.plan import PlannedRequest
from cli.load.report import RequestOutcome
from mesh.client.client import AsyncClient
from mesh.client.params import ChatParams
from mesh.errors import MeshError


async def measure(
    client: AsyncClient,
    planned: Iterator[PlannedRequest],
    users: int,
    params: ChatParams,
    duration_s: float | None = None,
    done: Callable[[RequestOutcome], None] = lambda outcome: None,
) -> tuple[list[RequestOutcome], float]:
    """Runs the plan; the outcomes and how long it took, in seconds.

    At most `users` requests are open at once. No request begins after `duration_s`; those begun are waited for.
    """
    outcomes: list[RequestOutcome] = []
    begun = trio.current_time()

    async def user() -> None:
        for request in planned:
            if request.at_s is not None:
                await trio.sleep_until(begun + request.at_s)
            if duration_s is not None and trio.current_time() - begun >= duration_s:
                return
            outcomes.append(await one(client, request, params, begun))
            done(outcomes[-1])

    async with trio.open_nursery() as nursery:
        for _ in range(users):
            nursery.start_soon(user)
    return outcomes, trio.current_time() - begun


async def one(client: AsyncClient, request: PlannedRequest, params: ChatParams, begun: float) -> RequestOutcome:
    """One request. With a planned arrival, times count from that: waiting for a free user is waiting too."""
    start = trio.current_time() if request.at_s is None else begun + request.at_s
    asked: ChatParams = {**params, "stream_options": {"include_usage": True}, "return_token_ids": True}
    stream = await client.chat(list(request.messages), stream=True, **asked)
    times_s: list[float] = []
    error = ""
    seq = 0
    async with stream:
        try:
            async for _ in stream:
                if stream.seq > seq:
                    seq = stream.seq
                    times_s.append(trio.current_time() - start)
        except MeshError as failure:
            error = f"{type(failure).__name__}: {failure}"
    progress = stream.progress
    usage = progress.usage or {}
    if not error:
        progress.missing_tokens += max(0, usage.get("completion_tokens", seq) - seq)
    return RequestOutcome(
        tokens=seq,
        prompt_tokens=usage.get("prompt_tokens", 0),
        times_s=tuple(times_s),
        took_s=trio.current_time() - start,
        retries=stream.retries,
        resumes=progress.resumes,
        missing_tokens=progress.missing_tokens,
        duplicate_tokens=progress.duplicate_tokens,
        error=error,
    )
