"""Counts the KV memory in blocks: which are free, and how many holders each has. No torch.

A block is memory for `BLOCK_TOKENS` tokens of one sequence in all layers of one loaded span. On CPUs the keys and values of a
sequence are one contiguous buffer (`cache`), the form that attention reads fastest there. The common beginnings of sequences
are stored apart, in pages that are copied in and out (`prefix_index`, `docs/decisions/0015-pages-are-copied.md`); on a GPU blocks
are counted in the same way, and the tensors are divided into pages (`paged/`).

Blocks are numbered and reference-counted: a sequence holds its blocks, and so does the step that computes on them, so the
blocks of a sequence that is closed during a step are free only after the step.
"""

from __future__ import annotations

from collections.abc import Iterable

from mesh.errors import LocalError

BLOCK_TOKENS = 512


def blocks_for(tokens: int) -> int:
    """Returns how many blocks hold `tokens` tokens; at least one."""
    return max(1, -(-tokens // BLOCK_TOKENS))


class BlockPool:
    """Allocates numbered blocks; `free + used == total` unless more blocks are in use than a smaller new size allows."""

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
        """Returns `count` blocks with one holder each, or None, without a change, if fewer are free."""
        if count < 0:
            raise LocalError(f"cannot take {count} blocks")
        if count > self.free:
            return None
        assert count <= len(self._free)
        blocks = [self._free.pop() for _ in range(count)]
        assert self._holders.keys().isdisjoint(blocks)
        self._holders.update(dict.fromkeys(blocks, 1))
        return blocks

    def retain(self, blocks: Iterable[int]) -> None:
        """Adds a holder to each block."""
        for block in blocks:
            if block not in self._holders:
                raise LocalError(f"block {block} is not held, so it cannot be shared")
            self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Removes a holder from each block; a block without holders is free."""
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
        """Changes the size of the pool; blocks in use beyond a smaller size are removed when they are released."""
        if total < 1:
            raise LocalError(f"a block pool needs at least one block, got {total}")
        self.total = total
        self._free = [block for block in range(total - 1, -1, -1) if block not in self._holders]
