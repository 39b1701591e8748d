"""Finds the model that a request is for, in the version that it means: one of this node's own, else one that peers serve.

To take a request a node needs of its model the tokenizer, the chat template and the generation config, no weights. Where
only peers hold the model, or the weights that are meant, these small files are fetched from them when the first request
names it, checked by the hash of the model's manifest and kept in the data directory. So every node answers for every model
of the mesh. A prompt is made with the text side of the very weights that compute it: while that cannot be had the request
is refused, and not answered by other weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import structlog
import trio

from mesh.errors import BadRequest, ModelLoading, Refused
from mesh.ids import ModelId
from mesh.versions import ModelVersion, named, versions
from mesh.view import ModelCard, View
from node.serving.library import ModelLibrary
from node.serving.load_state import eta_s
from node.serving.models import ServedModel, ServedModels, unknown_model
from node.weights.fetching import RETRY_S, FetchedModel, announced
from routing.loading import no_path
from routing.path import uncovered

MAX_TEXT_BYTES = 128 << 20  # of one model; the largest vocabularies take some 40 MiB
MAX_MODELS = 16  # whose text side is kept in memory: the one that was asked for longest ago goes
WAIT_S = 8.0  # for the files, of one request: a client that streams takes ten seconds of silence for a death
FAILED_FOR_S = 30.0  # a disk that is full, or files that are too large, are not tried again sooner

log = structlog.get_logger()


@dataclass(slots=True)
class _TextSide:
    """One version's text files as they come, and what was read from them."""

    card: ModelCard
    begun_at: float
    came: trio.Event = field(default_factory=trio.Event)  # whole, or failed
    fetched: FetchedModel | None = None
    failure: str = ""
    failed_at: float = 0.0
    reading: trio.Lock = field(default_factory=trio.Lock)
    model: ServedModel | None = None


class PeerModels:
    """`own`: the models that this node was given; they go before those of peers."""

    def __init__(self, view: Callable[[], View], own: ServedModels, library: ModelLibrary) -> None:
        self._view, self._own, self._library = view, own, library
        self._texts: dict[tuple[ModelId, str], _TextSide] = {}  # by id and weights
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Owns the fetches: a request that ends does not end what the next one needs too."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def complete(self) -> list[ModelId]:
        """Names of versions with a path through all layers: those of this node's own models first."""
        view, own = self._view(), [card.id for card in self._own.cards()]
        found = [each for each in versions(view) if not uncovered(view, each.card.id, each.card.layers, each.card.weights)]
        first = {each.name: own.index(each.card.id) for each in found if each.card.id in own}
        return [ModelId(each.name) for each in sorted(found, key=lambda each: (first.get(each.name, len(own)), each.name))]

    async def get(self, model: ModelId | None) -> ServedModel:
        """The model with its text side, in the version that a request means by this name.

        None: this node's first model, else the first of the mesh.

        Raises:
            BadRequest: no live node knows it (404, model_not_found).
            NoPath: layers of it are missing. ModelLoading, while they load or while its files are fetched.
            Refused: its files cannot be had here, for a reason that may pass.
        """
        view = self._view()
        name = model if model is not None else self._own.default or next(iter(self.complete()), None)
        version = named(view, name) if name is not None else None
        if version is None:
            if name is not None and self._own.knows(name):
                return self._own.get(name)  # this node has only just begun, and its own view does not tell of it yet
            raise unknown_model(model, [ModelId(each.name) for each in versions(view)])
        card = version.card
        if (own := self._own.version(card.id, card.weights)) is not None:
            return own
        if missing := uncovered(view, card.id, card.layers, card.weights):
            raise no_path(view, card.id, missing, card.weights)
        text = self._text_side(view, version)
        with trio.move_on_after(WAIT_S):
            await text.came.wait()
        if text.fetched is None:
            raise self._not_here(version, text)
        async with text.reading:  # requests that come together read it once
            if text.model is None:
                text.model = await self._library.read(text.fetched)
        return text.model

    def _text_side(self, view: View, version: ModelVersion) -> _TextSide:
        """The fetch of these weights' text side, under way or done; begun here if there is none."""
        key = version.card.id, version.card.weights
        now, text = trio.current_time(), self._texts.pop(key, None)
        failed_long_ago = text is not None and bool(text.failure) and now - text.failed_at >= FAILED_FOR_S
        if text is None or failed_long_ago:
            card = announced(view, ModelId(version.name))
            if card is None:
                raise ModelLoading(version.name, (), 0.0, 1.0, _knowing(view, version))
            text = _TextSide(card, now)
            assert self._nursery is not None, "PeerModels.run must be running"
            self._nursery.start_soon(self._fetch, key, text)
        self._texts[key] = text  # behind all others: it was asked for last
        while len(self._texts) > MAX_MODELS:
            del self._texts[next(iter(self._texts))]
        return text

    async def _fetch(self, key: tuple[ModelId, str], text: _TextSide) -> None:
        """Until it is here, cannot be had, or is asked for no more."""
        while text.fetched is None and not text.failure and self._texts.get(key) is text:
            try:
                text.fetched = await self._library.fetching.text_side(text.card, MAX_TEXT_BYTES)
            except Refused as refused:  # no peer gives the manifest just now
                log.info("model.text_waits", model=text.card.id, why=str(refused))
                await trio.sleep(RETRY_S)
            except BadRequest as error:
                log.warning("model.text_not_fetched", model=text.card.id, why=str(error))
                text.failure, text.failed_at = str(error), trio.current_time()
        text.came.set()

    def _not_here(self, version: ModelVersion, text: _TextSide) -> ModelLoading | Refused:
        if text.failure:
            return Refused(f"this node cannot take requests for {version.name}: {text.failure}", FAILED_FOR_S)
        share = self._library.fetching.share_here(version.card.id) or 0.0
        left_s = eta_s(share, trio.current_time() - text.begun_at)
        return ModelLoading(version.name, (), share, left_s, _knowing(self._view(), version))


def _knowing(view: View, version: ModelVersion) -> tuple[str, ...]:
    """Names of live peers that tell of the version."""
    return tuple(sorted(view.peers[node].name or node for node in version.known_to if node in view.peers))
