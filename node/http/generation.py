"""Answers chat and plain completions, streamed or whole; a generation runs exactly as long as its client waits.

All tasks of a request are in one nursery: one watches for the client's disconnect, one for each generation passes its events on,
and the request's own task writes the answer. The first that fails or finishes ends the others, and with them the contexts of the
generations: leaving one frees its work on all stages.

One answer may be several generations (a list of prompts): the choices of generation g are `g * n … g * n + n - 1`, and `seq` is
the sum over the generations. The chunk that ends the last choice is held back until the generation is known to be complete, since
the last chunk carries the path.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import trio
from starlette.requests import Request

from mesh.errors import BadRequest, LocalError, MeshError, PeerLost
from mesh.ids import ModelId, StreamId
from mesh.json_object import JsonObject
from node.http import sse
from node.http.connection import DISCONNECT, App, Receive, Scope, Send
from node.http.errors import answer_of, is_expected, single_cause
from node.http.openai import ParsedRequest, generation_ids, parse_chat, parse_completion
from node.http.schema import ChatBody, CompletionBody
from node.http.services import NodeServices
from node.http.site import Json, Route, Site, read_json
from node.requests import ChoiceDone, Finished, GenerateEvent, Started, TextDelta, TokenLogprob, ToolUse
from node.text.tool_calls import CallArguments, CallStarted, PlainText, ToolCallParser, ToolEvent, call_id
from node.text.tool_styles import STYLES

MAX_CALLS = 128  # of one answer; further ones are dropped


def parser_for(use: ToolUse | None, style: str, stream: str, choice: int) -> ToolCallParser | None:
    """None where the answer's text is text, whatever it looks like."""
    if use is None or not style:
        return None
    known = STYLES[style]
    most = MAX_CALLS if use.parallel and not use.named else 1
    id_of = partial(call_id, stream, choice, digits=known.id_digits)
    return ToolCallParser(known, use.names, id_of, most=most)


def delta_of(events: Iterable[ToolEvent]) -> JsonObject:
    """What came of a piece of text, as one delta: text and calls side by side, each call once."""
    delta: JsonObject = {}
    calls: dict[int, JsonObject] = {}
    for event in events:
        match event:
            case PlainText(text):
                delta["content"] = delta.get("content", "") + text
            case CallStarted(index, id, name):
                calls[index] = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": ""}}
            case CallArguments(index, text):
                calls.setdefault(index, {"index": index, "function": {"arguments": ""}})["function"]["arguments"] += text
    return {**delta, "tool_calls": list(calls.values())} if calls else delta


def message_of(parser: ToolCallParser | None, text: str) -> JsonObject:
    """The fields of a whole message that its text makes."""
    if parser is None:
        return {"content": text}
    delta = delta_of([*parser.feed(text), *parser.finish()])
    calls = [{field: value for field, value in call.items() if field != "index"} for call in delta.get("tool_calls", ())]
    content = delta.get("content")
    return {"content": content, "tool_calls": calls} if calls else {"content": content or ""}


def ending(reason: str, parser: ToolCallParser | None, use: ToolUse | None) -> str:
    """The finish reason: that tools were called, unless they had to be by name; then OpenAI has stop."""
    called = parser is not None and parser.calls > 0 and use is not None and use.named is None
    return "tool_calls" if called and reason == "stop" else reason


CompletionChunk = JsonObject


