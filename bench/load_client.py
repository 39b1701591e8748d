"""Many users in one process, at little cost: raw HTTP/1.1 over trio, streamed answers, retries as the official SDK makes them.

`python -m bench.load_client` reads one JSON object from stdin and writes one to stdout (`Plan`, `Seen`). It runs in a process of
its own, so that its CPU time is known and the nodes' is not mixed with it.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field
from random import Random
from typing import Any
from urllib.parse import urlsplit

import trio

SDK_RETRIES = 2
SDK_BACKOFF_S, SDK_MAX_BACKOFF_S = 0.5, 8.0
SDK_MAX_RETRY_AFTER_S = 120.0
RETRIED = {408, 409, 429}  # and all from 500


@dataclass
class Plan:
    """What the users do. Open loop where `rate` is given: requests begin at exponential times, however long answers take."""

    urls: list[str]
    users: int
    requests: int
    max_tokens: int = 32
    rate: float | None = None
    seconds: float | None = None  # no request begins after that
    seed: int = 0
    retries: int = SDK_RETRIES
    input_words: int = 32
    hang_up_share: float = 0.0  # of users that leave in mid-answer
    prompts: int = 0  # how many prompts there are; 0: one for each request


@dataclass
class Request:
    """One request as its user saw it, in seconds since the start of the run."""

    due_at: float
    ended_at: float = 0.0
    accepted_at: float = math.nan  # when the attempt that was answered began
    tokens_at: list[float] = field(default_factory=list)
    node: int = -1  # that answered
    retries: int = 0
    refused: int = 0  # attempts answered with 429 or 503
    status: int = 0
    error: str = ""
    text: str = ""
    prompt: int = 0
    hung_up: bool = False


@dataclass
class Seen:
    requests: list[dict[str, Any]]
    seconds: float
    cpu_s: float


class Users:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rng = Random(plan.seed)
        self.addresses = [(parts.hostname or "", parts.port or 80) for parts in map(urlsplit, plan.urls)]
        self.requests: list[Request] = []
        self.begun = 0.0

    @property
    def now(self) -> float:
        return trio.current_time() - self.begun

    async def run(self) -> Seen:
        cpu_s, self.begun = time.process_time(), trio.current_time()
        async with trio.open_nursery() as nursery:
            if self.plan.rate is not None:
                nursery.start_soon(self._arrive, self.plan.rate, nursery)
            else:
                for number in range(self.plan.users):
                    nursery.start_soon(self._user, number)
        return Seen([asdict(request) for request in self.requests], self.now, time.process_time() - cpu_s)

    def _next(self, due_at: float) -> Request | None:
        over = self.plan.seconds is not None and due_at >= self.plan.seconds
        if over or len(self.requests) >= self.plan.requests:
            return None
        prompts = self.plan.prompts or self.plan.requests
        request = Request(due_at, prompt=len(self.requests) % prompts)
        self.requests.append(request)
        return request

    async def _arrive(self, rate: float, nursery: trio.Nursery) -> None:
        at = 0.0
        while True:
            at += self.rng.expovariate(rate)
            await trio.sleep_until(self.begun + at)
            request = self._next(at)
            if request is None:
                return
            nursery.start_soon(self._ask, request)

    async def _user(self, number: int) -> None:
        await trio.sleep(number / max(1, self.plan.users))  # a second until all are there
        while (request := self._next(self.now)) is not None:
            await self._ask(request)

    async def _ask(self, request: Request) -> None:
        while True:
            request.node = self.rng.randrange(len(self.addresses))
            retry_after_s: float | None = None
            began = self.now
            try:
                status, retry_after_s, request.error = await self._attempt(request)
            except (OSError, trio.BrokenResourceError, EOFError) as error:
                status, request.error = 0, f"{type(error).__name__}: {error}"
            request.status = status
            if not request.error:
                request.accepted_at = began
            retryable = request.error and not request.tokens_at and (status == 0 or status in RETRIED or status >= 500)
            if not retryable or request.retries >= self.plan.retries:
                break
            request.refused += status in (429, 503)
            backoff_s = min(SDK_MAX_BACKOFF_S, SDK_BACKOFF_S * 2.0**request.retries) * (1 - 0.25 * self.rng.random())
            obeyed = retry_after_s is not None and 0 < retry_after_s <= SDK_MAX_RETRY_AFTER_S
            request.retries += 1
            await trio.sleep(retry_after_s if obeyed and retry_after_s is not None else backoff_s)
        request.ended_at = self.now

    async def _attempt(self, request: Request) -> tuple[int, float | None, str]:
        """One try: status, what `Retry-After` says, and what went wrong; empty where nothing did."""
        host, port = self.addresses[request.node]
        words = Random(request.prompt)
        body = json.dumps(
            {
                "messages": [
                    {"role": "user", "content": " ".join(f"w{words.randrange(5000)}" for _ in range(self.plan.input_words))}
                ],
                "max_tokens": self.plan.max_tokens,
                "ignore_eos": True,
                "stream": True,
                "seed": request.prompt,
            }
        ).encode()
        stream = await trio.open_tcp_stream(host, port)
        async with stream:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: application/json\r\n"
            head += f"x-stainless-retry-count: {request.retries}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
            await stream.send_all(head.encode() + body)
            lines = _lines(stream)
            status, retry_after_s = await _head(lines)
            if status != 200:
                rest = b"".join([line async for line in lines])
                return status, retry_after_s, rest[-300:].decode(errors="replace") or f"status {status}"
            hang_up_after = 3 if self.rng.random() < self.plan.hang_up_share else math.inf
            async for line in lines:
                if not line.startswith(b"data: "):
                    continue
                if line.startswith(b"data: [DONE]"):
                    return status, None, ""
                if line.startswith(b'data: {"error"'):
                    return status, None, line[6:306].decode(errors="replace")
                at = line.find(b'"content":')
                if at >= 0 and not line.startswith(b'"content":""', at):
                    request.tokens_at.append(self.now)
                    request.text += str(json.loads(line[6:])["choices"][0]["delta"].get("content", ""))
                    if len(request.tokens_at) >= hang_up_after:
                        request.hung_up = True
                        return status, None, ""
            return status, None, "the stream was cut"


async def _head(lines: AsyncIterator[bytes]) -> tuple[int, float | None]:
    status, retry_after_s = 0, None
    async for line in lines:
        if not status:
            status = int(line.split(b" ", 2)[1])
        elif not line:
            return status, retry_after_s
        elif line.lower().startswith(b"retry-after-ms:"):
            retry_after_s = float(line.partition(b":")[2]) / 1000
    raise EOFError("the connection ended before the answer")


async def _lines(stream: trio.abc.ReceiveStream) -> AsyncIterator[bytes]:
    """Lines without their ends. Sizes of chunks are lines too; no line of an event looks like one."""
    rest = b""
    while data := await stream.receive_some(65536):
        *whole, rest = (rest + data).split(b"\n")
        for line in whole:
            yield line.rstrip(b"\r")
    if rest:
        yield rest


def main() -> None:
    plan = Plan(**json.loads(sys.stdin.readline()))
    print(json.dumps(asdict(trio.run(Users(plan).run))))


if __name__ == "__main__":
    main()
