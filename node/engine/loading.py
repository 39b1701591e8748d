"""Loads a span from a checkpoint: tries kernel after kernel until one passes the self-check."""

from __future__ import annotations

import gc
import secrets
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from mesh.errors import BadRequest
from mesh.ids import ModelId
from mesh.view import APPROXIMATE, ModelCard
from node.engine import device, selfcheck
from node.engine.kernels import kernel_choice, machine
from node.engine.kernels.kernel_choice import KernelChoice
from node.engine.model.checkpoint import Checkpoint, config_value
from node.engine.model.linear import Kernel
from node.engine.model.local_stage import LocalStage
from node.engine.model.paged_stage import device_stage
from node.engine.model.progress import LoadTracker
from node.engine.model.stage import Stage
from node.engine.model.structure import failure_reason, not_servable, require_span, structure_of
from node.engine.parallel.stage import ParallelStage


@dataclass(frozen=True)
class LoadedStage:
    """A loaded stage, its numerics fingerprint, and how its kernel was chosen."""

    stage: Stage
    numerics: str
    choice: KernelChoice


def load_stage(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    wanted: str,
    threads: int,
    quantize: str = "none",
    tracker: LoadTracker | None = None,
    ranks: int = 1,
    on: torch.device = device.CPU,
    graphs: bool = True,
) -> LoadedStage:
    """Loads layers `[start, end)` with the first kernel that is correct and exact here, else with the first that is correct.

    `wanted`: auto, a dtype or a kernel; `quantize`: none, int8 or int4; `ranks`: worker processes that compute it together.
    `on`: the device; `graphs`: whether a GPU records its decoding steps.

    Raises:
        BadRequest: layers out of range, no kernel matches the reference, or the model cannot be split over so many ranks.
        WorkersLost: a worker has ended.
    """
    if not 0 <= start < end <= checkpoint.layers:
        raise BadRequest(f"expected layers within 0:{checkpoint.layers}, got {start}:{end}", param="layers")
    require_span(checkpoint, start, end, ranks)
    choice = _choice(checkpoint, wanted, quantize, ranks, on)
    inexact: Kernel | None = None
    stage: Stage | None
    reasons: list[str] = []
    with ExitStack() as tried:  # closes every stage that is not returned, also after errors: its workers would live on
        for kernel in choice.kernels:
            tracker = tracker or LoadTracker(end - start)
            stage = None  # frees the memory of the stage before, of which the next one needs as much
            stage = _only_stage(tried, checkpoint, start, end, kernel, threads, tracker, ranks, on, graphs)
            fault = _pack_and_compare(stage, tracker)
            if fault:
                reasons.append(f"{kernel.name}: {fault}")
                continue
            if not selfcheck.uses_its_sliding_window(stage):
                reasons.append(f"{kernel.name}: its sliding window does not reach the attention")
                break
            if not stage.has_unpacked_weights and selfcheck.is_exact(stage):
                tried.pop_all()
                numerics = machine.fingerprint(checkpoint.weights, kernel, threads, ranks, on, stage.constants_digest)
                return LoadedStage(stage, numerics, _settled(choice, kernel, reasons))
            inexact = inexact or kernel
            reasons.append(f"{kernel.name}: not exact")
            if stage.has_unpacked_weights:
                break  # no other kernel packs them either
        if inexact is not None:
            if stage is None or stage.kernel is not inexact:
                stage = None
                stage = _only_stage(tried, checkpoint, start, end, inexact, threads, tracker, ranks, on, graphs)
                stage.pack()
            tried.pop_all()
            reasons = [*reasons[: choice.kernels.index(inexact)], "none that was tried is exact"]
            return LoadedStage(stage, APPROXIMATE + secrets.token_hex(8), _settled(choice, inexact, reasons))
    raise BadRequest(
        f"{checkpoint.directory.name} ({checkpoint.config.model_type}) failed the self-check on layers {start}:{end}: "
        f"{_in_short(reasons)}",
        param="model",
        code="model_not_servable",
    )


