"""What one client may cost the HTTP server: times, sizes, connections. Contract: head and body."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    head_s: float = 10.0  # from a connection's or a head's first byte to its last
    head_bytes: int = 32 << 10
    body_s: float = 60.0  # from the head to the body's last byte
    body_bytes: int = 16 << 20
    bodies_bytes: int = 512 << 20  # of all requests at the same time, so that many large uploads cannot fill the memory
    keep_alive_s: float = 75.0  # between two requests: longer than common clients and balancers keep theirs
    write_s: float = 30.0  # for one piece of at most `WRITE_PIECE_BYTES`: a reader that stalls longer is dropped
    connections: int = 2048  # one more gets 503; a stream costs some 50 KiB
    refusals: int = 64  # connections that are refused with an answer at the same time; one more is closed without
    pipelined_bytes: int = 64 << 10  # read ahead while a request is being answered; then the client must wait
    unread_body_bytes: int = 256 << 10  # of a body that the route did not want: thrown away to keep the connection
    linger_s: float = 2.0  # how long to read on after a refusal, so that a reset does not destroy the answer on its way
