"""Slots and buffers of keys and values: how they are taken and released, and that no bit depends on the placement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from node.engine.kv.blocks import BLOCK_TOKENS
from node.engine.kv.cache import SLOTS, KVStore, SequenceKV
from node.engine.model.attention import PackedBatch, Segment
from tests.engine.offered import BFLOAT16, FLOAT32, offered
from tests.engine.test_exactness import Sequence, assert_same, generate, load, prompt, step


def ones(count: int) -> torch.Tensor:
    return torch.ones(count, 2, 2, 8)


def test_a_released_slot_is_zeroed_and_taken_next() -> None:
    store = KVStore()
    kept, released = SequenceKV(store), SequenceKV(store)
    assert kept.place is not None and released.place is not None
    slab, slot = released.place.slab, released.place.slot
    released.expect(5)
    released.write(0, 0, ones(5))
    del released
    successor = SequenceKV(store)
    assert successor.place is not None and (successor.place.slab, successor.place.slot) == (slab, slot)
    successor.expect(1)
    successor.write(0, 0, 2 * ones(1))
    keys, values = successor.read(0, 0, 128)
    assert keys[0, :, 0].eq(2).all() and values[0, :, 0].eq(2).all()
    assert not keys[0, :, 1:].any() and not values[0, :, 1:].any()


def test_a_sequence_that_outgrows_its_slot_keeps_its_keys_and_releases_it() -> None:
    store = KVStore()
    kept, long = SequenceKV(store), SequenceKV(store)
    assert kept.place is not None and long.place is not None
    slot = long.place.slot
    long.expect(BLOCK_TOKENS)
    long.write(0, 0, ones(BLOCK_TOKENS))
    for position in (BLOCK_TOKENS, BLOCK_TOKENS + 1):
        long.expect(position + 1)
        long.write(0, position, 3 * ones(1))
    assert long.place is None and slot in kept.place.slab.free
    keys, _ = long.read(0, 0, BLOCK_TOKENS + 128)
    assert keys[0, :, :BLOCK_TOKENS].eq(1).all() and keys[0, :, BLOCK_TOKENS : BLOCK_TOKENS + 2].eq(3).all()
    assert not keys[0, :, BLOCK_TOKENS + 2 :].any()


def test_neighbouring_slots_share_an_attention_call_within_a_stretch_and_slab() -> None:
    store = KVStore()
    sequences = [SequenceKV(store) for _ in range(SLOTS + 2)]
    places = {0: 5, 1: 5, 2: 7, 4: 9, 5: 200, SLOTS: 3, SLOTS + 1: 4}  # sequence -> position
    segments = [Segment(row, 1, at, sequences[number]) for row, (number, at) in enumerate(reversed(places.items()))]
    batch = PackedBatch(segments, 0, 1)
    batch.layer = 0
    batch.write(torch.randn(len(segments), 2, 2, 8))
    runs = [[sequences.index(tile.kv) for tile in near.tiles] for near in batch.reads_for(0, torch.float32).decoding]
    assert sorted(runs) == [[0, 1, 2], [4], [5], [SLOTS, SLOTS + 1]]


@pytest.mark.parametrize("kernel", offered(FLOAT32, BFLOAT16))
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "qwen3"])
def test_no_bit_depends_on_gaps_reused_slots_or_growing_neighbours(
    name: str, kernel: str, checkpoint_of: Callable[[str], Path]
) -> None:
    whole = load(checkpoint_of(name), 0, 4, kernel)
    path = [(whole, 0, 4)]
    alone = generate(Sequence(prompt(1, 50), path), chunk=512, answer=9)
    first, gone, batched, growing = (Sequence(prompt(seed, count), path) for seed, count in ((2, 20), (3, 60), (1, 50), (4, 508)))
    step([(growing, 508)])
    step([(first, 20), (gone, 60), (batched, 50)])
    for _ in range(3):
        step([(growing, 1), (first, 1), (gone, 1), (batched, 1)])
    gone.kv.clear()
    for _ in range(2):
        step([(batched, 1), (growing, 1), (first, 1)])
    successor = Sequence(prompt(1, 50), path)
    step([(successor, 50), (first, 1), (batched, 1)])
    for _ in range(2):
        step([(growing, 1), (batched, 1), (successor, 1), (first, 1)])
    assert_same(alone, batched)
    assert_same(generate(Sequence(prompt(1, 50), path), chunk=512, answer=3), successor)
    assert_same(growing, generate(Sequence(prompt(4, 508), path), chunk=100, answer=8))
