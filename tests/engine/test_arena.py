"""Packed weights share mappings, each in room of its own, which goes with the last of them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from node.engine.native import arena
from node.engine.native.arena import ALIGNMENT, MAX_SHARED_BYTES, SHARED_BYTES, zeroed

pytestmark = pytest.mark.no_kernel


def test_each_weight_has_zeros_of_its_own_that_begin_with_a_line_of_the_cache() -> None:
    sizes = [1, 63, 64, 65, 4096, MAX_SHARED_BYTES, MAX_SHARED_BYTES + 1, *[3 << 20] * 8]
    pieces = [zeroed(size) for size in sizes]
    for number, piece in enumerate(pieces):
        assert piece.shape == (sizes[number],) and piece.data_ptr() % ALIGNMENT == 0
        assert not piece.any()
        piece.fill_(number + 1)
    assert all((piece == number + 1).all() for number, piece in enumerate(pieces))


def test_a_mapping_goes_with_the_last_weight_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []

    class Mapping(bytearray):
        pass

    def mapped(size_bytes: int) -> Mapping:
        mapping = Mapping(size_bytes)
        made.append(weakref.ref(mapping))
        return mapping

    monkeypatch.setattr(arena, "mapped", mapped)
    monkeypatch.setattr(arena, "_shared", arena._Shared())
    first, second = zeroed(SHARED_BYTES // 8), zeroed(SHARED_BYTES // 8)
    rest = [zeroed(MAX_SHARED_BYTES) for _ in range(4)]  # the last of them begins another
    assert len(made) == 2
    del first, rest
    gc.collect()
    assert made[0]() is not None and torch.equal(second, torch.zeros_like(second))
    del second
    gc.collect()
    assert made[0]() is None
