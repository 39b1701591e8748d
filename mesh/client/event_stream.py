"""What a client reads from a stream of a mesh: events out of bytes, and how far the answer has come.

Pure. The wire format is server-sent events (WHATWG HTML, "Server-sent events"), of which a mesh uses
`data:` lines, comments (`: ping`) and blank lines. `mesh.seq` on a chunk counts the tokens, over all
choices, that the client has with this chunk; so a reader can tell a gap or a repetition by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mesh.errors import RemoteError

AnswerChunk = dict[str, Any]

LINE_LIMIT_BYTES = 16 << 20  # no event of an honest node comes near; a broken one must not fill our memory


class EventDecoder:
    """Bytes in, the data of each complete event out. What is cut off at the end of the bytes is not an event."""

    def __init__(self, node: str) -> None:
        self.node = node
        self._rest = b""
        self._data: list[str] = []

    def feed(self, received: bytes) -> list[str]:
        """The data of the events that `received` completes.

        Raises:
            RemoteError: a line longer than `LINE_LIMIT_BYTES`, or bytes that are not UTF-8.
        """
        *lines, self._rest = (self._rest + received).split(b"\n")
        if len(self._rest) > LINE_LIMIT_BYTES:
            raise RemoteError(self.node, f"expected events with lines of at most {LINE_LIMIT_BYTES} bytes, got a longer one")
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
    """How much of one answer has come, over all the nodes it came from.

    After a resume a node may repeat what does not count as a token (the role, a finish reason, usage);
    `accept` says what is new, so the reader gets each thing once. Tokens are checked against `seq`
    where the chunks list them (`return_token_ids`): a token that came twice or never is counted.
    """

    stream: str = ""  # the stream's id; empty until a node told it
    seq: int = 0
    duplicate_tokens: int = 0
    missing_tokens: int = 0
    resumes: int = 0
    lists_tokens: bool = False  # chunks carry token ids, so the counts above mean something
    last: AnswerChunk | None = None  # the chunk with `mesh.path`: the one right before the end
    usage: dict[str, Any] | None = None
    finish_reasons: dict[int, str] = field(default_factory=dict)
    _roles: set[int] = field(default_factory=set)

    def accept(self, chunk: AnswerChunk) -> bool:
        """Takes note of `chunk`; False when the reader had all of it before."""
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
        new = [self._is_new(choice) for choice in choices]  # a list: each choice takes note of itself
        usage = chunk.get("usage")
        new.append(usage is not None and self.usage is None)
        self.usage = usage or self.usage
        if "path" in (chunk.get("mesh") or {}):
            new.append(self.last is None)
            self.last = chunk
        return any(new) and not repeated

    def _is_new(self, choice: AnswerChunk) -> bool:
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
