"""Decoding steps that are recorded once and played again: on a GPU a CUDA graph, which spares hundreds of launches a step.

A recorded step reads its numbers and activations from tensors that stay where they are; each run fills these first. One
is recorded for each form of a step (layers, rows, length of the tables); when the pools of keys and values have moved
all are dropped. What cannot be recorded is computed as ever, and never tried again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import structlog
import torch

from node.engine.paged.staging import Staging

MAX_RECORDED = 32  # rows in ten buckets, tables in a few lengths; each holds the activations of a step

log = structlog.get_logger()

Compute = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(flat numbers, activations or None) -> the step's answer, without a look at any of them from the host."""

Recorder = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]
"""Takes a step over tensors that stay; gives what plays it again and returns its answer, always the same tensor."""


def cuda_graph(device: torch.device) -> Recorder:
    """Records on a GPU. Other threads may use the GPU meanwhile: a model that is loaded beside the engine does."""

    def record(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        with torch.cuda.device(device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                run()  # libraries set themselves up on first use, which cannot be recorded
                run()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                answer = run()

        def play() -> torch.Tensor:
            graph.replay()
            return answer

        return play

    return record


def as_it_is(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Records nothing: the step is computed anew. For devices without graphs."""
    return run


@dataclass(slots=True)
class _Recorded:
    numbers: torch.Tensor
    taken: torch.Tensor | None
    play: Callable[[], torch.Tensor]


class RecordedSteps:
    """Those of one stage. For one thread at a time."""

    def __init__(self, record: Recorder, staging: Staging) -> None:
        self._record = record
        self._staging = staging
        self._steps: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._generation = 0
        self.works = True

    def __len__(self) -> int:
        return len(self._steps)

    def run(
        self, form: Hashable, generation: int, numbers: torch.Tensor, taken: torch.Tensor | None, compute: Compute
    ) -> torch.Tensor | None:
        """The answer of a step of this form, good until the next one of it; None: it cannot be recorded.

        `numbers`, `taken`: in the host's memory, of the same shapes for the same form. `generation`: of the addresses.
        """
        if generation != self._generation:
            self._steps.clear()
            self._generation = generation
        step = self._steps.get(form)
        if step is None:
            step = self._begin(form, numbers, taken, compute)
            return None if step is None else step.play()
        self._steps.move_to_end(form)
        self._staging.up(numbers, step.numbers)
        if taken is not None:
            self._staging.up(taken, step.taken)
        return step.play()

    def _begin(self, form: Hashable, numbers: torch.Tensor, taken: torch.Tensor | None, compute: Compute) -> _Recorded | None:
        held = self._staging.up(numbers)
        activations = None if taken is None else self._staging.up(taken)
        try:
            step = _Recorded(held, activations, self._record(lambda: compute(held, activations)))
        except (RuntimeError, NotImplementedError) as error:
            self.works = False
            self._steps.clear()
            log.warning("steps are not recorded", why=f"{type(error).__name__}: {error}"[:200])
            return None
        if len(self._steps) >= MAX_RECORDED:
            self._steps.popitem(last=False)
        self._steps[form] = step
        return step
