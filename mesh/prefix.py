"""Names of prefix pages: a chain of hashes, one for each page of tokens, each over the hash before it.

Two prompts share names exactly as far as they share whole pages of tokens, so a name stands for all tokens up to the end of its
page. The hash is keyed by the mesh's secret, the tenant and the weights, so that no tenant can find out by timing what another
tenant sent, and names cannot be computed outside the mesh. Entries and stages must compute equal names, because stages find
pages by name and may never receive the tokens.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import blake2b

PREFIX_PAGE_TOKENS = 32
"""Tokens of one page. Smaller pages leave less to recompute behind a hit (half a page on average) but need more names."""

NAME_BYTES = 16
_PAGE = struct.Struct(f"<{PREFIX_PAGE_TOKENS}I")


def prefix_salt(secret: bytes, tenant: str, weights: str) -> bytes:
    """Returns the key of a tenant's names for one model; `secret` is shared by the mesh, `weights` is the checkpoint's digest."""
    digest = blake2b(key=secret, digest_size=32, person=b"mesh-prefix")
    for part in (tenant.encode(), weights.encode()):
        digest.update(len(part).to_bytes(4, "little") + part)
    return digest.digest()


def further_names(salt: bytes, known: Sequence[bytes], tokens: Sequence[int]) -> list[bytes]:
    """Returns the names of the whole pages of `tokens` that follow the pages with the names `known`."""
    names = []
    last = known[-1] if known else b""
    for page in range(len(known), len(tokens) // PREFIX_PAGE_TOKENS):
        packed = _PAGE.pack(*tokens[page * PREFIX_PAGE_TOKENS : (page + 1) * PREFIX_PAGE_TOKENS])
        last = blake2b(last + packed, key=salt, digest_size=NAME_BYTES).digest()
        names.append(last)
    return names