def _choice(checkpoint: Checkpoint, wanted: str, quantize: str, ranks: int, on: torch.device) -> KernelChoice:
    """Returns the kernels to try. Raises BadRequest: there is none."""
    device.require_servable(on, checkpoint.directory.name, checkpoint.mixture, quantize, ranks)
    widest = int(config_value(checkpoint.config, "intermediate_size") or 4 * checkpoint.hidden_size)
    try:
        if on != device.CPU:
            return KernelChoice(
                tuple(machine.gpu_candidates(wanted, checkpoint.stored_dtype)), "the first for this type on a GPU"
            )
        return kernel_choice.choose(wanted, checkpoint.stored_dtype, checkpoint.hidden_size, widest, quantize)
    except ValueError as error:
        raise BadRequest(str(error), param="dtype") from error


def _in_short(reasons: list[str]) -> str:
    """Joins reasons `KERNEL: FAULT`, each different fault once with the names of its kernels."""
    kernels: dict[str, list[str]] = {}
    for kernel, _, fault in (reason.partition(": ") for reason in reasons):
        kernels.setdefault(fault, []).append(kernel)
    return "; ".join(f"{fault} ({', '.join(names)})" for fault, names in kernels.items())


def _settled(choice: KernelChoice, kernel: Kernel, refused: list[str]) -> KernelChoice:
    """Returns the final choice: this kernel, after the self-check refused those before it for these reasons."""
    return replace(choice, kernels=(kernel,), reason="; ".join(refused) or choice.reason)


def _only_stage(
    tried: ExitStack,
    checkpoint: Checkpoint,
    start: int,
    end: int,
    kernel: Kernel,
    threads: int,
    tracker: LoadTracker | None,
    ranks: int,
    on: torch.device,
    graphs: bool,
) -> Stage:
    """Closes the stage before and frees its memory; returns a new stage, not yet packed, that `tried` closes."""
    tried.close()
    stage = _stage(checkpoint, start, end, kernel, threads, tracker, ranks, on, graphs)
    tried.callback(gc.collect)  # a stage refers to itself; collecting takes half a second, so only where a stage is freed
    tried.callback(stage.close)
    return stage


def _stage(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    kernel: Kernel,
    threads: int,
    tracker: LoadTracker | None,
    ranks: int,
    on: torch.device,
    graphs: bool,
) -> Stage:
    if ranks > 1:
        return ParallelStage(checkpoint, start, end, kernel, threads, ranks)
    if on != device.CPU:
        return device_stage(checkpoint, start, end, kernel, threads, tracker, on, graphs)
    return LocalStage(checkpoint, start, end, kernel, threads, tracker)


def _pack_and_compare(stage: Stage, tracker: LoadTracker) -> str:
    """Packs the stage and compares it with the reference; returns its fault, or an empty string.

    Raises:
        BadRequest: the model's own code fails, whatever the kernel.
        WorkersLost: a worker has ended.
    """
    try:
        reference = selfcheck.pack_with_reference(stage)
        tracker.start_checking()
        return "" if selfcheck.matches_reference(stage, reference) else "differs from the plain model"
    except (ValueError, RuntimeError) as error:  # no such kernel on this CPU, or not for these weights
        return " ".join(str(error).split())
    except (LookupError, AttributeError, TypeError, AssertionError, ArithmeticError) as error:
        raise not_servable(stage.checkpoint, failure_reason(error)) from error


def bare_card(checkpoint: Checkpoint, model: ModelId) -> ModelCard:
    """Returns the card of a model whose weights have not been read, without their identity and numerics.

    Raises:
        BadRequest: its layers cannot be served.
    """
    return ModelCard(model, checkpoint.layers, checkpoint.max_model_len, "", "", whole_only=_whole_only(checkpoint))


def card(checkpoint: Checkpoint, model: ModelId, numerics: str) -> ModelCard:
    """Returns the card of a model of which a span is loaded."""
    fields = checkpoint.layers, checkpoint.max_model_len, checkpoint.weights, numerics
    return ModelCard(model, *fields, whole_only=_whole_only(checkpoint))


def _whole_only(checkpoint: Checkpoint) -> str:
    return structure_of(checkpoint).whole_only[:300]


def kv_token_bytes(checkpoint: Checkpoint, start: int, end: int, dtype: torch.dtype, copies: int = 1) -> int:
    """Returns the bytes of one token's keys and values in the layers `[start, end)`; `copies`: ranks that store each head."""
    return sum(structure_of(checkpoint).kv_elements[start:end]) * dtype.itemsize * copies
