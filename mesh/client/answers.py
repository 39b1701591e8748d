"""Streamed answers: iterators of chunks, which resume a broken stream at another node where possible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from mesh.client.api import encoded
from mesh.client.event_stream import AnswerChunk, AnswerProgress
from mesh.client.flow import ClientCore, Flow, FlowOutcome, RetrySchedule, YieldChunk
from mesh.client.transport import BlockingIo, TrioIo
from mesh.json_object import JsonObject

if TYPE_CHECKING:
    import httpx


def text_of(chunk: AnswerChunk) -> str:
    """Returns the text of the first choice in this chunk."""
    for choice in chunk.get("choices") or ():
        if choice.get("index", 0) == 0:
            return (choice.get("delta") or {}).get("content") or choice.get("text") or ""
    return ""


class AnswerState:
    """The state of a stream while it is read."""

    def __init__(self, caller: ClientCore, path: str, body: Mapping[str, object]) -> None:
        self.progress = AnswerProgress()
        self._tries = RetrySchedule(caller.nodes, caller.budget, caller.draw)
        self._flow: Flow[None] = caller.stream(path, encoded(body, stream=True), self.progress, self._tries)

    @property
    def id(self) -> str:
        """The stream's id; empty before a node has sent it."""
        return self.progress.stream

    @property
    def seq(self) -> int:
        """How many tokens have been received, over all choices."""
        return self.progress.seq

    @property
    def retries(self) -> int:
        """How many tries have failed."""
        return self._tries.retries

    @property
    def mesh(self) -> JsonObject:
        """`seq, numerics, attempts, path, …` of the whole answer; empty until its last chunk is received."""
        summary: JsonObject = (self.progress.last or {}).get("mesh", {})
        return summary


class AnswerStream(AnswerState):
    """The chunks of one answer, as dicts. Closing the stream early, or leaving its `with` block, ends the generation."""

    def __init__(self, caller: ClientCore, http: httpx.Client, path: str, body: Mapping[str, object]) -> None:
        super().__init__(caller, path, body)
        self._io = BlockingIo(http)

    def __iter__(self) -> Iterator[AnswerChunk]:
        return self

    def __next__(self) -> AnswerChunk:
        outcome: FlowOutcome = None
        while True:
            try:
                effect = self._flow.send(outcome)
            except BaseException:  # the end of the stream, or an error for the caller
                self._io.close()
                raise
            if isinstance(effect, YieldChunk):
                return effect.chunk
            outcome = self._io.carry_out(effect)

    def texts(self) -> Iterator[str]:
        """Yields the text of the first choice, chunk by chunk."""
        return (text for chunk in self if (text := text_of(chunk)))

    def close(self) -> None:
        self._flow.close()
        self._io.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class AsyncAnswerStream(AnswerState):
    """`AnswerStream` under trio: read with `async for` inside `async with`."""

    def __init__(self, caller: ClientCore, http: httpx.AsyncClient, path: str, body: Mapping[str, object]) -> None:
        super().__init__(caller, path, body)
        self._io = TrioIo(http)

    def __aiter__(self) -> AsyncAnswerStream:
        return self

    async def __anext__(self) -> AnswerChunk:
        outcome: FlowOutcome = None
        while True:
            try:
                effect = self._flow.send(outcome)
            except StopIteration:
                await self._io.aclose()
                raise StopAsyncIteration from None
            if isinstance(effect, YieldChunk):
                return effect.chunk
            outcome = await self._io.carry_out(effect)

    async def aclose(self) -> None:
        self._flow.close()
        await self._io.aclose()

    async def __aenter__(self) -> AsyncAnswerStream:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()
