"""How large the model is. Pure."""

from __future__ import annotations

from dataclasses import dataclass

VOCABULARY = 4096


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama: RMS norms before attention and before a SwiGLU, rotary positions, embeddings tied to the head.

    `heads` times `head_dim` equals `width`; as many key-value heads as heads: at this size the cache is small anyway.
    """

    layers: int
    width: int
    heads: int
    inner: int  # columns of the SwiGLU
    vocabulary: int = VOCABULARY
    context: int = 2048  # tokens; the longest training row has as many
    rope_theta: float = 1_000_000.0  # most dimensions turn so slowly that a word finds its like at any distance
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def parameters(self) -> int:
        layer = 4 * self.width**2 + 3 * self.width * self.inner + 2 * self.width
        return self.vocabulary * self.width + self.layers * layer + self.width

    def flops_per_token(self, row_tokens: int) -> float:
        """Forward and backward: 6 a weight, and attention over half a row on average; the head is left out, see README."""
        weights = self.layers * (4 * self.width**2 + 3 * self.width * self.inner)
        return 6.0 * weights + 6.0 * self.layers * row_tokens * self.width


SHAPES = {
    "cpu": Shape(layers=6, width=256, heads=4, inner=704),
    "gpu": Shape(layers=8, width=320, heads=5, inner=832),
    "tiny": Shape(layers=2, width=64, heads=2, inner=128, vocabulary=512, context=512),  # for tests
}
