"""Decoding steps that are recorded once and replayed: on a GPU as CUDA graphs, which save hundreds of kernel launches a step.

A recorded step reads its arrays and activations from tensors with fixed addresses; each run fills these first. One step is
recorded for each form (layers, rows, length of the tables); all recordings are dropped when the pools of keys and values
have moved. If recording fails, steps are computed directly and recording is not tried again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import structlog
import torch

from node.engine.paged.staging import Staging

MAX_RECORDINGS = 32  # ten buckets of rows by a few table lengths; each keeps the memory of a step's activations

log = structlog.get_logger()

Compute = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(flat arrays, activations or None) -> the step's result; the host reads none of these tensors."""

Recorder = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]
"""Takes a step over tensors with fixed addresses; returns a function that replays it and returns its result, one tensor."""


def cuda_graph(device: torch.device) -> Recorder:
    """Returns a recorder of CUDA graphs. Other threads may use the GPU meanwhile, e.g. to load another model."""

    def record(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        with torch.cuda.device(device):
            side_stream = torch.cuda.Stream()
            side_stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side_stream):
                run()  # libraries set themselves up on first use, which cannot be recorded
                run()
            torch.cuda.current_stream().wait_stream(side_stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                answer = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return answer

        return replay

    return record


def no_recording(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Records nothing: each replay computes the step anew. For devices without graphs."""
    return run


@dataclass(slots=True)
class _Recorded:
    arrays: torch.Tensor
    activations: torch.Tensor | None
    replay: Callable[[], torch.Tensor]


class RecordedSteps:
    """The recorded steps of one stage. One thread at a time may use them."""

    def __init__(self, record: Recorder, staging: Staging) -> None:
        self._record = record
        self._staging = staging
        self._steps: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._generation = 0
        self.works = True

    def __len__(self) -> int:
        return len(self._steps)

    def run(
        self, form: Hashable, generation: int, arrays: torch.Tensor, activations: torch.Tensor | None, compute: Compute
    ) -> torch.Tensor | None:
        """Returns the result of a step of this form, valid until the next one of the form; None: it cannot be recorded.

        `arrays`, `activations`: in host memory, of the same shapes for the same form. `generation`: of the pools' addresses.
        """
        if generation != self._generation:
            self._steps.clear()
            self._generation = generation
        step = self._steps.get(form)
        if step is None:
            step = self._begin(form, arrays, activations, compute)
            return None if step is None else step.replay()
        self._steps.move_to_end(form)
        self._staging.to_device(arrays, step.arrays)
        if activations is not None:
            self._staging.to_device(activations, step.activations)
        return step.replay()

    def _begin(
        self, form: Hashable, arrays: torch.Tensor, activations: torch.Tensor | None, compute: Compute
    ) -> _Recorded | None:
        device_arrays = self._staging.to_device(arrays)
        device_activations = None if activations is None else self._staging.to_device(activations)
        try:
            step = _Recorded(device_arrays, device_activations, self._record(lambda: compute(device_arrays, device_activations)))
        except (RuntimeError, NotImplementedError) as error:
            self.works = False
            self._steps.clear()
            log.warning("steps are not recorded", why=f"{type(error).__name__}: {error}"[:200])
            return None
        if len(self._steps) >= MAX_RECORDINGS:
            self._steps.popitem(last=False)
        self._steps[form] = step
        return step
