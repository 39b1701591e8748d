"""Which kernels this machine has, for tests to ask: what it lacks is skipped, and the reason is the machine's own."""

from __future__ import annotations

from typing import Any

import pytest

from node.engine.kernels.kernel_probe import refusal
from node.engine.model.linear import KERNELS
from node.engine.native.library import absence

needs_compiled = pytest.mark.skipif(bool(absence()), reason=f"the compiled kernel: {absence()}")
FLOAT32 = next(name for name in ("onednn-fp32", "aten-fp32") if not refusal(KERNELS[name]))
BFLOAT16 = next(name for name in ("onednn-bf16", "mesh-bf16", "aten-bf16") if not refusal(KERNELS[name]))
"""The first of each dtype that this machine has, for tests of something else than kernels."""


def needs(name: str) -> pytest.MarkDecorator:
    """Skips a test where this machine cannot compute with the named kernel."""
    reason = refusal(KERNELS[name])
    return pytest.mark.skipif(bool(reason), reason=f"{name}: {reason}")


def offered(*names: str, beside: tuple[Any, ...] = ()) -> list[Any]:
    """The named kernels as parameters of a test, each with `beside`; those that this machine lacks are skipped."""
    return [pytest.param(name, *beside, id="-".join(map(str, (name, *beside))), marks=_marks(name)) for name in names]


def _marks(name: str) -> list[pytest.MarkDecorator]:
    return [needs(name)] if KERNELS[name].compiled else [needs(name), pytest.mark.torchs_kernel]
