"""Room in large pages where the system has them; elsewhere in the usual ones."""

import mmap
from typing import Any

import pytest
import torch

from node.engine.kv.cache import KVStore, SequenceKV
from node.engine.native import arena

pytestmark = pytest.mark.no_kernel


class WithoutLargePages(mmap.mmap):
    """As of a kernel that was built without them."""

    def madvise(self, *_: Any) -> None:
        raise OSError(22, "Invalid argument")


@pytest.fixture(params=["refused by the kernel", "unknown to the system"])
def without_large_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "refused by the kernel":
        monkeypatch.setattr(mmap, "mmap", WithoutLargePages)
    else:
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")


@pytest.mark.usefixtures("without_large_pages")
def test_weights_are_packed_where_there_are_no_large_pages() -> None:
    held = arena.zeroed(arena.MAX_SHARED_BYTES + 1)
    assert len(held) == arena.MAX_SHARED_BYTES + 1 and not held.any()


@pytest.mark.usefixtures("without_large_pages")
def test_a_sequence_outgrows_its_slot_where_there_are_no_large_pages() -> None:
    kv = SequenceKV(KVStore())
    written = torch.randn(600, 2, 1, 16)
    kv.expect(600)
    kv.write(0, 0, written)
    keys, values = kv.read(0, 0, 600)
    assert torch.equal(keys.reshape(-1, 16)[:600], written[:, 0, 0]) and torch.equal(
        values.reshape(-1, 16)[:600], written[:, 1, 0]
    )
