"""A page as bytes: the layers' keys and values one after the other, raw, in the kernel's own element type. No pickle.

The bytes carry no header; the reader knows the layout, and any other length is refused before a tensor is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import torch

from node.engine.kv.cache import Page


@dataclass(frozen=True, slots=True)
class PageLayout:
    """`shapes`: of each layer that stores something, `[2, kv_heads, positions, dim]`."""

    dtype: torch.dtype
    shapes: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def size_bytes(self) -> int:
        return sum(torch.Size(shape).numel() for _, shape in self.shapes) * self.dtype.itemsize

    @property
    def name(self) -> bytes:
        """Equal where bytes mean the same."""
        return blake2b(repr((str(self.dtype), self.shapes)).encode(), digest_size=16).digest()

    def part(self, start: int, end: int) -> PageLayout:
        return PageLayout(self.dtype, tuple((layer, shape) for layer, shape in self.shapes if start <= layer < end))


def layout_of(page: Page) -> PageLayout:
    first = next(iter(page.values()))
    return PageLayout(first.dtype, tuple((layer, tuple(kv.shape)) for layer, kv in page.items()))


def to_bytes(page: Page) -> bytes:
    return b"".join(kv.cpu().contiguous().view(torch.uint8).numpy().tobytes() for kv in page.values())


def from_bytes(content: bytes, layout: PageLayout) -> Page:
    """The page that `to_bytes` made into `content`.

    Raises:
        ValueError: the content has another length.
    """
    if len(content) != layout.size_bytes:
        raise ValueError(f"expected a page of {layout.size_bytes} bytes, got {len(content)}")
    flat = torch.frombuffer(bytearray(content), dtype=layout.dtype)
    page, at = {}, 0
    for layer, shape in layout.shapes:
        count = torch.Size(shape).numel()
        page[layer] = flat[at : at + count].view(shape)
        at += count
    return page
