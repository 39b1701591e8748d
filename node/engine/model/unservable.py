"""Refuses models that need more of attention than is computed here: to ignore an argument would give wrong tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch

IGNORED_TENSORS = ("position_ids", "cache_position")  # models pass them on, and no attention computes with them


class Unservable(ValueError):
    """A model needs a computation that this package lacks; the message names it."""


def refuse_unsupported_arguments(module: torch.nn.Module, mask: torch.Tensor | None, unused: Mapping[str, object]) -> None:
    """Checks a call through transformers' AttentionInterface: its `mask`, and arguments that `mesh_attention` does not use.

    Raises:
        Unservable: one of them would change the result of attention.
    """
    if mask is not None:
        raise Unservable("its attention has a mask of its own making, which is not read here")
    if unused.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise Unservable("its attention looks ahead")
    unread = sorted(name for name, value in unused.items() if isinstance(value, torch.Tensor) and name not in IGNORED_TENSORS)
    if unread:
        raise Unservable(f"its attention wants {', '.join(unread)}, which is not read here")
