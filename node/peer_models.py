"""Finds the model that a request is for: one of this node's own, else one that peers serve.

To take a request a node needs of its model the tokenizer, the chat template and the generation config, no weights. Where
only peers hold the model these small files are fetched from them when the first request names it, checked by the hash of
the model's manifest and kept in the data directory. So every node answers for every model of the mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
import trio

from mesh.errors import BadRequest, ModelLoading, Refused
from mesh.ids import ModelId
from mesh.view import ModelCard, View
from node.load_watch import eta_s
from node.models import Models, ServedModel, unknown_model
from node.weights.fetching import Fetched, announced
from node.weights.library import Library
from routing.loading import no_path
from routing.path import uncovered

MAX_TEXT_BYTES = 128 << 20  # of one model; the largest vocabularies take some 40 MiB
MAX_MODELS = 16  # whose text side is kept in memory: the one that was asked for longest ago goes
WAIT_S = 8.0  # for the files, of one request: a client that streams takes ten seconds of silence for a death
FAILED_FOR_S = 30.0  # a disk that is full, or files that are too large, are not tried again sooner

log = structlog.get_logger()


@dataclass(slots=True)
class _TextSide:
    """One model's text files as they come, and what was read from them."""

    manifest: str
    begun_at: float
    came: trio.Event = field(default_factory=trio.Event)  # whole, or failed
    fetched: Fetched | None = None
    failure: str = ""
    failed_at: float = 0.0
    reading: trio.Lock = field(default_factory=trio.Lock)
    model: ServedModel | None = None


class PeerModels:
    """`own`: the models that this node was given; they go before those of peers."""

    def __init__(self, view: Callable[[], View], own: Models, library: Library) -> None:
        self._view, self._own, self._library = view, own, library
        self._texts: dict[ModelId, _TextSide] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Owns the fetches: a request that ends does not end what the next one needs too."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def cards(self) -> dict[ModelId, ModelCard]:
        """Of all models that the mesh knows of, complete or not; this node's own cards before those of peers."""
        return {**self._view().models(), **{card.id: card for card in self._own.cards()}}

    def complete(self) -> list[ModelId]:
        """Models with a path through all layers, this node's own first."""
        view, own = self._view(), [card.id for card in self._own.cards()]
        found = [card.id for card in self.cards().values() if not uncovered(view, card.id, card.layers)]
        return sorted(found, key=lambda model: (own.index(model) if model in own else len(own), model))

    async def get(self, model: ModelId | None) -> ServedModel:
        """The model with its text side; None: this node's first one, else the first of the mesh.

        Raises:
            BadRequest: no live node knows it (404, model_not_found).
            NoPath: layers of it are missing. ModelLoading, while they load or while its files are fetched.
            Refused: its files cannot be had here, for a reason that may pass.
        """
        if self._own.knows(model):
            return self._own.get(model)
        view, known = self._view(), self.cards()
        id = model if model is not None else next(iter(self.complete()), None)
        if id is None or id not in known:
            raise unknown_model(model, known)
        if missing := uncovered(view, id, known[id].layers):
            raise no_path(view, id, missing)
        text = self._text_side(view, id)
        with trio.move_on_after(WAIT_S):
            await text.came.wait()
        if text.fetched is None:
            raise self._not_here(id, text)
        async with text.reading:  # requests that come together read it once
            if text.model is None:
                text.model = await self._library.read(text.fetched)
        return text.model

    def _text_side(self, view: View, model: ModelId) -> _TextSide:
        """The fetch under way or done of what peers tell now; begun here if there is none."""
        card = announced(view, model)
        if card is None:
            raise ModelLoading(model, (), 0.0, 1.0, tuple(_knowing(view, model)))
        now, text = trio.current_time(), self._texts.pop(model, None)
        failed_long_ago = text is not None and bool(text.failure) and now - text.failed_at >= FAILED_FOR_S
        if text is None or text.manifest != card.manifest or failed_long_ago:
            text = _TextSide(card.manifest, now)
            assert self._nursery is not None, "PeerModels.run must be running"
            self._nursery.start_soon(self._fetch, model, text)
        self._texts[model] = text  # behind all others: it was asked for last
        while len(self._texts) > MAX_MODELS:
            del self._texts[next(iter(self._texts))]
        return text

    async def _fetch(self, model: ModelId, text: _TextSide) -> None:
        try:
            text.fetched = await self._library.fetching.text_side(model, MAX_TEXT_BYTES)
        except BadRequest as error:
            log.warning("model.text_not_fetched", model=model, why=str(error))
            text.failure, text.failed_at = str(error), trio.current_time()
        text.came.set()

    def _not_here(self, model: ModelId, text: _TextSide) -> ModelLoading | Refused:
        if text.failure:
            return Refused(f"this node cannot take requests for {model}: {text.failure}", FAILED_FOR_S)
        share = self._library.fetching.share_here(model) or 0.0
        left_s = eta_s(share, trio.current_time() - text.begun_at)
        return ModelLoading(model, (), share, left_s, tuple(_knowing(self._view(), model)))


def _knowing(view: View, model: ModelId) -> list[str]:
    """Names of live peers that tell of the model."""
    return sorted(peer.name or peer.id for peer in view.live() if any(card.id == model for card in peer.facts.models))
