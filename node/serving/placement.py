"""Which layers this node serves: the shell around `routing.placement`.

Pinned spans are loaded as they are told. With `auto` the node chooses when it joins and moves later only
when the view gives it the move: a new span is loaded and served before an old one is dropped.

Before anything is loaded the node finds out which weights its files are. A file that is written while it is served, or
proves to hold other bytes than were hashed, ends the service of its model until all is hashed again: it is another version
then. Where files are replaced or removed, what was loaded from them stays as it was: it is served on, and nothing more is
loaded, until the node is started again or has lost a span.

A model that was named but whose files are not here is taken up as soon as peers tell of it: its text side first, then,
before each load, the tensors of the span.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import partial

import msgspec
import structlog
import trio

from membership.shell.service import Membership
from mesh.errors import BadRequest, MeshError, Refused
from mesh.ids import ModelId
from mesh.view import ModelCard, Span
from node.config import pinned_spans
from node.engine.api import Engine, SpanLost
from node.engine.parallel.worker_group import WorkersLost
from node.serving.library import ModelLibrary, capacity_layers
from node.serving.models import InitialModels, ServedModel
from node.serving.own_facts import OwnFacts
from node.weights.verifying import FilesChanged
from routing.placement import choose_spans, next_move

MENDED_AT_ONCE = 64  # spans that were lost and wait to be loaded again; a node holds a handful
MEND_AFTER_S = 1.0  # whatever took the workers may be about to take the next ones
LOSSES_WITHIN_S = 600.0
MAX_LOSSES = 3  # within that time, of all spans together: beyond it the machine is at fault, and the node ends
RENEW_EVERY_S = 15.0  # files that cannot be served as they are may be in the middle of being copied
SETTLE_S = 0.3  # after joining, and after each change: cuts come in bursts, and one answer to all of them is enough

log = structlog.get_logger()


class Placement:
    """Raises BadRequest when layers are pinned that a model does not have."""

    def __init__(
        self,
        layers: str,
        engine: Engine,
        holdings: InitialModels,
        facts: OwnFacts,
        membership: Membership,
        library: ModelLibrary,
    ) -> None:
        self._pinned = pinned_spans(layers)
        for model in holdings.models:
            _pinned_spans(model.card, self._pinned or ())
        self._engine = engine
        self._models = holdings.models
        self._capacity = dict(holdings.capacity)
        self._facts = facts
        self._membership = membership
        self._library = library
        self._wanted = tuple(holdings.wanted)
        self._share_bytes = holdings.share_bytes
        self._lost_in, self._lost_out = trio.open_memory_channel[SpanLost](MENDED_AT_ONCE)
        self._losses_at: deque[float] = deque(maxlen=MAX_LOSSES + 1)
        self._changing = trio.Lock()  # a move and a mend do not mix
        self._outlived: dict[ModelId, trio.Event] = {}  # models in service whose files are gone; set: a span has to be loaded

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Loads what is to be served, hands files to peers, and goes on until cancelled: mending, with `auto` also moving.

        It has started when peers are told what will be loaded, of all models.

        Raises:
            BadRequest: the model cannot be served exactly.
            MeshError: the workers of spans ended again and again.
        """
        for model in self._models:
            self._know(model)
        self._facts.intend(tuple(span for model in self._models for span in self._wanted_of(model.card)))
        task_status.started()
        for model in self._models:
            await self._hold(await self._identify(model))
        async with trio.open_nursery() as nursery:
            for model in self._models:
                nursery.start_soon(self._watch_files, model.card.id)
            for name in self._wanted:
                nursery.start_soon(self._adopt, name)
            nursery.start_soon(self._mend)
            if self._pinned is None:
                nursery.start_soon(self._follow)

    def lost(self, lost: SpanLost) -> None:
        """A span's workers have ended: it is not served any more, and is loaded again soon."""
        card = self._models.get(lost.span.model).card
        self._facts.serve(card, tuple(held for held in self._held(card) if held != lost.span))
        self._lost_in.send_nowait(lost)

    async def _mend(self) -> None:
        async for lost in self._lost_out:
            now = trio.current_time()
            self._losses_at.append(now)
            if len(self._losses_at) > MAX_LOSSES and now - self._losses_at[0] < LOSSES_WITHIN_S:
                raise MeshError(f"workers ended {len(self._losses_at)} times in {now - self._losses_at[0]:.0f} s: {lost.reason}")
            log.warning("span.lost", model=lost.span.model, start=lost.span.start, end=lost.span.end, why=lost.reason)
            self._intend(self._models.get(lost.span.model), self._intended(lost.span.model) | {lost.span})
            await trio.sleep(MEND_AFTER_S)
            async with self._changing:
                try:
                    await self._take(self._models.get(lost.span.model), [lost.span])
                except WorkersLost as error:  # while they loaded: another loss, and counted so
                    self._lost_in.send_nowait(SpanLost(lost.span, str(error)))

    def _know(self, model: ServedModel) -> None:
        # A pinned node tells no capacity: the mesh must not count on it for a move that it will not make.
        self._facts.know(model.card, self._capacity[model.card.id] if self._pinned is None else None)

    async def _identify(self, model: ServedModel) -> ServedModel:
        """From here on the node says which weights it has, and hands them to peers."""
        identified = await self._library.identify(model)
        self._models.add(identified)
        self._know(identified)
        return identified

    async def _adopt(self, name: ModelId) -> None:
        """Takes up a model that peers serve."""
        model = await self._library.adopt(name)
        _pinned_spans(model.card, self._pinned or ())
        self._capacity[model.card.id] = capacity_layers(model, self._share_bytes)
        self._models.add(model)
        self._know(model)
        log.info("model.adopted", model=model.card.id, weights=model.card.weights[:16], layers=model.card.layers)
        await self._hold(model)
        await self._watch_files(model.card.id)

    # --- files that change

    async def _watch_files(self, model: ModelId) -> None:
        while True:
            change = await self._library.changed(model)
            if self._held(self._models.get(model).card) and not change.in_place:
                await self._outlive(model, change)
            await self._withdraw(model, change)
            while not await self._renew(model):  # noqa: ASYNC110 — files tell of no change
                await trio.sleep(RENEW_EVERY_S)

    async def _outlive(self, model: ModelId, change: FilesChanged) -> None:
        """Serves what is loaded, whose files are no longer there, until a span of it is lost."""
        card = msgspec.structs.replace(self._models.get(model).card, manifest="")
        do = "what is loaded is served on as it is; start the node again to serve the files that are there now"
        log.warning("weights.replaced", model=model, weights=card.weights[:16], file=change.file, why=change.why, do=do)
        self._outlived[model] = trio.Event()
        self._models.update(card)
        self._facts.know(card, None)  # it cannot move
        self._intend(self._models.get(model), ())
        self._library.hand_out_no_more(model, change)
        await self._outlived[model].wait()
        del self._outlived[model]

    async def _withdraw(self, model: ModelId, change: FilesChanged) -> None:
        """Serves nothing of the model any more: its layers in memory may be of either content."""
        card = self._models.get(model).card
        do = "look at the disk, or at what wrote the file; the node hashes its files and serves them as the weights that they are"
        log.error("weights.changed", model=model, weights=card.weights[:16], file=change.file, why=change.why, do=do)
        held, intended = self._held(card), self._intended(model)
        self._models.update(msgspec.structs.replace(card, weights="", manifest="", numerics=""))
        unknown = self._models.get(model)
        self._facts.serve(unknown.card, ())  # at once, with its weights: no request comes here for them any more
        self._intend(unknown, {*held, *intended})
        async with self._changing:
            for span in held:
                await trio.to_thread.run_sync(self._engine.unload, span)
            await self._library.withdraw(model, change)

    async def _renew(self, model: ModelId) -> bool:
        """Hashes the files and serves what they are now; False: they cannot be served as they are."""
        async with self._changing:
            intended = self._intended(model)
            try:
                renewed = await self._library.renew(self._models.get(model), self._engine.inspect)
                self._models.add(renewed)
                self._know(renewed)
                await (self._take(renewed, intended) if intended else self._hold(renewed))
            except (BadRequest, Refused) as error:
                log.error("weights.not_served", model=model, why=str(error)[:500], next_try_in_s=RENEW_EVERY_S)
                return False
        return True

    def _wanted_of(self, card: ModelCard) -> tuple[Span, ...]:
        """What this node should hold of the model as things are now."""
        if self._pinned is not None:
            return _pinned_spans(card, self._pinned)
        return choose_spans(self._membership.view, self._membership.me, card, self._capacity[card.id])

    async def _hold(self, model: ServedModel) -> None:
        if self._pinned is not None:
            spans = self._wanted_of(model.card)
            self._intend(model, spans)
            await self._take(model, spans)
        else:
            await self._join(model)

    async def _join(self, model: ServedModel) -> None:
        """Chooses, tells what it chose, and looks again until the others' choices have been heard: then loads."""
        card = model.card
        chosen: tuple[Span, ...] | None = None
        while (again := self._wanted_of(card)) != chosen:
            chosen = again
            self._intend(model, chosen)
            await trio.sleep(SETTLE_S)
        if not chosen:
            why = "it is served whole only, and does not fit" if card.whole_only else "not one layer fits"
            log.warning("placement.no_room", model=card.id, why=f"{why} into --memory; this node serves none")
        await self._take(model, chosen)

    async def _follow(self) -> None:
        """Moves when the view says that this node should."""
        version = self._membership.view.version
        while True:
            version = (await self._membership.changed(version)).version
            await trio.sleep(SETTLE_S)
            await self._membership.settled()
            for model in self._models:
                settled = model.card.weights and model.card.id not in self._outlived
                move = next_move(self._membership.view, model.card.id, card=model.card) if settled else None
                if move is not None and move.node == self._membership.me:
                    log.info("placement.move", model=model.card.id, take=_ranges(move.take), drop=_ranges(move.drop_after))
                    async with self._changing:
                        self._intend(model, move.take)
                        await self._drop(model, move.drop_first)
                        await self._take(model, move.take)
                        await self._drop(model, move.drop_after)

    def _intended(self, model: ModelId) -> set[Span]:
        return {span for span in self._facts.now.intends if span.model == model}

    def _intend(self, model: ServedModel, spans: Iterable[Span]) -> None:
        others = tuple(span for span in self._facts.now.intends if span.model != model.card.id)
        self._facts.intend((*others, *spans))

    async def _take(self, model: ServedModel, spans: Iterable[Span]) -> None:
        """Loads the spans, and tells of each as soon as it serves. Nothing is loaded while the weights are not known."""
        id, directory, wanted = model.card.id, model.directory, set(spans)
        for span in sorted(wanted - set(self._held(model.card))):
            weights = self._models.get(id).card.weights
            if id in self._outlived:
                self._outlived[id].set()
            if not weights or id in self._outlived:
                return
            await self._library.bring(model, span)
            load = partial(self._engine.load, directory, id, span.start, span.end, weights)
            loaded = await trio.to_thread.run_sync(load, abandon_on_cancel=True)
            if not await self._library.is_unchanged(id) or self._models.get(id).card.weights != weights:
                await trio.to_thread.run_sync(self._engine.unload, span)
                log.warning("span.not_served", model=id, why="its files changed while they were read; they are hashed again")
                return
            known = self._models.get(id).card
            card = msgspec.structs.replace(loaded, manifest=known.manifest, written_at_s=known.written_at_s)
            self._models.update(card)
            self._facts.compute_uncompiled(getattr(self._engine.statistics(), "uncompiled", ""))
            self._facts.serve(card, (*self._held(card), span))
            log.info("span.serves", model=id, start=span.start, end=span.end, weights=weights[:16], numerics=card.numerics)
        self._intend(model, self._intended(id) - wanted)

    async def _drop(self, model: ServedModel, spans: Iterable[Span]) -> None:
        """Tells first that the spans are gone, so that nothing new comes for them."""
        for span in sorted(set(spans) & set(self._held(model.card))):
            card = self._models.get(model.card.id).card
            self._facts.serve(card, tuple(held for held in self._held(card) if held != span))
            await trio.to_thread.run_sync(self._engine.unload, span)
            self._facts.compute_uncompiled(getattr(self._engine.statistics(), "uncompiled", ""))

    def _held(self, card: ModelCard) -> tuple[Span, ...]:
        return tuple(span for span in self._facts.now.spans if span.model == card.id)


def _pinned_spans(card: ModelCard, pinned: Iterable[tuple[int, int]]) -> tuple[Span, ...]:
    for start, end in pinned:
        if end > card.layers:
            raise BadRequest(f"--layers {start}:{end}: {card.id} has the layers 0:{card.layers}", "layers")
        if card.whole_only and (start, end) != (0, card.layers):
            raise BadRequest(
                f"--layers {start}:{end}: {card.id} is served whole only, for {card.whole_only}; give --layers auto, "
                f"0:{card.layers} or none",
                "layers",
            )
    return tuple(Span(card.id, start, end) for start, end in pinned)


def _ranges(spans: Iterable[Span]) -> list[str]:
    return [f"{span.start}:{span.end}" for span in spans]
