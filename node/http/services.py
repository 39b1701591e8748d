"""What the HTTP surface asks of the node behind it: one protocol, so that HTTP is tested against a fake."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from mesh.ids import ModelId, NodeId, StreamId
from mesh.view import ModelCard
from node.reports import DoctorReport, RequestReport, RotationReport, StatusReport
from node.requests import GenerateEvent, GenerateRequest
from rag.types import FileInfo, SearchResult, StoreInfo
from routing.loading import BeingLoaded


class NodeServices(Protocol):
    @property
    def me(self) -> NodeId: ...

    def status(self) -> StatusReport:
        """The body of `GET /mesh/status`."""

    async def examine(self) -> DoctorReport:
        """The body of `GET /mesh/doctor`."""

    async def rotate_key(self) -> RotationReport:
        """Gives the mesh a new key. Raises Refused, or BadRequest where there is none, or a live node does not take part."""

    def models(self) -> list[ModelCard]:
        """Chat models that the mesh serves whole right now, and the embedder (`kind` "embed"), by id.

        A version that does not answer to its model's id has its own name as `id` (`mesh.versions`).
        """

    def named(self, model: ModelId) -> ModelId:
        """The `id` in `models` that a request means by `model`; `model` itself where there is none."""

    def missing_layers(self) -> dict[ModelId, tuple[tuple[int, int], ...]]:
        """Known models, and other versions of them, without a complete path, with their uncovered layers."""

    def being_loaded(self) -> dict[ModelId, BeingLoaded]:
        """Of models without a complete path, those of which nodes are loading missing layers now."""

    async def ready(self) -> str | None:
        """None when a canary token came through a complete path of a model; else why not."""

    def generate(self, request: GenerateRequest) -> AbstractAsyncContextManager[AsyncIterator[GenerateEvent]]:
        """Runs a request; leaving the context early frees its work on all stages.

        Raises (on entering, or from the iterator): BadRequest, Refused, NoPath, DeadlineExceeded.
        """

    def explain(self, request_id: str) -> RequestReport | None:
        """The body of `GET /mesh/requests/{id}`: by stream id or x-request-id; None when unknown here."""

    def cancel(self, stream: StreamId) -> bool: ...

    async def embed(self, texts: list[str]) -> list[list[float]]: ...

    async def count_embed_tokens(self, texts: list[str]) -> int: ...

    # documents: `store` is a store's name or its id
    async def create_store(self, name: str) -> StoreInfo: ...

    def stores(self) -> list[StoreInfo]: ...

    def store(self, store: str) -> StoreInfo:
        """Raises BadRequest with status 404 when unknown; so do the others below."""

    async def delete_store(self, store: str) -> None: ...

    async def put_file(self, name: str, content: bytes) -> FileInfo:
        """Raises BadRequest for a type that is not read, or bytes that are not text."""

    async def files(self) -> list[FileInfo]: ...

    async def file(self, file_id: str) -> tuple[FileInfo, bytes]: ...

    async def delete_file(self, file_id: str) -> None:
        """Out of every store, on every live node."""

    async def attach(self, store: str, file_id: str) -> FileInfo:
        """Chunks, embeds and indexes the file in the store; a no-op when unchanged."""

    async def detach(self, store: str, file_id: str) -> None: ...

    async def store_files(self, store: str) -> list[FileInfo]: ...

    async def search(
        self, store: str, query: str, top_k: int, *, embedding_weight: float = 1.0, text_weight: float = 1.0
    ) -> SearchResult: ...

    def statistics(self) -> Mapping[str, object]:
        """Frozen statistics of every part by name; `/metrics` is a pure function of them."""
