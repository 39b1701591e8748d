"""Chat and plain completions: a generation runs exactly as long as somebody waits for it.

The tasks of one request, all in one nursery: one watches for the client's hang-up, one for each generation
passes its events on, and the request's own task writes the answer. Whoever fails or finishes first ends the
others, and with them the generations' contexts: leaving one frees its work on all stages.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import trio
from starlette.requests import Request

from mesh.errors import BadRequest, LocalError, MeshError, PeerLost
from mesh.ids import ModelId, StreamId
from node.http import sse
from node.http.answers import AnswerBuilder, Chunk, ChunkStream, whole_answer
from node.http.errors import answer_of, is_expected, single_cause
from node.http.exchange import DISCONNECT, App, Receive, Send
from node.http.openai import ParsedRequest, generation_ids, parse_chat, parse_completion
from node.http.schema import ChatBody, CompletionBody
from node.http.services import NodeServices
from node.http.site import Json, Route, Site, read_json
from node.requests import ChoiceDone, Finished, GenerateEvent, Started, TextDelta

AHEAD_EVENTS = 256  # read ahead of a slow client; then the generation's own bounds hold
WRITE_EVENTS = 64  # at most so many in one write, so that a fast source does not delay the first of them

Item = tuple[int, GenerateEvent | MeshError]


async def chat(site: Site, request: Request) -> App:
    id = StreamId(f"chatcmpl-{secrets.token_hex(16)}")
    state = request.state
    asked = parse_chat(await read_json(request), id, tenant=state.tenant, request_id=state.request_id)
    return GenerationResponse(site, check_model(site.node, asked), with_ids=request.headers.get("x-mesh-sse-id") == "1")


async def completion(site: Site, request: Request) -> App:
    id = StreamId(f"cmpl-{secrets.token_hex(16)}")
    state = request.state
    asked = parse_completion(await read_json(request), id, tenant=state.tenant, request_id=state.request_id)
    return GenerationResponse(site, check_model(site.node, asked), with_ids=request.headers.get("x-mesh-sse-id") == "1")


async def cancel(site: Site, request: Request) -> App:
    """By the id of the answer: where it came of several prompts, all of its generations."""
    id = request.path_params["id"]
    if not any([site.node.cancel(StreamId(own)) for own in generation_ids(id)]):
        raise BadRequest("no stream of this id is known here", "id", status=404, code="stream_not_found")
    return Json({"id": id, "object": "stream.cancelled", "cancelled": True})


ROUTES = (
    Route("POST", "/v1/chat/completions", chat, "Answer a conversation", ChatBody),
    Route("POST", "/v1/completions", completion, "Continue a text", CompletionBody),
    Route("DELETE", "/v1/streams/{id}", cancel, "Cancel a generation for good"),
)


@dataclass(frozen=True, slots=True)
class GenerationResponse:
    """The answer to one request, as an ASGI application of its own."""

    site: Site
    asked: ParsedRequest
    with_ids: bool = False

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        answered = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_on_disconnect, receive, answered, nursery.cancel_scope)
            async with events_of(self.site.node, self.asked) as items:
                if self.asked.stream:
                    await self._stream(items, send, answered)
                else:
                    body = await self._whole(items)
                    answered.set()
                    await Json(body, headers={"x-mesh-stream": self.asked.id})(scope, receive, send)
            nursery.cancel_scope.cancel()

    async def _whole(self, items: trio.MemoryReceiveChannel[Item]) -> dict[str, Any]:
        answer = self._new_answer()
        while not answer.complete:
            generation, event = await items.receive()
            if isinstance(event, MeshError):
                raise event
            index = answer.fold(generation, event)
            if isinstance(event, (TextDelta, ChoiceDone)):
                answer.keep(index, event)
        return whole_answer(answer)

    async def _stream(self, items: trio.MemoryReceiveChannel[Item], send: Send, answered: trio.Event) -> None:
        ready = await self._opening(items)
        headers = [*sse.HEADERS, (b"x-mesh-stream", self.asked.id.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self.site.counts.streams += 1
        try:
            chunks = ChunkStream(self._new_answer())
            while True:
                body, ended = self._encode(chunks, ready)
                if ended:
                    answered.set()
                await send({"type": "http.response.body", "body": body, "more_body": not ended})
                if ended:
                    return
                ready = await next_items(
                    items, partial(send, {"type": "http.response.body", "body": sse.PING, "more_body": True})
                )
        finally:
            self.site.counts.streams -= 1

    async def _opening(self, items: trio.MemoryReceiveChannel[Item]) -> list[Item]:
        """Events until every generation has started. A refusal before that is raised: a status tells more than an event."""
        ready: list[Item] = []
        starts = 0
        while starts < len(self.asked.generations):
            item = await items.receive()
            if isinstance(item[1], MeshError):
                raise item[1]
            starts += isinstance(item[1], Started)
            ready.append(item)
        return ready

    def _encode(self, chunks: ChunkStream, ready: list[Item]) -> tuple[bytes, bool]:
        """All items that are ready as one piece of the body, and whether the stream ends with it.

        Raises:
            PeerLost: this node cannot go on with the stream, another one may: it is cut, not ended.
        """
        out: list[Chunk] = []
        for generation, event in ready:
            if isinstance(event, PeerLost):
                raise event
            if isinstance(event, MeshError):
                self.site.counts.streams_failed += 1
                return sse.encode(out, with_ids=self.with_ids) + sse.encode_error(answer_of(event).body), True
            out.extend(chunks.add(generation, event))
        body = sse.encode(out, with_ids=self.with_ids)
        return (body + sse.DONE, True) if chunks.complete else (body, False)

    def _new_answer(self) -> AnswerBuilder:
        return AnswerBuilder(self.asked, int(time.time()), partial(fingerprint, self.site.node))


def fingerprint(node: NodeServices, model: ModelId) -> str:
    """OpenAI's `system_fingerprint`: changes when the weights or the numerics do."""
    name = node.named(model)
    for card in node.models():
        if card.id == name:
            return "fp_" + hashlib.blake2b(f"{card.weights}\0{card.numerics}".encode(), digest_size=6).hexdigest()
    return "fp_unknown"


