"""The files of this node's models: those that were here at the start are offered to peers, others come from peers as needed."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import structlog
import trio

from mesh.calls import Call
from mesh.errors import BadRequest
from mesh.ids import ModelId
from mesh.view import Span, View
from node.capacity import layers_within
from node.model_text import ModelText
from node.models import ServedModel
from node.weights.catalogue import Catalogue, HashingStopped, catalogue_of
from node.weights.fetching import Fetched, Fetching
from node.weights.source import WeightsSource

log = structlog.get_logger()


class Library:
    """`folder`: of the node's own; manifests and what is fetched are kept there. `rate_bytes_s`: see `WeightsSource`."""

    def __init__(
        self,
        view: Callable[[], View],
        changed: Callable[[int], Awaitable[View]],
        call: Call,
        folder: Path,
        serving: Callable[[], bool],
        rate_bytes_s: float | None = None,
    ) -> None:
        self._folder = folder
        self.fetching = Fetching(view, changed, call, folder)
        self.source = WeightsSource(serving, rate_bytes_s)
        self.handlers = self.source.handlers

    async def adopt(self, model: ModelId) -> ServedModel:
        """A model by the name that peers serve it under; waits for one that does. Its text side is here afterwards.

        Raises:
            BadRequest: its tokenizer cannot be read, or the disk has no room.
        """
        return await self.read(await self.fetching.text_side(model))

    async def read(self, fetched: Fetched) -> ServedModel:
        """The model whose text side is here. Raises BadRequest: its tokenizer cannot be read."""
        text = await trio.to_thread.run_sync(ModelText.load, fetched.files.directory, abandon_on_cancel=True)
        self.source.add(fetched.files.catalogue)
        return ServedModel(fetched.card, fetched.files.directory, text, fetched)

    async def bring(self, model: ServedModel, span: Span) -> None:
        """Sees to it that the span's tensors are here. Raises BadRequest as `Fetching.span`."""
        if model.fetched is not None:
            await self.fetching.span(model.fetched, span.start, span.end)

    async def offer(self, model: ServedModel) -> str:
        """Tells peers what they may fetch from here: the identity of the model's manifest; empty if its files are not fit for it.

        Takes about a second a gigabyte the first time, in a thread.
        """
        if model.fetched is not None:
            return model.fetched.files.catalogue.id
        stopping = threading.Event()
        make: Callable[[], Catalogue] = partial(
            catalogue_of, model.directory, model.card, self._folder / "manifests", stopping.is_set
        )
        try:
            catalogue = await trio.to_thread.run_sync(make, abandon_on_cancel=True)
        except (BadRequest, OSError, HashingStopped) as error:
            log.warning("weights.not_offered", model=model.card.id, why=str(error)[:200])
            return ""
        finally:
            stopping.set()
        self.source.add(catalogue)
        log.info("weights.offered", model=model.card.id, manifest=catalogue.id[:16])
        return catalogue.id


def capacity_layers(model: ServedModel, memory_bytes: int) -> int:
    """Layers of a model from peers that `memory_bytes` have room for."""
    assert model.fetched is not None
    return layers_within(model.fetched.parameters, model.card.layers, memory_bytes)
