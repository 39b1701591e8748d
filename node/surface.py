"""What HTTP asks of the node, answered by the parts that know: `node.http.services.NodeServices`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager

import msgspec
import trio

from mesh.errors import BadRequest
from mesh.ids import ModelId, NodeId, StreamId
from mesh.versions import named, versions
from mesh.view import ModelCard, View
from node.entry.canary import Canary
from node.entry.entry import Entry
from node.ops.keys import MeshKeys
from node.ops.status import status
from node.reports import DoctorReport, RequestReport, RotationReport, StatusReport
from node.requests import GenerateEvent, GenerateRequest
from node.serving.peer_models import PeerModels
from rag.embed import Embedder
from rag.service import Documents
from routing.loading import BeingLoaded

EMBED_BATCH = 16  # texts a worker thread takes at a time, so that many clients share it
EMBEDDER_CONTEXT = 256  # tokens; MiniLM reads no further
EMBEDDER_ID = ModelId("all-MiniLM-L6-v2")


class Surface:
    """Delegates; decides nothing."""

    def __init__(
        self,
        view: Callable[[], View],
        models: PeerModels,
        entry: Entry,
        readiness: Canary,
        documents: Documents,
        embedder: Embedder,
        statistics: Callable[[], Mapping[str, object]],
        examine: Callable[[], Awaitable[DoctorReport]],
        keys: MeshKeys | None,
    ) -> None:
        self._view = view
        self._models = models
        self._entry = entry
        self._readiness = readiness
        self._documents = documents
        self._embedder = embedder
        self.statistics = statistics
        self._examine = examine
        self._keys = keys
        self._embedding = trio.CapacityLimiter(1)
        self.create_store = documents.create_store
        self.stores = documents.stores
        self.store = documents.store
        self.delete_store = documents.delete_store
        self.put_file = documents.put_file
        self.files = documents.files
        self.file = documents.file
        self.delete_file = documents.delete_file
        self.attach = documents.attach
        self.detach = documents.detach
        self.store_files = documents.store_files
        self.search = documents.search

    @property
    def me(self) -> NodeId:
        return self._view().me

    def status(self) -> StatusReport:
        missing = self._readiness.missing_layers()
        view = self._view()
        complete = {ModelId(version.name): version.name not in missing for version in versions(view)}
        loading, statistics = self._readiness.being_loaded(), self.statistics()
        engine, hashing = statistics.get("engine"), getattr(statistics.get("library"), "hashing", {})
        return status(view, self._documents.stores(), complete, trio.current_time(), engine, loading, hashing)

    async def examine(self) -> DoctorReport:
        return await self._examine()

    async def rotate_key(self) -> RotationReport:
        if self._keys is None:
            raise BadRequest("this mesh has no key; make one with mesh key new, and start all nodes with --key-file")
        return await self._keys.rotate()

    def models(self) -> list[ModelCard]:
        complete = set(self._models.complete())
        known = [version for version in versions(self._view()) if version.name in complete]
        chat = [msgspec.structs.replace(version.card, id=ModelId(version.name)) for version in known]
        embed = ModelCard(EMBEDDER_ID, 6, EMBEDDER_CONTEXT, self._embedder.identity, "", "embed")
        return [*sorted(chat, key=lambda card: card.id), embed]

    def named(self, model: ModelId) -> ModelId:
        version = named(self._view(), model)
        return ModelId(version.name) if version is not None else model

    def missing_layers(self) -> dict[ModelId, tuple[tuple[int, int], ...]]:
        return self._readiness.missing_layers()

    def being_loaded(self) -> dict[ModelId, BeingLoaded]:
        return self._readiness.being_loaded()

    async def ready(self) -> str | None:
        return await self._readiness.why_not()

    def generate(self, request: GenerateRequest) -> AbstractAsyncContextManager[AsyncIterator[GenerateEvent]]:
        return self._entry.generate(request)

    def explain(self, request_id: str) -> RequestReport | None:
        record = self._entry.recent.find(request_id)
        return record.report() if record is not None else None

    def cancel(self, stream: StreamId) -> bool:
        return self._entry.cancel(stream)

    async def embed(self, texts: list[str]) -> list[list[float]]:
        if not all(text.strip() for text in texts):
            raise BadRequest("an empty text has no embedding", "input")
        rows: list[list[float]] = []
        for first in range(0, len(texts), EMBED_BATCH):
            batch = texts[first : first + EMBED_BATCH]
            vectors = await trio.to_thread.run_sync(self._embedder.embed, batch, limiter=self._embedding)
            rows += vectors.tolist()
        return rows

    async def count_embed_tokens(self, texts: list[str]) -> int:
        return sum(await trio.to_thread.run_sync(self._embedder.count_tokens, texts, limiter=self._embedding))
