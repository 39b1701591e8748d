"""Packs a node's load into 24 bytes, which every gossip message and every frame of a link carries.

Layout, big endian: running 2, waiting 2, KV blocks used 4, in all 4, prefill tokens queued 4, prefill tokens a second as a
float of 4, milliseconds a step as a float of 2, age in milliseconds 2. A value above its field's highest is sent as the highest:
with 65,535 waiting requests a node is not chosen anyway.
"""

from __future__ import annotations

import struct

from mesh.view import Load

_LAYOUT = struct.Struct("!HHIIIfeH")
LOAD_BYTES = _LAYOUT.size
_U16, _U32 = 2**16 - 1, 2**32 - 1
_MAX_FLOAT, _MAX_HALF = 3.4e38, 65504.0


def pack_load(load: Load, age_ms: int = 0) -> bytes:
    """Returns `LOAD_BYTES` bytes. The figures are the node's own: none is negative or not a number."""
    return _LAYOUT.pack(
        min(load.running, _U16),
        min(load.waiting, _U16),
        min(load.kv_blocks_used, _U32),
        min(load.kv_blocks_total, _U32),
        min(load.prefill_tokens_queued, _U32),
        min(load.prefill_tok_s, _MAX_FLOAT),
        min(load.step_ms, _MAX_HALF),
        min(age_ms, _U16),
    )


def unpack_load(raw: bytes, at: int = 0) -> tuple[Load, int]:
    """Returns load and age in milliseconds from the `LOAD_BYTES` bytes at `at`. The caller checks them (`load_is_sane`)."""
    *figures, age_ms = _LAYOUT.unpack_from(raw, at)
    return Load(*figures), age_ms