@dataclass(slots=True)
class Choice:
    """One choice as far as it is known."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    chars: int = 0  # of text that is out; completions' text_offset counts from it
    finish_reason: str | None = None


class AnswerBuilder:
    """Folds events into the state that both forms of an answer share."""

    def __init__(self, asked: ParsedRequest, created_s: int, fingerprint_of: Callable[[ModelId], str]) -> None:
        """`fingerprint_of` gives the `system_fingerprint` of a model, which may be known only once a generation started."""
        self.asked = asked
        self.choices = [Choice() for _ in range(asked.choices)]
        self._created_s = created_s
        self._fingerprint_of = fingerprint_of
        self._model = asked.generations[0].model or ModelId("")
        self._fingerprint = ""
        self._tool_style = ""
        self._seqs = [0] * len(asked.generations)
        self._prompt_tokens = [0] * len(asked.generations)
        self._finished: list[Finished | None] = [None] * len(asked.generations)

    @property
    def seq(self) -> int:
        return sum(self._seqs)

    @property
    def complete(self) -> bool:
        return all(self._finished)

    def fold(self, generation: int, event: GenerateEvent) -> int:
        """Takes one event in; the index of the choice it belongs to, or -1."""
        match event:
            case Started():
                self._prompt_tokens[generation] = event.prompt_tokens
                self._model = event.model
                self._fingerprint = self._fingerprint_of(event.model)
                self._tool_style = event.tool_style
                return -1
            case Finished():
                self._seqs[generation] = event.seq
                self._prompt_tokens[generation] = event.prompt_tokens
                self._finished[generation] = event
                return -1
            case TextDelta() | ChoiceDone():
                self._seqs[generation] = event.seq
                index = generation * self.asked.n + event.choice
                if isinstance(event, ChoiceDone):
                    self.choices[index].finish_reason = event.finish_reason
                return index

    def keep(self, index: int, event: TextDelta | ChoiceDone) -> None:
        """Adds what the event brought to its choice: a whole answer needs it later, a stream does not."""
        choice = self.choices[index]
        choice.token_ids.extend(event.token_ids)
        if isinstance(event, TextDelta):
            choice.text.append(event.text)
            choice.logprobs.extend(event.logprobs)

    def new_parser(self, index: int) -> ToolCallParser | None:
        """Finds the tool calls in the text of choice `index`; None where none were offered."""
        return parser_for(self.asked.tools, self._tool_style, self.asked.id, index)

    def usage(self) -> JsonObject:
        """Counts of the request, not of its attempts."""
        prompt_tokens, completion_tokens = sum(self._prompt_tokens), self.seq
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in self._finished if end is not None)},
        }

    def envelope(self, kind: str, choices: list[JsonObject], mesh: JsonObject) -> CompletionChunk:
        return {
            "id": self.asked.id,
            "object": kind,
            "created": self._created_s,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
            "mesh": mesh,
        }

    def final_mesh(self) -> JsonObject:
        """What the last chunk and a whole answer tell of how the answer came about."""
        ends = [finished for finished in self._finished if finished is not None]
        mesh: JsonObject = {
            "seq": self.seq,
            "numerics": "exact" if all(end.numerics == "exact" for end in ends) else "approximate",
            "attempts": max(end.attempts for end in ends),
            "path": [{"node": use.node, "start": use.start, "end": use.end} for use in ends[-1].path],
            "seed": ends[0].seed,
        }
        report = ends[0].retrieval
        if report is not None:
            mesh["store"] = report.store
            mesh["digest"] = report.digest
            mesh["shards_ok"] = report.shards_ok
            mesh["shards_total"] = report.shards_total
            mesh["annotations"] = self.annotations()
        return mesh

    def annotations(self) -> list[JsonObject]:
        """The passages that `[number]` in the text stands for."""
        report = self._finished[0].retrieval if self._finished[0] else None
        return [
            {
                "type": "file_citation",
                "number": citation.number,
                "file_id": citation.file_id,
                "filename": citation.filename,
                "quote": citation.quote,
                "start": citation.start,
                "end": citation.end,
            }
            for citation in (report.citations if report else ())
        ]


class ChunkStream:
    """A streamed answer: each event in, the chunks that are due out."""

    def __init__(self, answer: AnswerBuilder) -> None:
        self._answer = answer
        self._asked = answer.asked
        self._kind = "chat.completion.chunk" if answer.asked.chat else "text_completion"
        self._parsers: dict[int, ToolCallParser | None] = {}
        self._held: CompletionChunk | None = None

    @property
    def complete(self) -> bool:
        return self._answer.complete

    def add(self, generation: int, event: GenerateEvent) -> list[CompletionChunk]:
        index = self._answer.fold(generation, event)
        match event:
            case Started():
                return self._opening(generation)
            case TextDelta():
                delta = self._delta(index, event.text)
                silent = not delta and not self._asked.token_ids and not self._asked.logprobs  # held back: a call may begin
                return [] if silent else [self._choice_chunk(index, event.text, event.token_ids, event.logprobs, delta)]
            case ChoiceDone():
                return self._ending(index, event)
            case Finished():
                return self._closing() if self._answer.complete else []

    def _opening(self, generation: int) -> list[CompletionChunk]:
        """Chat streams begin with each choice's role; completions have nothing to say yet."""
        if not self._asked.chat:
            return []
        first = generation * self._asked.n
        return [
            self._chunk([self._choice(index, {"delta": {"role": "assistant", "content": ""}})])
            for index in range(first, first + self._asked.n)
        ]

    def _parser(self, index: int) -> ToolCallParser | None:
        if index not in self._parsers:
            self._parsers[index] = self._answer.new_parser(index)
        return self._parsers[index]

    def _delta(self, index: int, text: str) -> JsonObject:
        parser = self._parser(index)
        return {"content": text} if parser is None else delta_of(parser.feed(text))

    def _choice_chunk(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob],
        delta: JsonObject,
        reason: str | None = None,
    ) -> CompletionChunk:
        body: JsonObject = {"delta": delta} if self._asked.chat else {"text": text}
        if self._asked.logprobs and (logprobs or reason is None):
            offset = self._answer.choices[index].chars
            body["logprobs"] = chat_logprobs(logprobs) if self._asked.chat else completion_logprobs(logprobs, offset)
        if self._asked.token_ids:
            body["token_ids"] = list(token_ids)
        self._answer.choices[index].chars += len(text)
        return self._chunk([self._choice(index, body, reason)])

    def _ending(self, index: int, event: ChoiceDone) -> list[CompletionChunk]:
        parser = self._parser(index)
        delta = delta_of(parser.finish()) if parser is not None else {}
        reason = ending(event.finish_reason, parser, self._asked.tools)
        chunk = self._choice_chunk(index, "", event.token_ids, (), delta, reason)
        if all(choice.finish_reason for choice in self._answer.choices):
            self._held = chunk
            return []
        return [chunk]

    def _closing(self) -> list[CompletionChunk]:
        """The held end, and the usage where it was asked for; the very last one carries the path."""
        chunks = [self._held] if self._held is not None else []
        if self._asked.include_usage or not chunks:
            chunks.append(self._chunk([]))
        if self._asked.include_usage:
            chunks[-1]["usage"] = self._answer.usage()
        chunks[-1]["mesh"] = self._answer.final_mesh()
        return chunks

    def _choice(self, index: int, body: JsonObject, reason: str | None = None) -> JsonObject:
        return {"index": index, **body, "logprobs": body.get("logprobs"), "finish_reason": reason}

    def _chunk(self, choices: list[JsonObject]) -> CompletionChunk:
        chunk = self._answer.envelope(self._kind, choices, {"seq": self._answer.seq})
        if self._asked.continuous_usage:
            chunk["usage"] = self._answer.usage()
        elif self._asked.include_usage:
            chunk["usage"] = None
        return chunk


