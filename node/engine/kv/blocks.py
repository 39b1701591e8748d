"""The KV block pool: how much of the KV memory each sequence holds. Counting only, no torch.

A block is room for `BLOCK_TOKENS` tokens of one sequence in all layers of one loaded span. On CPUs a sequence keeps
its blocks as one contiguous buffer (`kvcache`), which attention there reads fastest. What several sequences begin with is kept
apart from that, in pages that are copied in and out (`pages`, `docs/decisions/0015-pages-are-copied.md`); on a GPU blocks
are counted in the same way and lie in pages (`paged/`).

Blocks are numbered and reference-counted: a sequence holds its blocks, and so does the step that computes on
them, so closing a sequence in mid-step gives nothing away before the step is over.
"""

from __future__ import annotations

from collections.abc import Iterable

from mesh.errors import LocalError

BLOCK_TOKENS = 512


def blocks_for(tokens: int) -> int:
    """Blocks that hold `tokens` tokens; one at least."""
    return max(1, -(-tokens // BLOCK_TOKENS))


class BlockPool:
    """Hands out numbered blocks; `free + used == total` except while a shrink waits for blocks to come home."""

    def __init__(self, total: int) -> None:
        if total < 1:
            raise LocalError(f"a block pool needs at least one block, got {total}")
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._holders: dict[int, int] = {}

    @property
    def used(self) -> int:
        return len(self._holders)

    @property
    def free(self) -> int:
        return max(0, self.total - self.used)

    def take(self, count: int) -> list[int] | None:
        """`count` blocks with one holder each, or None (and no change) when fewer are free."""
        if count < 0:
            raise LocalError(f"cannot take {count} blocks")
        if count > self.free:
            return None
        blocks = [self._free.pop() for _ in range(count)]
        self._holders.update(dict.fromkeys(blocks, 1))
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """One more holder for each block."""
        for block in blocks:
            if block not in self._holders:
                raise LocalError(f"block {block} is not held, so it cannot be shared")
            self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less for each block; the last one frees it."""
        for block in blocks:
            holders = self._holders.get(block)
            if holders is None:
                raise LocalError(f"block {block} is released twice")
            if holders > 1:
                self._holders[block] = holders - 1
            else:
                del self._holders[block]
                if block < self.total:
                    self._free.append(block)

    def resize(self, total: int) -> None:
        """Changes the pool's size; blocks in use beyond a smaller size go when they are released."""
        if total < 1:
            raise LocalError(f"a block pool needs at least one block, got {total}")
        self.total = total
        self._free = [block for block in range(total - 1, -1, -1) if block not in self._holders]
