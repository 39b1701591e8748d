"""The interface of a loaded span, whether this process, a GPU or a group of worker processes computes it.

Implementations: `LocalStage` (`local_stage.py`), `DeviceStage` (`paged_stage.py`), `ParallelStage` (`node.engine.parallel`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from node.engine.model.attention import Segment
from node.engine.model.checkpoint import Checkpoint
from node.engine.model.linear import Kernel


class Stage(Protocol):
    """The layers `[start, end)` of a checkpoint, of `layers` in all. One thread at a time may call `forward`."""

    checkpoint: Checkpoint
    start: int
    end: int
    layers: int
    kernel: Kernel
    threads: int
    parameters: int
    has_unpacked_weights: bool
    """Some weights are not packed; their products may give a row other bits in another batch."""

    windows: set[int]
    """The sliding windows, in positions, that attention has used so far; 0: all positions."""

    holds_kv: bool
    """Keys and values are in this process; otherwise worker processes keep them, and `sequence()` is a handle."""

    kv_copies: int
    """How many ranks store each key and value, where several need the same head."""

    @property
    def constants_digest(self) -> str:
        """A digest of what a compiled span derived from its config; empty where its bits depend on more than that."""

    def sequence(self) -> Any:
        """Returns the keys and values of a new sequence: a `SequenceKV`, `PagedKV` or `SharedKV`."""

    def pack(self) -> None:
        """Packs the weights for the kernel.

        Raises:
            ValueError: this kernel cannot hold the weights, or no two row counts agree.
        """

    def pack_with_reference(self, ids: Sequence[int] | None, hidden: torch.Tensor | None) -> torch.Tensor:
        """Packs the weights; returns what transformers' own code computes for `ids` `[rows]` or `hidden` `[rows, hidden_size]`.

        Raises:
            ValueError: as `pack`.
        """

    def forward(
        self,
        start: int,
        end: int,
        segments: list[Segment],
        positions: Sequence[int],
        *,
        ids: Sequence[int] | None = None,
        hidden: torch.Tensor | None = None,
        logits_at: Sequence[int] = (),
    ) -> torch.Tensor:
        """Runs layers `[start, end)` over packed rows, `ids` (if `start` is 0) or `hidden` `[rows, hidden_size]`.

        Returns the activations `[rows, hidden_size]` in the kernel's dtype, or after the last layer the float32 logits
        `[len(logits_at), vocab]` of those rows alone. Writes the keys and values of `segments`.
        """

    def on_end(self, call: Callable[[str], None]) -> None:
        """Calls `call` once with the reason, from any thread, when the stage's worker processes end by themselves."""

    def close(self) -> None:
        """Ends the stage's worker processes, if it has any (*blocking*)."""
