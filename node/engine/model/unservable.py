"""What a model may want of attention that is not computed here: refused, for to pass it over would give a wrong answer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

NOT_OF_SCORES = ("position_ids", "cache_position")  # tensors that models hand through and no attention computes with


class Unservable(ValueError):
    """A model wants what is not computed here; the text says what."""


def refuse_what_is_not_read(module: torch.nn.Module, mask: torch.Tensor | None, unused: Mapping[str, object]) -> None:
    """Of a call through transformers' AttentionInterface: its `mask` and the arguments that our attention does not take.

    Raises:
        Unservable: one of them changes what attention answers.
    """
    if mask is not None:
        raise Unservable("its attention has a mask of its own making, which is not read here")
    if unused.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise Unservable("its attention looks ahead")
    unread = sorted(name for name, value in unused.items() if isinstance(value, torch.Tensor) and name not in NOT_OF_SCORES)
    if unread:
        raise Unservable(f"its attention wants {', '.join(unread)}, which is not read here")
