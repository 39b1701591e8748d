"""The names of a prompt's beginnings: one hash a page of tokens, each over the hash before it.

Two prompts share a name exactly as far as they share whole pages of tokens, so a name stands for all tokens up to its
page. The hash is keyed: by the mesh's secret, the tenant and the weights, so no tenant can tell by timing what another
one asked, and no name means anything outside the mesh. Entries and stages must agree on every byte of it, for pages are
found by name on nodes that never see the tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

PREFIX_PAGE_TOKENS = 32
"""Tokens of one page. Smaller pages leave less to recompute behind a hit (half a page on average), and cost more names."""

NAME_BYTES = 16
_PAGE = struct.Struct(f"<{PREFIX_PAGE_TOKENS}I")


def prefix_salt(secret: bytes, tenant: str, weights: str) -> bytes:
    """The key of one tenant's names for one model; `secret` is shared by the mesh, `weights` is the checkpoint's digest."""
    digest = blake2b(key=secret, digest_size=32, person=b"mesh-prefix")
    for part in (tenant.encode(), weights.encode()):
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.digest()


def further_names(salt: bytes, known: Sequence[bytes], tokens: Sequence[int]) -> list[bytes]:
    """The names of the whole pages of `tokens` behind those whose names are `known`."""
    names = []
    last = known[-1] if known else b""
    for page in range(len(known), len(tokens) // PREFIX_PAGE_TOKENS):
        packed = _PAGE.pack(*tokens[page * PREFIX_PAGE_TOKENS : (page + 1) * PREFIX_PAGE_TOKENS])
        last = blake2b(last + packed, key=salt, digest_size=NAME_BYTES).digest()
        names.append(last)
    return names
