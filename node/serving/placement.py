"""Loads and serves this node's layers: the shell around `routing.placement`.

Pinned spans are loaded as configured. With `auto` the node chooses its layers when it joins, and moves later only when
`next_move` names this node: a new span is loaded and served before an old one is dropped, if there is room.

Before anything is loaded the node identifies the weights in its files. If a file is written while it is served, or has other
bytes than were hashed, the model is not served until all files have been hashed again, as it is another version then. If files
are replaced or removed, what was loaded from them is unchanged: it is served on, and nothing more is loaded, until the node is
started again or has lost a span.

A model whose files are not here is adopted as soon as peers publish it: its text side first, then, before each load, the
tensors of the span.
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

MAX_LOST_QUEUED = 64  # lost spans that wait to be loaded again; a node serves only a few spans
RELOAD_AFTER_S = 1.0  # pause before a lost span is loaded again, as the cause may end the next workers too
LOSSES_WITHIN_S = 600.0
MAX_LOSSES = 3  # within that time, of all spans together; with more, the machine is at fault and the node ends
RENEW_EVERY_S = 15.0  # between attempts to identify files that cannot be served, as they may be in the middle of being copied
SETTLE_S = 0.3  # after joining, and after each change: losses come in bursts, which are answered together

log = structlog.get_logger()


class Placement:
    """Places, loads and serves this node's spans. Raises BadRequest if layers are pinned that a model does not have."""

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
        self._wanted = tuple(holdings.wanted)  # names of models that come from peers
        self._share_bytes = holdings.share_bytes
        self._lost_in, self._lost_out = trio.open_memory_channel[SpanLost](MAX_LOST_QUEUED)
        self._losses_at: deque[float] = deque(maxlen=MAX_LOSSES + 1)
        self._changing = trio.Lock()  # one move, reload or renewal at a time
        self._replaced: dict[ModelId, trio.Event] = {}  # served models whose files are gone; set when a span has to be loaded

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Loads the models' spans, then reloads lost spans, watches the files and, with `auto`, moves; until cancelled.

        It has started when the spans that are going to be loaded have been published, of all models.

        Raises:
            BadRequest: the model cannot be served exactly.
            MeshError: the workers of spans ended again and again.
        """
        for model in self._models:
            self._publish_card(model)
        self._facts.set_intended(tuple(span for model in self._models for span in self._spans_for(model.card)))
        task_status.started()
        for model in self._models:
            await self._place(await self._identify(model))
        async with trio.open_nursery() as nursery:
            for model in self._models:
                nursery.start_soon(self._watch_files, model.card.id)
            for name in self._wanted:
                nursery.start_soon(self._adopt, name)
            nursery.start_soon(self._reload_lost)
            if self._pinned is None:
                nursery.start_soon(self._follow_view)

    def span_lost(self, lost: SpanLost) -> None:
        """Takes the news that a span's workers have ended: the span is served no longer, and is loaded again soon."""
        card = self._models.get(lost.span.model).card
        self._facts.set_serving(card, tuple(served for served in self._served(card) if served != lost.span))
        self._lost_in.send_nowait(lost)

    async def _reload_lost(self) -> None:
        async for lost in self._lost_out:
            now = trio.current_time()
            self._losses_at.append(now)
            if len(self._losses_at) > MAX_LOSSES and now - self._losses_at[0] < LOSSES_WITHIN_S:
                raise MeshError(f"workers ended {len(self._losses_at)} times in {now - self._losses_at[0]:.0f} s: {lost.reason}")
            log.warning("span.lost", model=lost.span.model, start=lost.span.start, end=lost.span.end, why=lost.reason)
            self._intend(self._models.get(lost.span.model), self._intended(lost.span.model) | {lost.span})
            await trio.sleep(RELOAD_AFTER_S)
            async with self._changing:
                try:
                    await self._load(self._models.get(lost.span.model), [lost.span])
                except WorkersLost as error:  # the workers ended while loading, which counts as another loss
                    self._lost_in.send_nowait(SpanLost(lost.span, str(error)))

    def _publish_card(self, model: ServedModel) -> None:
        # A pinned node publishes no capacity, so that no move is planned for it.
        self._facts.set_model(model.card, self._capacity[model.card.id] if self._pinned is None else None)

    async def _identify(self, model: ServedModel) -> ServedModel:
        """Identifies a model's weights; from then on the node publishes them and offers the files to peers."""
        identified = await self._library.identify(model)
        self._models.add(identified)
        self._publish_card(identified)
        return identified

    async def _adopt(self, name: ModelId) -> None:
        """Adds and places a model that peers serve, and watches its files."""
        model = await self._library.adopt(name)
        _pinned_spans(model.card, self._pinned or ())
        self._capacity[model.card.id] = capacity_layers(model, self._share_bytes)
        self._models.add(model)
        self._publish_card(model)
        log.info("model.adopted", model=model.card.id, weights=model.card.weights[:16], layers=model.card.layers)
        await self._place(model)
        await self._watch_files(model.card.id)

    # --- files that change

    async def _watch_files(self, model: ModelId) -> None:
        while True:
            change = await self._library.changed(model)
            if self._served(self._models.get(model).card) and not change.in_place:
                await self._serve_on(model, change)
            await self._withdraw(model, change)
            while not await self._renew(model):  # noqa: ASYNC110 — no event announces a change of files
                await trio.sleep(RENEW_EVERY_S)

    async def _serve_on(self, model: ModelId, change: FilesChanged) -> None:
        """Serves what is loaded of a model whose files were replaced or removed, until one of its spans is lost."""
        card = msgspec.structs.replace(self._models.get(model).card, manifest="")
        do = "what is loaded is served on as it is; start the node again to serve the files that are there now"
        log.warning("weights.replaced", model=model, weights=card.weights[:16], file=change.file, why=change.why, do=do)
        self._replaced[model] = trio.Event()
        self._models.update(card)
        self._facts.set_model(card, None)  # no capacity: the node cannot move any layer of the model
        self._intend(self._models.get(model), ())
        self._library.stop_offering(model, change)
        await self._replaced[model].wait()
        del self._replaced[model]

    async def _withdraw(self, model: ModelId, change: FilesChanged) -> None:
        """Stops serving the model, as its layers in memory may have come from the old or the new content of its files."""
        card = self._models.get(model).card
        do = "look at the disk, or at what wrote the file; the node hashes its files and serves them as the weights that they are"
        log.error("weights.changed", model=model, weights=card.weights[:16], file=change.file, why=change.why, do=do)
        served, intended = self._served(card), self._intended(model)
        self._models.update(msgspec.structs.replace(card, weights="", manifest="", numerics=""))
        unknown = self._models.get(model)
        self._facts.set_serving(
            unknown.card, ()
        )  # at once and together with the weights, so that no path uses this node for them
        self._intend(unknown, {*served, *intended})
        async with self._changing:
            for span in served:
                await trio.to_thread.run_sync(self._engine.unload, span)
            await self._library.withdraw(model, change)

    async def _renew(self, model: ModelId) -> bool:
        """Hashes the files and serves the weights that they contain now; False if these cannot be served."""
        async with self._changing:
            intended = self._intended(model)
            try:
                renewed = await self._library.renew(self._models.get(model), self._engine.inspect)
                self._models.add(renewed)
                self._publish_card(renewed)
                await (self._load(renewed, intended) if intended else self._place(renewed))
            except (BadRequest, Refused) as error:
                log.error("weights.not_served", model=model, why=str(error)[:500], next_try_in_s=RENEW_EVERY_S)
                return False
        return True

    def _spans_for(self, card: ModelCard) -> tuple[Span, ...]:
        """The spans of a model that this node should serve in the present view."""
        if self._pinned is not None:
            return _pinned_spans(card, self._pinned)
        return choose_spans(self._membership.view, self._membership.me, card, self._capacity[card.id])

    async def _place(self, model: ServedModel) -> None:
        if self._pinned is not None:
            spans = self._spans_for(model.card)
            self._intend(model, spans)
            await self._load(model, spans)
        else:
            await self._choose_and_load(model)

    async def _choose_and_load(self, model: ServedModel) -> None:
        """Chooses spans and publishes the choice, until it stays the same with the others' choices; then loads them."""
        card = model.card
        chosen: tuple[Span, ...] | None = None
        while (choice := self._spans_for(card)) != chosen:
            chosen = choice
            self._intend(model, chosen)
            await trio.sleep(SETTLE_S)
        if not chosen:
            why = "it is served whole only, and does not fit" if card.whole_only else "not one layer fits"
            log.warning("placement.no_room", model=card.id, why=f"{why} into --memory; this node serves none")
        await self._load(model, chosen)

    async def _follow_view(self) -> None:
        """Follows the view, and makes each move that is this node's."""
        version = self._membership.view.version
        while True:
            version = (await self._membership.changed(version)).version
            await trio.sleep(SETTLE_S)
            await self._membership.settled()
            for model in self._models:
                movable = model.card.weights and model.card.id not in self._replaced
                move = next_move(self._membership.view, model.card.id, card=model.card) if movable else None
                if move is not None and move.node == self._membership.me:
                    log.info("placement.move", model=model.card.id, take=_ranges(move.take), drop=_ranges(move.drop_after))
                    async with self._changing:
                        self._intend(model, move.take)
                        await self._drop(model, move.drop_first)
                        await self._load(model, move.take)
                        await self._drop(model, move.drop_after)

    def _intended(self, model: ModelId) -> set[Span]:
        return {span for span in self._facts.now.intends if span.model == model}

    def _intend(self, model: ServedModel, spans: Iterable[Span]) -> None:
        others = tuple(span for span in self._facts.now.intends if span.model != model.card.id)
        self._facts.set_intended((*others, *spans))

    async def _load(self, model: ServedModel, spans: Iterable[Span]) -> None:
        """Loads spans and publishes each as soon as it serves; nothing while the weights are unknown or the files replaced."""
        id, directory, to_load = model.card.id, model.directory, set(spans)
        for span in sorted(to_load - set(self._served(model.card))):
            weights = self._models.get(id).card.weights
            if id in self._replaced:
                self._replaced[id].set()  # ends `_serve_on`: the model is withdrawn and its files are identified again
            if not weights or id in self._replaced:
                return
            await self._library.fetch_span(model, span)
            load = partial(self._engine.load, directory, id, span.start, span.end, weights)
            loaded = await trio.to_thread.run_sync(load, abandon_on_cancel=True)
            # The engine has read the files for seconds: serve the span only if they still are what was hashed.
            if not await self._library.is_unchanged(id) or self._models.get(id).card.weights != weights:
                await trio.to_thread.run_sync(self._engine.unload, span)
                log.warning("span.not_served", model=id, why="its files changed while they were read; they are hashed again")
                return
            identified = self._models.get(id).card
            card = msgspec.structs.replace(loaded, manifest=identified.manifest, written_at_s=identified.written_at_s)
            self._models.update(card)
            self._facts.set_uncompiled(getattr(self._engine.statistics(), "uncompiled", ""))
            self._facts.set_serving(card, (*self._served(card), span))
            log.info("span.serves", model=id, start=span.start, end=span.end, weights=weights[:16], numerics=card.numerics)
        self._intend(model, self._intended(id) - to_load)

    async def _drop(self, model: ServedModel, spans: Iterable[Span]) -> None:
        """Unloads spans; publishes first that they are not served any more, so that no new path uses them."""
        for span in sorted(set(spans) & set(self._served(model.card))):
            card = self._models.get(model.card.id).card
            self._facts.set_serving(card, tuple(served for served in self._served(card) if served != span))
            await trio.to_thread.run_sync(self._engine.unload, span)
            self._facts.set_uncompiled(getattr(self._engine.statistics(), "uncompiled", ""))

    def _served(self, card: ModelCard) -> tuple[Span, ...]:
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
