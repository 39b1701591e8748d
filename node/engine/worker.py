"""The built-in engine: one thread that plans, computes and delivers step after step.

The lock is held for planning and committing only, never while a model computes, so the trio thread's calls return
in microseconds. Decisions are the scheduler's; here they meet tensors. Models are loaded in the caller's thread and
shared with the engine thread once they are whole.
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
from node.engine.activations import hidden_outputs, not_finite, received, spoiled, without
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
from node.engine.model.stored_tensors import require_tensors
from node.engine.model.structure import structure_of
from node.engine.page_transfer import PageTransfer, shown_layout
from node.engine.sampling.constraints import Constraints, draw
from node.engine.scheduling.scheduler import Scheduler
from node.engine.scheduling.sequence import StageSequence
from node.engine.scheduling.step_plan import HeldSpan, SchedulerStatistics, StepPlan
from node.engine.scheduling.step_timing import StepTiming
from node.engine.step_inputs import compute

KV_SHARE = 0.25  # of free memory, where nothing is configured: several nodes may share a machine

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    scheduler: SchedulerStatistics
    isa: str
    threads: int
    kernels: dict[Span, str]  # span -> name of its linear kernel and the instructions it runs on, `mesh-bf16 on amx`
    choices: dict[Span, KernelChoice]  # why that kernel
    uncompiled: str  # why a span is computed on the CPU without the compiled kernel; empty: none is
    numerics: dict[Span, str]
    parameters: dict[Span, int]
    prefill_tokens: int
    decode_tokens: int
    step_failures: int
    bad_activations_total: int  # sequences of which a peer sent what is no finite number
    numeric_failures_total: int  # sequences of which finite activations became what is no finite number here
    loading: dict[Span, LoadProgress]
    spill: SpillStatistics


class TorchEngine:
    """Implements `Engine` on torch: on CPUs, or on a GPU."""

    def __init__(self, config: EngineConfig) -> None:
        self._device = device.chosen(config.device)
        device.prepare(self._device)
        self._config = config
        self._lock = threading.Condition()
        self._scheduler = Scheduler(config.step_tokens, config.max_sequences, config.speculates)
        self._loaded: dict[Span, LoadedStage] = {}
        self._cards: dict[Span, ModelCard] = {}
        self._pools: dict[Span, tuple[BlockPool, int]] = {}  # with the bytes of one block
        self._kv: dict[SequenceKey, SequenceKV] = {}
        self._constraints = Constraints()
        self._spill = Spill(config.spill_memory_bytes, config.spill_disk_bytes, config.spill_folder)
        self._kept: dict[Span, PageStore] = {}
        self._retired: list[PageStore] = []  # of spans that were unloaded
        self.pages = PageTransfer(self._lock, self._scheduler, self._kept)
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._undelivered: list[EngineOutput] = []
        self._loading = threading.Lock()
        self._watches: dict[Span, LoadTracker] = {}
        self._timing = StepTiming()
        self._step_failures = self._bad_activations = self._numeric_failures = 0
        self._kv_bytes = device.kv_bytes(self._device, config.kv_memory_bytes, int(psutil.virtual_memory().available * KV_SHARE))
        torch.set_num_threads(config.threads)

    # ---- life

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
        told = bare_card(checkpoint, model)
        require_tensors(checkpoint)
        return told

    def load(self, directory: Path, model: ModelId, start: int, end: int, weights: str = "") -> ModelCard:
        span = Span(model, start, end)
        with self._loading:
            if span in self._cards:
                return self._cards[span]
            torch.set_num_threads(self._config.threads)
            checkpoint = read_checkpoint(directory, weights)
            config = self._config
            watch = self._watches[span] = LoadTracker(end - start, partial(log_progress, span))
            wanted = config.dtype, config.threads, config.quantize
            try:
                loaded = load_stage(checkpoint, start, end, *wanted, watch, config.tensor_parallel, self._device, config.graphs)
            finally:
                del self._watches[span]
            plain = loaded.stage if loaded.stage.holds_kv and is_exact(loaded.numerics) else None
            layout = shown_layout(plain) if plain is not None else None  # of pages that may go to peers; those of ranks stay
            dtype, copies = loaded.stage.kernel.dtype, loaded.stage.kv_copies
            block_bytes = BLOCK_TOKENS * kv_token_bytes(checkpoint, start, end, dtype, copies)
            pool = BlockPool(max(1, self._kv_bytes // block_bytes))
            with self._lock:
                self._pools[span] = (pool, block_bytes)
                self._loaded[span] = loaded
                self._kept[span] = PageStore(span, self._spill, not loaded.stage.holds_kv)
                if layout is not None:
                    self.pages.add(span, layout, loaded.numerics)
                self._cards[span] = card(checkpoint, model, loaded.numerics)
                if end == checkpoint.layers:
                    self._constraints.serve(model, checkpoint.directory, checkpoint.vocab_size, checkpoint.end_ids)
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
                self._share_memory()
            loaded.stage.on_end(lambda reason: self._span_ended(span, loaded, reason))
            told = {"kernel": machine.named(loaded.stage.kernel), "numerics": loaded.numerics, "read": gib(watch.now.bytes)}
            log.info("span loaded", model=model, start=start, end=end, seconds=round(watch.now.seconds, 3), **told)
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
        for held in (self._loaded, self._cards, self._pools):
            held.pop(span, None)
        if span in self._kept:
            self._retired.append(self._kept.pop(span))
        self.pages.drop(span)
        self._share_memory()
        return lost

    def _span_ended(self, span: Span, loaded: LoadedStage, reason: str) -> None:
        """Its workers are gone. Reported before its sequences, so that no entry sends them here again."""
        with self._lock:
            if self._loaded.get(span) is loaded:
                self._undelivered += [SpanLost(span, reason), *self._forget_span(span)]
                self._lock.notify_all()

    def _share_memory(self) -> None:
        """Every span gets the same share of the KV memory; a shrunken pool gives no block out until it fits again."""
        rooms = {}
        for span, (pool, block_bytes) in self._pools.items():
            pool.resize(max(1, self._kv_bytes // len(self._pools) // block_bytes))
            if self._loaded[span].stage.holds_kv:  # whose pages lie with its ranks
                rooms[span] = self._spill.room_for(block_bytes // PAGES_PER_BLOCK) // len(self._pools)
        self._scheduler.fit_pages(rooms)

    # ---- sequences

    def prepare(self, sequence: OpenSequence) -> None:
        self._constraints.prepare(sequence)

    def open(self, sequence: OpenSequence) -> int:
        with self._lock:
            pages = self._scheduler.open(sequence, time.monotonic())
            self._lock.notify_all()
            return pages

    def push(self, *hidden: HiddenOut) -> None:
        with self._lock:
            for each in hidden:
                self._scheduler.push(each)
            self._lock.notify_all()

    def token(self, *drawn: TokenOut) -> None:
        with self._lock:
            now_s = time.monotonic()
            for each in drawn:
                self._scheduler.token(each.key, each.position, each.token, now_s)
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
        """Whether tokens are guessed where that pays; may be changed at any time."""
        return self._scheduler.selection.speculates

    @speculates.setter
    def speculates(self, wanted: bool) -> None:
        with self._lock:
            self._scheduler.selection.speculates = wanted

    # ---- figures

    def load_report(self) -> Load:
        with self._lock:
            timing = self._timing
            return msgspec.structs.replace(self._scheduler.load(), prefill_tok_s=timing.prefill_tok_s, step_ms=timing.step_ms)

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
                loading={span: watch.now for span, watch in list(self._watches.items())},
                spill=self._spill.statistics(),
            )

    # ---- the engine thread

    def _run(self, deliver: Deliver) -> None:
        torch.set_num_threads(self._config.threads)
        while True:
            with self._lock:
                while not (self._stopping or self._undelivered or self._retired):
                    wait_s = self._scheduler.work_at_s(now_s := time.monotonic()) - now_s
                    if wait_s <= 0.0:
                        break
                    self._lock.wait(None if wait_s == math.inf else wait_s)
                if self._stopping:
                    return
                plan = self._scheduler.plan(time.monotonic())
                outputs: list[EngineOutput] = [*self._undelivered, *plan.lost]
                self._undelivered.clear()
                loaded = self._loaded[plan.lane.span] if plan.lane is not None else None
                kept = dict(self._kept)
                retired, self._retired = self._retired, []
            for key in plan.freed:
                self._kv.pop(key, None)
                self._constraints.forget(key)
            for gone in retired:
                gone.close()
            self._move_pages(plan, kept)
            if plan.lane is not None and loaded is not None:
                outputs += self._step(plan, loaded, kept[plan.lane.span])
            if outputs:
                deliver(outputs)

    def _move_pages(self, plan: StepPlan, kept: dict[Span, PageStore]) -> None:
        for span, number in plan.dropped:
            kept[span].drop(number)
        for span, number in plan.spilling:
            if not kept[span].spill(number):
                with self._lock:
                    self._undelivered += self._scheduler.pages_lost(span, [number])

    def _step(self, plan: StepPlan, loaded: LoadedStage, kept: PageStore) -> list[EngineOutput]:
        assert plan.lane is not None
        span = plan.lane.span
        self._timing.begin(plan)
        refused: list[EngineOutput] = []
        bad: frozenset[SequenceKey] = frozenset()
        try:
            hidden = received(plan, loaded.stage.kernel.dtype) if plan.lane.start else None
            if hidden is not None and (sent := spoiled(plan, hidden)):
                refused += self._lose(plan, sent, by_previous=True)
                plan, hidden = without(plan, hidden, sent)
            if not plan.chunks:
                self._timing.give_up()
                with self._lock:
                    return [*refused, *self._scheduler.commit(plan, {})]
            out = compute(plan, loaded.stage, self._kv, kept, hidden)
            last = plan.chunks[0].sequence.last
            drawn = draw(plan, out, self._constraints) if last else {}
            bad = frozenset() if last else spoiled(plan, out)
            onward: list[EngineOutput] = [] if last else [each for each in hidden_outputs(plan, out) if each.key not in bad]
        except PageLost as error:
            log.warning("pages lost", pages=len(error.numbers), why="they are not as they were written; computed again")
            self._timing.give_up()
            with self._lock:
                return [*refused, *self._scheduler.pages_lost(span, error.numbers, plan)]
        except Exception as error:  # supervised: a background job; the step's sequences are lost, the thread lives
            log.exception("step failed", model=span.model, sequences=len(plan.chunks))
            self._timing.give_up()
            with self._lock:
                self._step_failures += 1
                if is_out_of_memory(error):
                    return [*refused, *self._scheduler.out_of_memory(plan)]
                return [*refused, *self._scheduler.fail(plan, f"the step failed: {type(error).__name__}")]
        refused += self._lose(plan, bad, by_previous=False)
        with self._lock:
            self._scheduler.selection.costs.measured(sum(chunk.count for chunk in plan.chunks), self._timing.end(plan) * 1e3)
            ended = self._scheduler.commit(plan, drawn)
            stores = self._scheduler.pages_to_store()
        self._keep(plan, stores, kept, bad | {each.key for each in ended if isinstance(each, SequenceLost)})
        return [*refused, *onward, *ended]

    def _lose(self, plan: StepPlan, keys: frozenset[SequenceKey], *, by_previous: bool) -> list[SequenceLost]:
        """Closes sequences of the step whose numbers are not finite: as they were sent by a peer, or as they came out here."""
        with self._lock:
            for key in keys:
                self._scheduler.close(key)
            self._bad_activations += len(keys) if by_previous else 0
            self._numeric_failures += 0 if by_previous else len(keys)
        return not_finite(plan, keys, by_previous=by_previous)

    def _keep(self, plan: StepPlan, stores: list[PageCopy], kept: PageStore, lost: frozenset[SequenceKey]) -> None:
        """Has pages kept; a page less costs no token. Those that worker processes keep are not looked through, so those of
        a sequence that ended in no usable numbers are not trusted.
        """
        gone = [store.number for store in kept.store_all(stores, self._kv)]
        if kept.elsewhere:
            gone += [number for chunk in plan.chunks if chunk.sequence.key in lost for number in self._pages_of(chunk.sequence)]
        if gone and plan.lane is not None:
            with self._lock:
                self._undelivered += self._scheduler.pages_lost(plan.lane.span, gone)

    def _pages_of(self, row: StageSequence) -> list[int]:
        return self._scheduler.find_pages(row.lane.span, [row.page_name(page) for page in range(row.pages_kept)])
