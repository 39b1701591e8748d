"""Decodes the event stream of an answer, and follows the progress of the answer. No I/O.

The wire format is server-sent events (WHATWG HTML, "Server-sent events"), of which a mesh uses
`data:` lines, comments (`: ping`) and blank lines. `mesh.seq` of a chunk counts the tokens, over all
choices, up to this chunk, so that a reader can detect a gap or a repetition.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mesh.errors import RemoteError
from mesh.json_object import JsonObject

AnswerChunk = JsonObject
"""A chunk of a streamed answer, in OpenAI's form with the field `mesh`."""

MAX_LINE_BYTES = 16 << 20  # far above any event; a faulty node must not fill the client's memory


class EventDecoder:
    """Splits received bytes into events. An event that the end of the stream cuts off is dropped."""

    def __init__(self, node: str) -> None:
        self.node = node
        self._rest = b""
        self._data: list[str] = []

    def feed(self, received: bytes) -> list[str]:
        """Returns the data of the events that `received` completes.

        Raises:
            RemoteError: a line longer than `MAX_LINE_BYTES`, or bytes that are not UTF-8.
        """
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            raise RemoteError(self.node, f"expected events with lines of at most {MAX_LINE_BYTES} bytes, got a longer one")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                try:
                    self._data.append(line[5:].removeprefix(b" ").decode())
                except UnicodeDecodeError as error:
                    raise RemoteError(self.node, f"expected UTF-8 in its event stream: {error}") from None
            elif not line and self._data:
                events.append("\n".join(self._data))
                self._data.clear()
        return events


@dataclass(slots=True)
class AnswerProgress:
    """The progress of one answer, over all nodes that sent parts of it.

    After a resume a node may repeat chunks without tokens (the role, a finish reason, usage); `accept` detects
    repetitions, so that the reader gets each chunk once. Where the chunks list their tokens (`return_token_ids`),
    these are checked against `seq`, and repeated and missing tokens are counted.
    """

    stream: str = ""  # the stream's id; empty until a node sent it
    seq: int = 0
    duplicate_tokens: int = 0
    missing_tokens: int = 0
    resumes: int = 0
    lists_tokens: bool = False  # chunks have token ids; without them the two counts stay 0
    last: AnswerChunk | None = None  # the last chunk, which has `mesh.path`
    usage: JsonObject | None = None
    finish_reasons: dict[int, str] = field(default_factory=dict)
    _roles: set[int] = field(default_factory=set)

    def accept(self, chunk: AnswerChunk) -> bool:
        """Updates the progress by `chunk`. Returns False when the chunk has nothing new for the reader."""
        seq = (chunk.get("mesh") or {}).get("seq", self.seq)
        choices = chunk.get("choices") or []
        listed = sum(len(choice.get("token_ids") or ()) for choice in choices)
        self.lists_tokens = self.lists_tokens or listed > 0
        self.stream = self.stream or chunk.get("id", "")
        repeated = bool(listed) and seq <= self.seq
        if self.lists_tokens:
            surplus = listed - max(0, seq - self.seq)
            self.duplicate_tokens += max(0, surplus)
            self.missing_tokens += max(0, -surplus)
        self.seq = max(self.seq, seq)
        new = [self._is_new(choice) for choice in choices]  # a list, because `any` would skip the update by later choices
        usage = chunk.get("usage")
        new.append(usage is not None and self.usage is None)
        self.usage = usage or self.usage
        if "path" in (chunk.get("mesh") or {}):
            new.append(self.last is None)
            self.last = chunk
        return any(new) and not repeated

    def _is_new(self, choice: JsonObject) -> bool:
        """Updates roles and finish reasons by a choice. Returns whether it has something new."""
        delta = choice.get("delta") or {}
        index = choice.get("index", 0)
        new = bool(delta.get("content") or choice.get("text") or choice.get("token_ids") or delta.get("tool_calls"))
        if "role" in delta:
            new = new or index not in self._roles
            self._roles.add(index)
        if reason := choice.get("finish_reason"):
            new = new or index not in self.finish_reasons
            self.finish_reasons[index] = reason
        return new