def whole_answer(answer: AnswerBuilder) -> JsonObject:
    """The body of a request that did not stream, once all its generations have finished."""
    chat = answer.asked.chat
    choices = [_whole_choice(answer, index, choice) for index, choice in enumerate(answer.choices)]
    body = answer.envelope("chat.completion" if chat else "text_completion", choices, answer.final_mesh())
    body["usage"] = answer.usage()
    return body


def _whole_choice(answer: AnswerBuilder, index: int, choice: Choice) -> JsonObject:
    text = "".join(choice.text)
    body: JsonObject = {"index": index}
    parser = answer.new_parser(index)
    if answer.asked.chat:
        body["message"] = {"role": "assistant", **message_of(parser, text), "refusal": None}
        annotations = answer.annotations()
        if annotations:
            body["message"]["annotations"] = annotations
    else:
        body["text"] = text
    form = chat_logprobs(choice.logprobs) if answer.asked.chat else completion_logprobs(choice.logprobs, 0)
    body["logprobs"] = form if answer.asked.logprobs else None
    body["finish_reason"] = ending(choice.finish_reason or "", parser, answer.asked.tools)
    if answer.asked.token_ids:
        body["token_ids"] = choice.token_ids
    return body


def chat_logprobs(logprobs: Iterable[TokenLogprob]) -> JsonObject:
    """OpenAI's chat form. `bytes` are those of the token's text."""
    content = []
    for item in logprobs:
        top = [{"token": text, "logprob": logprob, "bytes": list(text.encode())} for _, text, logprob in item.top]
        own = {"token": item.text, "logprob": item.logprob, "bytes": list(item.text.encode())}
        content.append({**own, "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(logprobs: Iterable[TokenLogprob], offset: int) -> JsonObject:
    """The older form of plain completions: parallel lists; `offset` is where the first token's text begins."""
    form: JsonObject = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for item in logprobs:
        form["tokens"].append(item.text)
        form["token_logprobs"].append(item.logprob)
        form["top_logprobs"].append({text: logprob for _, text, logprob in item.top})
        form["text_offset"].append(offset)
        offset += len(item.text)
    return form


AHEAD_EVENTS = 256  # read ahead of a slow client; then the generation's own bounds hold
WRITE_EVENTS = 64  # at most so many in one write, so that a fast source does not delay the first of them

Item = tuple[int, GenerateEvent | MeshError]


def retries_of(request: Request) -> int:
    """How often the client tried before, as the official clients send it; 0 where it sends nothing, or no number."""
    value = request.headers.get("x-stainless-retry-count", "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 4 else 0


async def chat(site: Site, request: Request) -> App:
    id = StreamId(f"chatcmpl-{secrets.token_hex(16)}")
    state = request.state
    body = await read_json(request)
    asked = parse_chat(body, id, tenant=state.tenant, request_id=state.request_id, retries=retries_of(request))
    return GenerationResponse(site, check_model(site.node, asked), with_ids=request.headers.get("x-mesh-sse-id") == "1")


async def completion(site: Site, request: Request) -> App:
    id = StreamId(f"cmpl-{secrets.token_hex(16)}")
    state = request.state
    body = await read_json(request)
    asked = parse_completion(body, id, tenant=state.tenant, request_id=state.request_id, retries=retries_of(request))
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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

    async def _whole(self, items: trio.MemoryReceiveChannel[Item]) -> JsonObject:
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
        """Events until every generation has started. A refusal before that is raised: a status is clearer than an event."""
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
        out: list[CompletionChunk] = []
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
    """`asked`, if its model is known in the mesh and chats.

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