def check_model(node: NodeServices, asked: ParsedRequest) -> ParsedRequest:
    """`asked`, if its model is one that the mesh knows and that chats.

    Raises:
        BadRequest: 404 for an unknown model, 400 for an embedder. A model with missing layers is left to the node.
    """
    model = asked.generations[0].model
    kinds = {card.id: card.kind for card in node.models()}
    if model is None:
        return asked
    name = node.named(model)
    if kinds.get(name) == "chat" or (name not in kinds and name in node.missing_layers()):
        return asked
    if name in kinds:
        raise BadRequest(f"model: {model!r} does not generate text", "model")
    chatting = sorted(name for name, kind in kinds.items() if kind == "chat")
    raise BadRequest(
        f"model: expected one of {', '.join(chatting) or 'none yet'}, got {model[:80]!r}", "model", "model_not_found", 404
    )


async def next_items(items: trio.MemoryReceiveChannel[Item], keep_alive: Callable[[], Awaitable[None]]) -> list[Item]:
    """At least one item, and with it all that are ready. Calls `keep_alive` after each stretch of silence."""
    ready: list[Item] = []
    while not ready:
        with trio.move_on_after(sse.PING_EVERY_S):
            ready.append(await items.receive())
        if not ready:
            await keep_alive()
    while len(ready) < WRITE_EVENTS:
        try:
            ready.append(items.receive_nowait())
        except (trio.WouldBlock, trio.EndOfChannel):
            break
    return ready


@asynccontextmanager
async def events_of(node: NodeServices, asked: ParsedRequest) -> AsyncIterator[trio.MemoryReceiveChannel[Item]]:
    """Runs all generations of a request; yields their events as they come, each with its generation's number.

    A refusal comes as an item, in order, after what the generation still brought. Leaving before all generations
    have finished ends the others at once.
    """
    sender, receiver = trio.open_memory_channel[Item](AHEAD_EVENTS)
    unfinished = set(range(len(asked.generations)))

    async def pass_on(index: int) -> None:
        try:
            async with node.generate(asked.generations[index]) as events:
                async for event in events:
                    if isinstance(event, Finished):
                        unfinished.discard(index)
                    await sender.send((index, event))
            if index in unfinished:
                raise LocalError("a generation ended without a Finished event")
        except (MeshError, ExceptionGroup) as error:
            cause = single_cause(error)
            if not (isinstance(cause, MeshError) and is_expected(cause)):
                raise
            await sender.send((index, cause))

    async with trio.open_nursery() as nursery:
        for index in range(len(asked.generations)):
            nursery.start_soon(pass_on, index)
        yield receiver
        if unfinished:
            nursery.cancel_scope.cancel()


async def _cancel_on_disconnect(receive: Receive, answered: trio.Event, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != DISCONNECT:
        pass
    if not answered.is_set():
        scope.cancel()
