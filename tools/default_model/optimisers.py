"""What changes the weights: Muon for the matrices of the layers, AdamW for embeddings and norms.

Muon (orthogonalised momentum; torch's own, after K. Jordan) needs fewer tokens than AdamW to the same loss on small
transformers, and costs a few per cent of a step at this size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tools.default_model.curriculum import rate_at

MATRIX_RATE = 4e-3  # update size matched to AdamW's, hence one scale for all
OTHER_RATE = 3e-3
WEIGHT_DECAY = 0.05
CLIP_NORM = 1.0


class Optimisers:
    def __init__(self, model: nn.Module) -> None:
        matrices = [each for name, each in model.named_parameters() if each.dim() == 2 and name != "embedding"]
        others = [each for name, each in model.named_parameters() if each.dim() != 2 or name == "embedding"]
        self._parameters = [*matrices, *others]
        self._muon = torch.optim.Muon(
            matrices, lr=MATRIX_RATE, weight_decay=WEIGHT_DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        self._adam = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), eps=1e-10, weight_decay=0.0)

    def step(self, progress: float) -> float:
        """Uses the gradients up, at the rate that `progress` has; returns their norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self._parameters, CLIP_NORM)
        for optimiser, peak in ((self._muon, MATRIX_RATE), (self._adam, OTHER_RATE)):
            for group in optimiser.param_groups:
                group["lr"] = peak * rate_at(progress)
            optimiser.step()  # type: ignore[no-untyped-call]
            optimiser.zero_grad(set_to_none=True)
        return float(norm)

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on besides the weights, under names like `muon.3.momentum_buffer`."""
        found: dict[str, Tensor] = {}
        for name, optimiser in self._named().items():
            for number, entries in optimiser.state_dict()["state"].items():
                found |= {f"{name}.{number}.{key}": tensor for key, tensor in entries.items()}
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The reverse of `state`."""
        for name, optimiser in self._named().items():
            entries: dict[int, dict[str, Tensor]] = {}
            for key, tensor in state.items():
                owner, number, field = key.split(".", 2)
                if owner == name:
                    entries.setdefault(int(number), {})[field] = tensor
            optimiser.load_state_dict({"state": entries, "param_groups": optimiser.state_dict()["param_groups"]})

    def _named(self) -> dict[str, torch.optim.Optimizer]:
        return {"muon": self._muon, "adam": self._adam}
