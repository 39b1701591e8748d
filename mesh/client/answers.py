"""One streamed answer as its reader sees it: an iterator of chunks that goes on over another node where one can."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mesh.client.api import encoded
from mesh.client.event_stream import AnswerChunk, AnswerProgress
from mesh.client.flow import ClientCore, Flow, RetrySchedule, YieldChunk
from mesh.client.transport import BlockingIo, TrioIo

if TYPE_CHECKING:
    import httpx


def text_of(chunk: AnswerChunk) -> str:
    """The text that the first choice gets with this chunk."""
    for choice in chunk.get("choices") or ():
        if choice.get("index", 0) == 0:
            return (choice.get("delta") or {}).get("content") or choice.get("text") or ""
    return ""


class AnswerState:
    """What a stream tells about itself while it is read."""

    def __init__(self, caller: ClientCore, path: str, body: Mapping[str, Any]) -> None:
        self.progress = AnswerProgress()
        self._tries = RetrySchedule(caller.nodes, caller.budget, caller.draw)
        self._flow: Flow[None] = caller.stream(path, encoded(body, stream=True), self.progress, self._tries)

    @property
    def id(self) -> str:
        """The stream's id; empty before a node has told it."""
        return self.progress.stream

    @property
    def seq(self) -> int:
        """How many tokens have come, over all choices."""
        return self.progress.seq

    @property
    def retries(self) -> int:
        return self._tries.retries

    @property
    def mesh(self) -> dict[str, Any]:
        """`seq, numerics, attempts, path, …` of the whole answer; empty until its last chunk has come."""
        summary: dict[str, Any] = (self.progress.last or {}).get("mesh", {})
        return summary


class AnswerStream(AnswerState):
    """The chunks of one answer, as dicts. Closing it early, or leaving it as a context manager, frees its work."""

    def __init__(self, caller: ClientCore, http: httpx.Client, path: str, body: Mapping[str, Any]) -> None:
        super().__init__(caller, path, body)
        self._io = BlockingIo(http)

    def __iter__(self) -> Iterator[AnswerChunk]:
        return self

    def __next__(self) -> AnswerChunk:
        outcome: Any = None
        while True:
            try:
                effect = self._flow.send(outcome)
            except BaseException:  # the end, or an error that goes on to the caller
                self._io.close()
                raise
            if isinstance(effect, YieldChunk):
                return effect.chunk
            outcome = self._io.carry_out(effect)

    def texts(self) -> Iterator[str]:
        """The text of the first choice, piece by piece."""
        return (text for chunk in self if (text := text_of(chunk)))

    def close(self) -> None:
        self._flow.close()
        self._io.close()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class AsyncAnswerStream(AnswerState):
    """`AnswerStream` under trio: read it with `async for` inside `async with`."""

    def __init__(self, caller: ClientCore, http: httpx.AsyncClient, path: str, body: Mapping[str, Any]) -> None:
        super().__init__(caller, path, body)
        self._io = TrioIo(http)

    def __aiter__(self) -> AsyncAnswerStream:
        return self

    async def __anext__(self) -> AnswerChunk:
        outcome: Any = None
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
