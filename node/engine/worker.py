"""The built-in engine: one thread that plans, computes and delivers step after step.

The lock is held for planning and committing only, never while a model computes, so calls of the trio thread return in
microseconds. The scheduler decides; this module holds the tensors. Models are loaded in the caller's thread, and the engine
thread uses them once they are complete.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import psutil
import structlog
import torch

from mesh.errors import LocalError
from mesh.ids import ModelId, StreamId
from mesh.view import Load, ModelCard, Span, is_exact
from node.engine import device
from node.engine.api import (
    Deliver,
    EngineConfig,
    EngineOutput,
    HiddenOut,
    OpenSequence,
    SequenceKey,
    SequenceLost,
    SpanLost,
    TokenOut,
)
from node.engine.faults import is_out_of_memory
from node.engine.kernels import machine
from node.engine.kernels.kernel_choice import KernelChoice, uncompiled
from node.engine.kv.blocks import BLOCK_TOKENS, BlockPool
from node.engine.kv.cache import SequenceKV
from node.engine.kv.page_store import PageLost, PageStore
from node.engine.kv.prefix_index import PAGES_PER_BLOCK, PageCopy
from node.engine.kv.spill import Spill, SpillStatistics
from node.engine.loading import LoadedStage, bare_card, card, kv_token_bytes, load_stage
from node.engine.model.checkpoint import read_checkpoint
from node.engine.model.progress import LoadProgress, LoadTracker, gib, log_progress
from node.engine.model.stage import Stage
from node.engine.model.stored_tensors import require_tensors
from node.engine.model.structure import structure_of
from node.engine.page_transfer import PageTransfer, page_layout
from node.engine.sampling.constraints import CompiledGrammars, StepSampler
from node.engine.scheduling.kv_allocator import HeldSpan
from node.engine.scheduling.scheduler import Scheduler, SchedulerStatistics
from node.engine.scheduling.sequence import StepPlan
from node.engine.scheduling.step_timing import StepTiming
from node.engine.step_tensors import (
    forward,
    hidden_outputs,
    non_finite_losses,
    non_finite_sequences,
    received_activations,
    without_sequences,
)

KV_SHARE = 0.25  # of free memory, if nothing is configured: several nodes may share a machine

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    scheduler: SchedulerStatistics
    isa: str
    threads: int
    kernels: dict[Span, str]  # span -> name of its linear kernel and the instructions it runs on, `mesh-bf16 on amx`
    choices: dict[Span, KernelChoice]  # why that kernel was chosen
    uncompiled: str  # why a span is computed on the CPU without the compiled kernel; empty: no span is
    numerics: dict[Span, str]
    parameters: dict[Span, int]
    prefill_tokens: int
    decode_tokens: int
    step_failures: int
    bad_activations_total: int  # sequences for which a peer sent numbers that are not finite
    numeric_failures_total: int  # sequences whose finite activations overflowed here
    loading: dict[Span, LoadProgress]
    spill: SpillStatistics


class TorchEngine:
    """Implements `Engine` on torch: on CPUs, or on a GPU."""

    def __init__(self, config: EngineConfig) -> None:
        self._device = device.select(config.device)
        device.configure_precision(self._device)
        self._config = config
        self._lock = threading.Condition()
        self._scheduler = Scheduler(config.step_tokens, config.max_sequences, config.speculates)
        self._loaded: dict[Span, LoadedStage] = {}
        self._cards: dict[Span, ModelCard] = {}
        self._pools: dict[Span, tuple[BlockPool, int]] = {}  # with the bytes of one block
        self._caches: dict[SequenceKey, SequenceKV] = {}
        self._sampler = StepSampler()
        self._spill = Spill(config.spill_memory_bytes, config.spill_disk_bytes, config.spill_folder)
        self._page_stores: dict[Span, PageStore] = {}
        self._retired_stores: list[PageStore] = []  # of unloaded spans, to be closed by the engine thread
        self.pages = PageTransfer(self._lock, self._scheduler.allocator, self._page_stores)
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._undelivered: list[EngineOutput] = []
        self._load_lock = threading.Lock()  # one span at a time: loading sets torch's default type
        self._trackers: dict[Span, LoadTracker] = {}
        self._timing = StepTiming()
        self._step_failures = self._bad_activations = self._numeric_failures = 0
        self._kv_bytes = device.kv_bytes(self._device, config.kv_memory_bytes, int(psutil.virtual_memory().available * KV_SHARE))
        torch.set_num_threads(config.threads)

    # ---- start and stop

    def start(self, deliver: Deliver) -> None:
        if self._thread is not None:
            raise LocalError("the engine is started already")
        self._stopping = False
        self._thread = threading.Thread(target=self._run, args=(deliver,), name="engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the engine thread after its current step (*blocking*)."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._spill.close()
        for loaded in list(self._loaded.values()):
            loaded.stage.close()

    # ---- models

    def inspect(self, directory: Path, model: ModelId) -> ModelCard:
        checkpoint = read_checkpoint(directory)
        without_weights = bare_card(checkpoint, model)
        require_tensors(checkpoint)
        return without_weights

    def load(self, directory: Path, model: ModelId, start: int, end: int, weights: str = "") -> ModelCard:
        span = Span(model, start, end)
        with self._load_lock:
            if span in self._cards:
                return self._cards[span]
            torch.set_num_threads(self._config.threads)
            checkpoint = read_checkpoint(directory, weights)
            config = self._config
            tracker = self._trackers[span] = LoadTracker(end - start, partial(log_progress, span))
            kernel_options = config.dtype, config.threads, config.quantize
            run_options = config.tensor_parallel, self._device, config.graphs
            try:
                loaded = load_stage(checkpoint, start, end, *kernel_options, tracker, *run_options)
            finally:
                del self._trackers[span]
            # Only exact pages may be exchanged with peers, and pages that worker processes hold stay there.
            stage = loaded.stage
            layout = page_layout(stage) if stage.holds_kv and is_exact(loaded.numerics) else None
            token_bytes = kv_token_bytes(checkpoint, start, end, stage.kernel.dtype, stage.kv_copies)
            block_bytes = BLOCK_TOKENS * token_bytes
            pool = BlockPool(max(1, self._kv_bytes // block_bytes))
            with self._lock:
                self._pools[span] = (pool, block_bytes)
                self._loaded[span] = loaded
                self._page_stores[span] = PageStore(span, self._spill, held_by_workers=not stage.holds_kv)
                if layout is not None:
                    self.pages.add(span, layout, loaded.numerics)
                self._cards[span] = card(checkpoint, model, loaded.numerics)
                if end == checkpoint.layers:
                    grammars = CompiledGrammars(checkpoint.directory, checkpoint.vocab_size, checkpoint.end_ids)
                    self._sampler.serve(model, grammars)
                self._scheduler.add_span(
                    span,
                    HeldSpan(
                        pool=pool,
                        layers=checkpoint.layers,
                        hidden_size=checkpoint.hidden_size,
                        vocab_size=checkpoint.vocab_size,
                        max_model_len=checkpoint.max_model_len,
                        end_ids=checkpoint.end_ids,
                        whole_only=bool(structure_of(checkpoint).whole_only),
                        exact=is_exact(loaded.numerics),
                        weights=checkpoint.weights,
                    ),
                )
                self._apply_memory_limits()
            stage.on_end(lambda reason: self._workers_ended(span, loaded, reason))
            log.info(
                "span loaded",
                model=model,
                start=start,
                end=end,
                seconds=round(tracker.now.seconds, 3),
                kernel=machine.named(stage.kernel),
                numerics=loaded.numerics,
                read=gib(tracker.now.bytes),
            )
            return card(checkpoint, model, loaded.numerics)

    def unload(self, span: Span) -> None:
        with self._lock:
            loaded = self._loaded.get(span)
            self._undelivered.extend(self._forget_span(span))
            self._lock.notify_all()
        if loaded is not None:
            loaded.stage.close()

    def _forget_span(self, span: Span) -> list[SequenceLost]:
        lost = self._scheduler.drop_span(span)
        for by_span in (self._loaded, self._cards, self._pools):
            by_span.pop(span, None)
        if span in self._page_stores:
            self._retired_stores.append(self._page_stores.pop(span))
        self.pages.drop(span)
        self._apply_memory_limits()
        return lost

    def _workers_ended(self, span: Span, loaded: LoadedStage, reason: str) -> None:
        """Unloads a span whose worker processes have ended; called in any thread."""
        with self._lock:
            # The loss of the span is delivered before those of its sequences, so that no entry opens them here again.
            if self._loaded.get(span) is loaded:
                self._undelivered += [SpanLost(span, reason), *self._forget_span(span)]
                self._lock.notify_all()

    def _apply_memory_limits(self) -> None:
        """Divides the KV memory and the spill memory evenly among the loaded spans."""
        max_spilled_pages = {}
        for span, (pool, block_bytes) in self._pools.items():
            pool.resize(max(1, self._kv_bytes // len(self._pools) // block_bytes))
            if not self._page_stores[span].held_by_workers:  # this process has no content to spill
                max_spilled_pages[span] = self._spill.capacity(block_bytes // PAGES_PER_BLOCK) // len(self._pools)
        self._scheduler.allocator.apply_limits(max_spilled_pages)

    # ---- sequences

    def prepare(self, sequence: OpenSequence) -> None:
        self._sampler.prepare(sequence)

    def open(self, sequence: OpenSequence) -> int:
        with self._lock:
            pages = self._scheduler.open(sequence, time.monotonic())
            self._lock.notify_all()
            return pages

    def push(self, *hidden: HiddenOut) -> None:
        with self._lock:
            for activations in hidden:
                self._scheduler.push(activations)
            self._lock.notify_all()

    def token(self, *drawn: TokenOut) -> None:
        with self._lock:
            now_s = time.monotonic()
            for token in drawn:
                self._scheduler.token(token.key, token.position, token.token, now_s)
            self._lock.notify_all()

    def close(self, key: SequenceKey) -> None:
        with self._lock:
            self._scheduler.close(key)
            self._lock.notify_all()

    def close_streams(self, keep: Callable[[StreamId], bool]) -> None:
        with self._lock:
            self._scheduler.close_streams(keep)
            self._lock.notify_all()

    @property
    def speculates(self) -> bool:
        """Whether next tokens are guessed where that pays; may be changed at any time."""
        return self._scheduler.selection.speculates

    @speculates.setter
    def speculates(self, enabled: bool) -> None:
        with self._lock:
            self._scheduler.selection.speculates = enabled

    @property
    def constrained_sequences(self) -> int:
        """How many sequences have a grammar state; it is freed with the step after they end."""
        return self._sampler.constrained_sequences

    def stage(self, span: Span) -> Stage:
        """Returns the stage that computes a loaded span."""
        return self._loaded[span].stage

    def stored_pages(self, span: Span) -> int:
        """How many pages of a loaded span have their content in the engine's memory."""
        return len(self._page_stores[span])

    # ---- figures

    def load_report(self) -> Load:
        with self._lock:
            timing = self._timing
            return msgspec.structs.replace(self._scheduler.load(), prefill_tok_s=timing.prefill_tok_s, step_ms=timing.step_ms)

    def has_model(self, model: ModelId) -> bool:
        with self._lock:
            return any(span.model == model for span in self._scheduler.allocator.spans)

    def room(self, model: ModelId) -> int:
        with self._lock:
            return self._scheduler.room(model)

    def overdue_s(self) -> float:
        return self._timing.overdue_s()

    def statistics(self) -> EngineStatistics:
        with self._lock:
            return EngineStatistics(
                scheduler=self._scheduler.statistics(),
                isa=machine.isa(),
                threads=self._config.threads,
                kernels={span: machine.named(loaded.stage.kernel) for span, loaded in self._loaded.items()},
                choices={span: loaded.choice for span, loaded in self._loaded.items()},
                uncompiled=uncompiled(loaded.choice for loaded in self._loaded.values()),
                numerics={span: loaded.numerics for span, loaded in self._loaded.items()},
                parameters={span: loaded.stage.parameters for span, loaded in self._loaded.items()},
                prefill_tokens=self._timing.prefill_tokens,
                decode_tokens=self._timing.decode_tokens,
                step_failures=self._step_failures,
                bad_activations_total=self._bad_activations,
                numeric_failures_total=self._numeric_failures,
                loading={span: tracker.now for span, tracker in list(self._trackers.items())},
                spill=self._spill.statistics(),
            )

    # ---- the engine thread

    def _run(self, deliver: Deliver) -> None:
        torch.set_num_threads(self._config.threads)
        while True:
            with self._lock:
                while not (self._stopping or self._undelivered or self._retired_stores):
                    wait_s = self._scheduler.work_at_s(now_s := time.monotonic()) - now_s
                    if wait_s <= 0.0:
                        break
                    self._lock.wait(None if wait_s == math.inf else wait_s)
                if self._stopping:
                    return
                plan = self._scheduler.plan(time.monotonic())
                outputs: list[EngineOutput] = [*self._undelivered, *plan.lost]
                self._undelivered.clear()
                # Taken with the plan: a span may be unloaded while its step is computed.
                loaded = self._loaded[plan.lane.span] if plan.lane is not None else None
                stores = dict(self._page_stores)
                retired, self._retired_stores = self._retired_stores, []
            for key in plan.freed:
                self._caches.pop(key, None)
                self._sampler.forget(key)
            for store in retired:
                store.close()
            self._move_pages(plan, stores)
            if plan.lane is not None and loaded is not None:
                outputs += self._step(plan, loaded, stores[plan.lane.span])
            if outputs:
                deliver(outputs)

    def _move_pages(self, plan: StepPlan, stores: dict[Span, PageStore]) -> None:
        for span, number in plan.dropped_pages:
            stores[span].drop(number)
        for span, number in plan.pages_to_spill:
            if not stores[span].spill(number):
                with self._lock:
                    self._undelivered += self._scheduler.pages_lost(span, [number])

    def _step(self, plan: StepPlan, loaded: LoadedStage, store: PageStore) -> list[EngineOutput]:
        """Computes a step and returns its outputs; a fault ends as few of its sequences as possible."""
        assert plan.lane is not None and plan.chunks
        span = plan.lane.span
        self._timing.begin(plan)
        refused: list[EngineOutput] = []
        overflowed: frozenset[SequenceKey] = frozenset()
        try:
            hidden = received_activations(plan, loaded.stage.kernel.dtype) if plan.lane.start else None
            if hidden is not None and (sent_non_finite := non_finite_sequences(plan, hidden)):
                refused += self._close_non_finite(plan, sent_non_finite, by_previous=True)
                plan, hidden = without_sequences(plan, hidden, sent_non_finite)
            if not plan.chunks:
                self._timing.discard()
                with self._lock:
                    return [*refused, *self._scheduler.commit(plan, {})]
            out = forward(plan, loaded.stage, self._caches, store, hidden)
            last = plan.chunks[0].sequence.on_last_stage  # as of all its chunks: they are of one lane
            drawn = self._sampler.draw_step(plan, out) if last else {}
            onward: list[EngineOutput] = []
            if not last:
                overflowed = non_finite_sequences(plan, out)
                onward += [output for output in hidden_outputs(plan, out) if output.key not in overflowed]
        except PageLost as error:
            log.warning("pages lost", pages=len(error.numbers), why="spilled content cannot be read; computed again")
            self._timing.discard()
            with self._lock:
                return [*refused, *self._scheduler.pages_lost(span, error.numbers, plan)]
        except Exception as error:  # supervised: a background job; the step's sequences are lost, the thread lives
            log.exception("step failed", model=span.model, sequences=len(plan.chunks))
            self._timing.discard()
            with self._lock:
                self._step_failures += 1
                if is_out_of_memory(error):
                    return [*refused, *self._scheduler.out_of_memory(plan)]
                return [*refused, *self._scheduler.fail(plan, f"the step failed: {type(error).__name__}")]
        # Closed before the commit, which then neither draws for these sequences nor keeps their pages.
        refused += self._close_non_finite(plan, overflowed, by_previous=False)
        with self._lock:
            took_ms = self._timing.end(plan) * 1e3
            self._scheduler.selection.costs.measured(sum(chunk.count for chunk in plan.chunks), took_ms)
            ended = self._scheduler.commit(plan, drawn)
            copies = self._scheduler.allocator.take_page_copies()
        lost = overflowed | {output.key for output in ended if isinstance(output, SequenceLost)}
        self._store_pages(plan, copies, store, lost)
        return [*refused, *onward, *ended]

    def _close_non_finite(self, plan: StepPlan, keys: frozenset[SequenceKey], *, by_previous: bool) -> list[SequenceLost]:
        """Closes sequences of a step with numbers that are not finite: received so (`by_previous`), or computed so here."""
        with self._lock:
            for key in keys:
                self._scheduler.close(key)
            if by_previous:
                self._bad_activations += len(keys)
            else:
                self._numeric_failures += len(keys)
        return non_finite_losses(plan, keys, by_previous=by_previous)

    def _store_pages(self, plan: StepPlan, copies: list[PageCopy], store: PageStore, lost: frozenset[SequenceKey]) -> None:
        """Stores the pages that the commit added to the index, and drops those whose content could not be stored.

        The content that worker processes hold cannot be checked here, so all pages of a lost sequence are dropped there.
        """
        assert plan.lane is not None
        dropped = [copy.number for copy in store.store_copies(copies, self._caches)]
        if store.held_by_workers:
            for chunk in plan.chunks:
                sequence = chunk.sequence
                if sequence.key in lost:
                    names = [sequence.page_name(page) for page in range(sequence.pages_kept)]
                    dropped += self._scheduler.allocator.find_pages(plan.lane.span, names)
        if dropped:
            with self._lock:
                self._undelivered += self._scheduler.pages_lost(plan.lane.span, dropped)
