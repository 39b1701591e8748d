"""Server-sent events in the dialect that OpenAI's clients read: `data:` lines only.

`id:`, `event:` and `retry:` lines break the official client, and so does a comment that ends with an empty
line after one; so ids come only on request and a keep-alive is `: ping` with one newline.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from mesh.json_object import JsonObject

PING = b": ping\n"
PING_EVERY_S = 4.0  # the contract allows 5 s of silence; a busy loop may be late
DONE = b"data: [DONE]\n\n"

HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the events back
)

_encoder = msgspec.json.Encoder()


def encode(chunks: Iterable[JsonObject], *, with_ids: bool = False) -> bytes:
    """One event a chunk; several of them are one write. With ids, each event's id is the chunk's `mesh.seq`."""
    parts = []
    for chunk in chunks:
        if with_ids:
            parts.append(b"id: %d\n" % chunk["mesh"]["seq"])
        parts.append(b"data: " + _encoder.encode(chunk) + b"\n\n")
    return b"".join(parts)


def encode_error(body: JsonObject) -> bytes:
    """The end of a stream that failed; nothing follows it, `[DONE]` least of all."""
    return b"data: " + _encoder.encode(body) + b"\n\n"
