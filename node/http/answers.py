"""Events of generations as OpenAI's chunks and whole answers, with the `mesh` field. Pure.

One answer may be several generations (a list of prompts): the choices of generation g are
`g * n … g * n + n - 1`, and `seq` is the sum over the generations. The chunk that ends the last choice is
held back until the generation is known to be whole, since the last chunk carries the path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mesh.ids import ModelId
from node.http.openai import ParsedRequest
from node.http.tool_deltas import delta_of, ending, message_of, parser_for
from node.requests import ChoiceDone, Finished, GenerateEvent, Started, TextDelta, TokenLogprob
from node.text.tool_calls import ToolCallParser

Chunk = dict[str, Any]


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

    def usage(self) -> dict[str, Any]:
        """Counts of the request, not of its attempts."""
        prompt_tokens, completion_tokens = sum(self._prompt_tokens), self.seq
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(end.cached_tokens for end in self._finished if end is not None)},
        }

    def envelope(self, kind: str, choices: list[dict[str, Any]], mesh: dict[str, Any]) -> Chunk:
        return {
            "id": self.asked.id,
            "object": kind,
            "created": self._created_s,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
            "choices": choices,
            "mesh": mesh,
        }

    def final_mesh(self) -> dict[str, Any]:
        """What the last chunk and a whole answer tell of how the answer came about."""
        ends = [finished for finished in self._finished if finished is not None]
        mesh: dict[str, Any] = {
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

    def annotations(self) -> list[dict[str, Any]]:
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
        self._held: Chunk | None = None

    @property
    def complete(self) -> bool:
        return self._answer.complete

    def add(self, generation: int, event: GenerateEvent) -> list[Chunk]:
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

    def _opening(self, generation: int) -> list[Chunk]:
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

    def _delta(self, index: int, text: str) -> dict[str, Any]:
        parser = self._parser(index)
        return {"content": text} if parser is None else delta_of(parser.feed(text))

    def _choice_chunk(
        self,
        index: int,
        text: str,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprob],
        delta: dict[str, Any],
        reason: str | None = None,
    ) -> Chunk:
        body: dict[str, Any] = {"delta": delta} if self._asked.chat else {"text": text}
        if self._asked.logprobs and (logprobs or reason is None):
            offset = self._answer.choices[index].chars
            body["logprobs"] = chat_logprobs(logprobs) if self._asked.chat else completion_logprobs(logprobs, offset)
        if self._asked.token_ids:
            body["token_ids"] = list(token_ids)
        self._answer.choices[index].chars += len(text)
        return self._chunk([self._choice(index, body, reason)])

    def _ending(self, index: int, event: ChoiceDone) -> list[Chunk]:
        parser = self._parser(index)
        delta = delta_of(parser.finish()) if parser is not None else {}
        reason = ending(event.finish_reason, parser, self._asked.tools)
        chunk = self._choice_chunk(index, "", event.token_ids, (), delta, reason)
        if all(choice.finish_reason for choice in self._answer.choices):
            self._held = chunk
            return []
        return [chunk]

    def _closing(self) -> list[Chunk]:
        """The held end, and the usage where it was asked for; the very last one carries the path."""
        chunks = [self._held] if self._held is not None else []
        if self._asked.include_usage or not chunks:
            chunks.append(self._chunk([]))
        if self._asked.include_usage:
            chunks[-1]["usage"] = self._answer.usage()
        chunks[-1]["mesh"] = self._answer.final_mesh()
        return chunks

    def _choice(self, index: int, body: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"index": index, **body, "logprobs": body.get("logprobs"), "finish_reason": reason}

    def _chunk(self, choices: list[dict[str, Any]]) -> Chunk:
        chunk = self._answer.envelope(self._kind, choices, {"seq": self._answer.seq})
        if self._asked.continuous_usage:
            chunk["usage"] = self._answer.usage()
        elif self._asked.include_usage:
            chunk["usage"] = None
        return chunk


def whole_answer(answer: AnswerBuilder) -> dict[str, Any]:
    """The body of a request that did not stream, once all its generations have finished."""
    chat = answer.asked.chat
    choices = [_whole_choice(answer, index, choice) for index, choice in enumerate(answer.choices)]
    body = answer.envelope("chat.completion" if chat else "text_completion", choices, answer.final_mesh())
    body["usage"] = answer.usage()
    return body


def _whole_choice(answer: AnswerBuilder, index: int, choice: Choice) -> dict[str, Any]:
    text = "".join(choice.text)
    body: dict[str, Any] = {"index": index}
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


def chat_logprobs(logprobs: Iterable[TokenLogprob]) -> dict[str, Any]:
    """OpenAI's chat form. `bytes` are those of the token's text."""
    content = []
    for item in logprobs:
        top = [{"token": text, "logprob": logprob, "bytes": list(text.encode())} for _, text, logprob in item.top]
        own = {"token": item.text, "logprob": item.logprob, "bytes": list(item.text.encode())}
        content.append({**own, "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(logprobs: Iterable[TokenLogprob], offset: int) -> dict[str, Any]:
    """The older form of plain completions: parallel lists; `offset` is where the first token's text begins."""
    form: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for item in logprobs:
        form["tokens"].append(item.text)
        form["token_logprobs"].append(item.logprob)
        form["top_logprobs"].append({text: logprob for _, text, logprob in item.top})
        form["text_offset"].append(offset)
        offset += len(item.text)
    return form
