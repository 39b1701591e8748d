"""The block pool: no block is allocated twice, lost or leaked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mesh.errors import LocalError
from node.engine.kv.blocks import BLOCK_TOKENS, BlockPool, blocks_for

pytestmark = pytest.mark.no_kernel


class PoolMachine(RuleBasedStateMachine):
    """Takes, retains, releases and resizes in any order; `holds` is the model: one entry for each holder."""

    @initialize(total=st.integers(1, 12))
    def make(self, total: int) -> None:
        self.pool = BlockPool(total)
        self.holds: list[list[int]] = []

    @rule(count=st.integers(0, 5))
    def take(self, count: int) -> None:
        free = self.pool.free
        blocks = self.pool.take(count)
        assert (blocks is None) == (count > free)
        if blocks is not None:
            held = {block for hold in self.holds for block in hold}
            assert len(set(blocks)) == count and not held.intersection(blocks)
            self.holds.append(blocks)

    @rule(pick=st.integers(0, 50))
    def share(self, pick: int) -> None:
        if self.holds:
            hold = self.holds[pick % len(self.holds)]
            self.pool.retain(hold)
            self.holds.append(list(hold))

    @rule(pick=st.integers(0, 50))
    def release(self, pick: int) -> None:
        if self.holds:
            self.pool.release(self.holds.pop(pick % len(self.holds)))

    @rule(total=st.integers(1, 12))
    def resize(self, total: int) -> None:
        self.pool.resize(total)

    @invariant()
    def used_are_those_held(self) -> None:
        assert self.pool.used == len({block for hold in self.holds for block in hold})
        assert self.pool.free == max(0, self.pool.total - self.pool.used)

    def teardown(self) -> None:
        for hold in self.holds:
            self.pool.release(hold)
        assert self.pool.used == 0
        assert self.pool.take(self.pool.total) is not None, "a block was lost"


TestPool = PoolMachine.TestCase


@given(st.integers(0, 10_000))
def test_blocks_for_returns_the_smallest_sufficient_number(tokens: int) -> None:
    count = blocks_for(tokens)
    assert count * BLOCK_TOKENS >= tokens
    assert count == 1 or (count - 1) * BLOCK_TOKENS < tokens


def test_releasing_twice_and_retaining_a_free_block_raise_local_errors() -> None:
    pool = BlockPool(2)
    blocks = pool.take(1)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(LocalError, match="released twice"):
        pool.release(blocks)
    with pytest.raises(LocalError, match="not held"):
        pool.retain(blocks)
