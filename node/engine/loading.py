"""From a directory to a stage that has shown what it can do: kernel by kernel until one passes the self-check."""

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
from node.engine.model.structure import cannot_serve, require_span, structure_of, why_it_failed
from node.engine.parallel.stage import ParallelStage


@dataclass(frozen=True)
class LoadedStage:
    """A stage, what it may claim, and how its kernel was chosen."""

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
    watch: LoadTracker | None = None,
    ranks: int = 1,
    on: torch.device = device.CPU,
    graphs: bool = True,
) -> LoadedStage:
    """Loads layers `[start, end)` with the best kernel that is right and exact here, else with the first that is right.

    `wanted`: auto, a dtype or a kernel; `quantize`: none, int8 or int4; `ranks`: worker processes that compute it together.
    `on`: the device; `graphs`: whether a GPU records its decoding steps.

    Raises:
        BadRequest: layers out of range, no kernel computes what the plain model does, or the model has not so many parts.
        WorkersLost: a worker has ended.
    """
    if not 0 <= start < end <= checkpoint.layers:
        raise BadRequest(f"expected layers within 0:{checkpoint.layers}, got {start}:{end}", param="layers")
    require_span(checkpoint, start, end, ranks)
    choice = _choice(checkpoint, wanted, quantize, ranks, on)
    inexact: Kernel | None = None
    stage: Stage | None
    reasons: list[str] = []
    with ExitStack() as tried:  # ends what is not returned, whatever happens: its workers would stay
        for kernel in choice.kernels:
            watch = watch or LoadTracker(end - start)
            stage = None
            stage = _alone(tried, checkpoint, start, end, kernel, threads, watch, ranks, on, graphs)
            wrong = _packed_and_compared(stage, watch)
            if wrong:
                reasons.append(f"{kernel.name}: {wrong}")
                continue
            if not selfcheck.looks_through_its_window(stage):
                reasons.append(f"{kernel.name}: its sliding window does not reach the attention")
                break
            if not stage.loose and selfcheck.is_exact(stage):
                tried.pop_all()
                numerics = machine.fingerprint(checkpoint.weights, kernel, threads, ranks, on, stage.constants)
                return LoadedStage(stage, numerics, _settled(choice, kernel, reasons))
            inexact = inexact or kernel
            reasons.append(f"{kernel.name}: not exact")
            if stage.loose:
                break  # whatever the kernel
        if inexact is not None:
            if stage is None or stage.kernel is not inexact:
                stage = None
                stage = _alone(tried, checkpoint, start, end, inexact, threads, watch, ranks, on, graphs)
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
    """The kernels to be tried. Raises BadRequest: there is none."""
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
    """`KERNEL: what` of several kernels, what is the same said once."""
    kernels: dict[str, list[str]] = {}
    for kernel, _, what in (reason.partition(": ") for reason in reasons):
        kernels.setdefault(what, []).append(kernel)
    return "; ".join(f"{what} ({', '.join(names)})" for what, names in kernels.items())


def _settled(choice: KernelChoice, kernel: Kernel, refused: list[str]) -> KernelChoice:
    """The choice as it came out: this kernel, after the self-check had refused those before it for these reasons."""
    return replace(choice, kernels=(kernel,), reason="; ".join(refused) or choice.reason)


def _alone(
    tried: ExitStack,
    checkpoint: Checkpoint,
    start: int,
    end: int,
    kernel: Kernel,
    threads: int,
    watch: LoadTracker | None,
    ranks: int,
    on: torch.device,
    graphs: bool,
) -> Stage:
    """A stage, not yet packed, that `tried` ends; the one before is ended, and its memory is free."""
    tried.close()
    stage = _stage(checkpoint, start, end, kernel, threads, watch, ranks, on, graphs)
    tried.callback(gc.collect)  # a stage refers to itself; a collection takes half a second, so only where one is to be freed
    tried.callback(stage.close)
    return stage


def _stage(
    checkpoint: Checkpoint,
    start: int,
    end: int,
    kernel: Kernel,
    threads: int,
    watch: LoadTracker | None,
    ranks: int,
    on: torch.device,
    graphs: bool,
) -> Stage:
    if ranks > 1:
        return ParallelStage(checkpoint, start, end, kernel, threads, ranks)
    if on != device.CPU:
        return device_stage(checkpoint, start, end, kernel, threads, watch, on, graphs)
    return LocalStage(checkpoint, start, end, kernel, threads, watch)


def _packed_and_compared(stage: Stage, watch: LoadTracker) -> str:
    """Packs the stage and compares it with the plain model; what is wrong with it, or nothing.

    Raises:
        BadRequest: the model's own code fails, whatever the kernel.
        WorkersLost: a worker has ended.
    """
    try:
        plain = selfcheck.pack_with_reference(stage)
        watch.checks()
        return "" if selfcheck.computes_like_the_plain_model(stage, plain) else "differs from the plain model"
    except (ValueError, RuntimeError) as error:  # no such kernel on this CPU, or not for these weights
        return " ".join(str(error).split())
    except (LookupError, AttributeError, TypeError, AssertionError, ArithmeticError) as error:
        raise cannot_serve(stage.checkpoint, why_it_failed(error)) from error


def bare_card(checkpoint: Checkpoint, model: ModelId) -> ModelCard:
    """The card of a model of which no weights have been read: which ones they are is not known either.

    Raises:
        BadRequest: its layers cannot be served.
    """
    return ModelCard(model, checkpoint.layers, checkpoint.max_model_len, "", "", whole_only=_whole_only(checkpoint))


def card(checkpoint: Checkpoint, model: ModelId, numerics: str) -> ModelCard:
    """The card of a model of which a span is loaded."""
    told = checkpoint.layers, checkpoint.max_model_len, checkpoint.weights, numerics
    return ModelCard(model, *told, whole_only=_whole_only(checkpoint))


def _whole_only(checkpoint: Checkpoint) -> str:
    return structure_of(checkpoint).whole_only[:300]


def kv_token_bytes(checkpoint: Checkpoint, start: int, end: int, dtype: torch.dtype, copies: int = 1) -> int:
    """Bytes of keys and values of one token in the layers `[start, end)`; `copies`: of each head, where ranks share one."""
    return sum(structure_of(checkpoint).kv_numbers[start:end]) * dtype.itemsize * copies
