"""Which stages live on when a load tries kernel after kernel: what is not returned is ended, for it may own processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import BadRequest
from mesh.view import is_exact
from node.engine import loading, selfcheck
from node.engine.kernels import kernel_choice
from node.engine.kernels.kernel_choice import KernelChoice
from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.linear import KERNELS
from node.engine.parallel.worker_group import WorkersLost

pytestmark = pytest.mark.no_kernel

NAMES = ("onednn-fp32", "aten-fp32")


@dataclass
class Tried:
    """Stands for a stage; `fate`: how far it comes."""

    kernel: Any
    fate: str
    closed: int = 0
    constants_digest: str = ""

    @property
    def has_unpacked_weights(self) -> bool:
        return self.fate == "unpacked"

    def pack(self) -> None:
        if self.fate == "unpackable":
            raise ValueError("no such instruction")

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(
    ("fates", "kept", "exact"),
    [
        (("exact", "exact"), 0, True),
        (("differs", "exact"), 1, True),
        (("unpackable", "exact"), 1, True),
        (("inexact", "exact"), 1, True),
        (("inexact", "inexact"), 2, False),  # the first one again
        (("inexact", "differs"), 2, False),
        (("unpacked", "exact"), 0, False),
        (("differs", "differs"), None, BadRequest),
        (("blind", "exact"), None, BadRequest),
        (("dies", "exact"), None, WorkersLost),
        (("inexact", "dies"), None, WorkersLost),
    ],
)
def test_whatever_stage_is_not_returned_is_closed_once(
    fates: tuple[str, str], kept: int | None, exact: Any, checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []

    def stage(checkpoint: Any, start: int, end: int, kernel: Any, *more: Any) -> Tried:
        assert all(one.closed for one in tried), "two at once"
        tried.append(made := Tried(kernel, fates[NAMES.index(kernel.name)]))
        return made

    def compared(one: Any, plain: None) -> bool:
        if one.fate == "dies":
            raise WorkersLost("rank 1 was killed by signal 9")
        return bool(one.fate != "differs")

    monkeypatch.setattr(loading, "_stage", stage)
    monkeypatch.setattr(selfcheck, "pack_with_reference", Tried.pack)
    tries = KernelChoice(tuple(KERNELS[name] for name in NAMES), "")
    monkeypatch.setattr(kernel_choice, "choose", lambda *given: tries)
    monkeypatch.setattr(selfcheck, "matches_reference", compared)
    monkeypatch.setattr(selfcheck, "uses_its_sliding_window", lambda one: one.fate != "blind")
    monkeypatch.setattr(selfcheck, "is_exact", lambda one: one.fate == "exact")
    checkpoint = read_checkpoint(checkpoint_of("llama"))
    if kept is None:
        with pytest.raises(exact):
            loading.load_stage(checkpoint, 0, 4, "auto", 1)
    else:
        loaded = loading.load_stage(checkpoint, 0, 4, "auto", 1)
        assert loaded.stage is tried[kept] and is_exact(loaded.numerics) is exact
    unpackable = [one for one in tried if one.fate == "unpackable"]
    assert [one.closed for one in tried if one not in unpackable] == [
        int(number != kept) for number, one in enumerate(tried) if one not in unpackable
    ]
