"""Finds the model that a request is for, in the version that its name stands for: this node's own, else one that peers serve.

To answer requests for a model, an entry needs its text side (tokenizer, chat template and generation config), but no weights.
Where only peers hold the model, or that version of it, these small files are fetched from them when the first request names it,
checked by the hash of the model's manifest and kept in the data directory. So every node answers for every model of the mesh. A
prompt is made with the text side of the same weights that compute it: while that is not available, the request is refused rather
than answered by other weights.
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
MAX_MODELS = 16  # text sides kept in memory; the least recently requested is dropped
WAIT_S = 8.0  # how long a request waits for the files: a streaming client takes ten seconds of silence for a lost node
FAILED_FOR_S = 30.0  # time until a fetch that failed (full disk, files too large) is tried again

log = structlog.get_logger()


@dataclass(slots=True)
class _TextSide:
    """The text side of one version: its fetch, and the model read from it."""

    card: ModelCard
    begun_at: float
    ended: trio.Event = field(default_factory=trio.Event)  # the fetch is complete, or has failed
    fetched: FetchedModel | None = None
    failure: str = ""
    failed_at: float = 0.0
    reading: trio.Lock = field(default_factory=trio.Lock)
    model: ServedModel | None = None


class PeerModels:
    """The models of the mesh by the names that requests use. `own`: this node's models, which go before those of peers."""

    def __init__(self, view: Callable[[], View], own: ServedModels, library: ModelLibrary) -> None:
        self._view, self._own, self._library = view, own, library
        self._texts: dict[tuple[ModelId, str], _TextSide] = {}  # by id and weights
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Owns the fetches, until cancelled: a fetch goes on for later requests when the request that began it ends."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    @property
    def texts_kept(self) -> int:
        """How many text sides of peers' models are kept in memory or being fetched."""
        return len(self._texts)

    def complete(self) -> list[ModelId]:
        """Names of the versions with a path through all layers, those of this node's own models first."""
        view, own = self._view(), [card.id for card in self._own.cards()]
        found = [each for each in versions(view) if not uncovered(view, each.card.id, each.card.layers, each.card.weights)]
        first = {each.name: own.index(each.card.id) for each in found if each.card.id in own}
        return [ModelId(each.name) for each in sorted(found, key=lambda each: (first.get(each.name, len(own)), each.name))]

    async def get(self, model: ModelId | None) -> ServedModel:
        """The model with its text side, in the version that the name stands for.

        model: None for this node's first model, else the first of the mesh.

        Raises:
            BadRequest: no live node has the model (404, model_not_found).
            NoPath: no peer holds some of its layers. ModelLoading while they are loaded, or the text side is fetched.
            Refused: its text side could not be fetched, for a reason that may pass.
        """
        view = self._view()
        name = model if model is not None else self._own.default or next(iter(self.complete()), None)
        version = named(view, name) if name is not None else None
        if version is None:
            if name is not None and self._own.has(name):
                return self._own.get(name)  # this node has just started, and its own view does not contain the model yet
            raise unknown_model(model, [ModelId(each.name) for each in versions(view)])
        card = version.card
        if (own := self._own.version(card.id, card.weights)) is not None:
            return own
        if missing := uncovered(view, card.id, card.layers, card.weights):
            raise no_path(view, card.id, missing, card.weights)
        text = self._text_side(view, version)
        with trio.move_on_after(WAIT_S):
            await text.ended.wait()
        if text.fetched is None:
            raise self._not_available(version, text)
        async with text.reading:  # concurrent requests read it once
            if text.model is None:
                text.model = await self._library.read(text.fetched)
        return text.model

    def _text_side(self, view: View, version: ModelVersion) -> _TextSide:
        """The text side of a version, fetched or being fetched; starts the fetch if there is none, or it failed long ago."""
        key = version.card.id, version.card.weights
        now, text = trio.current_time(), self._texts.pop(key, None)
        failed_long_ago = text is not None and bool(text.failure) and now - text.failed_at >= FAILED_FOR_S
        if text is None or failed_long_ago:
            card = announced(view, ModelId(version.name))
            if card is None:
                raise ModelLoading(version.name, (), 0.0, 1.0, _announcing_peers(view, version))
            text = _TextSide(card, now)
            assert self._nursery is not None, "PeerModels.run must be running"
            self._nursery.start_soon(self._fetch, key, text)
        self._texts[key] = text  # at the end: the dict is in the order of the latest requests
        while len(self._texts) > MAX_MODELS:
            del self._texts[next(iter(self._texts))]
        return text

    async def _fetch(self, key: tuple[ModelId, str], text: _TextSide) -> None:
        """Fetches a text side, until it is complete, has failed, or has been dropped from memory."""
        while text.fetched is None and not text.failure and self._texts.get(key) is text:
            try:
                text.fetched = await self._library.fetching.text_side(text.card, MAX_TEXT_BYTES)
            except Refused as refused:  # no peer sends the manifest now
                log.info("model.text_waits", model=text.card.id, why=str(refused))
                await trio.sleep(RETRY_S)
            except BadRequest as error:
                log.warning("model.text_not_fetched", model=text.card.id, why=str(error))
                text.failure, text.failed_at = str(error), trio.current_time()
        text.ended.set()

    def _not_available(self, version: ModelVersion, text: _TextSide) -> ModelLoading | Refused:
        if text.failure:
            return Refused(f"this node cannot take requests for {version.name}: {text.failure}", FAILED_FOR_S)
        share = self._library.fetching.share_here(version.card.id) or 0.0
        left_s = eta_s(share, trio.current_time() - text.begun_at)
        return ModelLoading(version.name, (), share, left_s, _announcing_peers(self._view(), version))


def _announcing_peers(view: View, version: ModelVersion) -> tuple[str, ...]:
    """Names of live peers whose cards contain the version."""
    return tuple(sorted(view.peers[node].name or node for node in version.known_to if node in view.peers))
