"""A quick, deterministic stand-in for the embedder: a hashed bag of words."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rag.embed import unit

DIM = 64


class HashingEmbedder:
    def __init__(self, identity: str = "hashing:64") -> None:
        self._identity = identity
        self.passages_embedded = 0

    @property
    def identity(self) -> str:
        return self._identity

    @property
    def dim(self) -> int:
        return DIM

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        rows = np.zeros((len(texts), DIM), np.float32)
        for row, text in enumerate(texts):
            rows[row, 0] = 0.1
            for word in re.findall(r"\w+", text.lower()):
                digest = hashlib.blake2b(word.encode(), digest_size=4).digest()
                rows[row, int.from_bytes(digest, "big") % DIM] += 1.0
        return unit(rows)

    def embed_passages(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.passages_embedded += len(texts)
        return self.embed(texts)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(re.findall(r"\w+|[^\w\s]", text)) for text in texts]
