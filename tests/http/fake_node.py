"""A node whose generations follow a script: what HTTP is tested against.

A script is a list of steps: an event is yielded, a number is slept (trio's clock), an exception is raised, and
`HANG` waits for ever. Each generation takes the next script; when none is left, one that says hello.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from mesh.errors import BadRequest
from mesh.ids import ModelId, NodeId, StreamId
from mesh.view import Load, ModelCard
from node.reports import DoctorReport, RequestReport, RotationReport, SelfReport, StatusReport
from node.requests import ChoiceDone, Finished, GenerateEvent, GenerateRequest, StageUse, Started, TextDelta
from rag.types import FileInfo, Passage, SearchResult, StoreInfo
from routing.loading import BeingLoaded

ME = NodeId("00000000000000aa")
CHAT, EMBED = ModelId("tiny-chat"), ModelId("tiny-embed")
SPLIT = ModelId("split-chat")  # known, but nobody holds layers 2..4
HANG = "hang"
WORDS = ("Hello", ",", " world", "!")

Step = GenerateEvent | float | BaseException | str


def started(prompt_tokens: int = 3, seed: int = 7) -> Started:
    return Started(CHAT, seed, prompt_tokens)


def finished(seq: int, *, attempts: int = 1, **fields: Any) -> Finished:
    path = (StageUse(ME, 0, 2), StageUse(NodeId("00000000000000bb"), 2, 4))
    return Finished(seq, 3, seq, 7, "exact", attempts, path, **{"cached_tokens": 2, **fields})


def saying(words: Sequence[str] = WORDS, choices: int = 1, pause_s: float = 0.0) -> list[Step]:
    """A script that gives every choice the words in turn, then an end token each."""
    script: list[Step] = [started()]
    seq = 0
    for number, word in enumerate(words):
        for choice in range(choices):
            seq += 1
            script += [pause_s, TextDelta(choice, word, (100 + number,), seq)]
    for choice in range(choices):
        seq += 1
        script.append(ChoiceDone(choice, "stop", seq, (2,)))
    return [*script, finished(seq)]


@dataclass
class FakeNode:
    scripts: list[list[Step]] = field(default_factory=list)
    requests: list[GenerateRequest] = field(default_factory=list)
    open_generations: int = 0
    left: trio.Event = field(default_factory=trio.Event)  # set whenever a generation's context is left
    begun: trio.Event = field(default_factory=trio.Event)
    not_ready: str | None = None
    loads: dict[ModelId, BeingLoaded] = field(default_factory=dict)
    stored: dict[str, tuple[FileInfo, bytes]] = field(default_factory=dict)
    store_files_by_id: dict[str, set[str]] = field(default_factory=dict)
    store_names: dict[str, str] = field(default_factory=dict)  # by id
    weights: tuple[float, float] | None = None
    cancelled: list[StreamId] = field(default_factory=list)
    failure: Exception | None = None  # what `status` raises

    @property
    def me(self) -> NodeId:
        return ME

    def status(self) -> StatusReport:
        if self.failure is not None:
            raise self.failure
        facts = ("fake", 1, "http://fake", "127.0.0.1:1", "0.1.0")
        return StatusReport(SelfReport(ME, *facts, {}, {}, {}, {}, None, False), [], [], [])

    async def examine(self) -> DoctorReport:
        return DoctorReport(ME, "fake", True, [])

    async def rotate_key(self) -> RotationReport:
        return RotationReport("0a1b2c3d", False, [ME], [])

    def models(self) -> list[ModelCard]:
        return [ModelCard(CHAT, 4, 128, "w", "n"), ModelCard(EMBED, 0, 64, "w2", "n2", kind="embed")]

    def named(self, model: ModelId) -> ModelId:
        return model

    def missing_layers(self) -> dict[ModelId, tuple[tuple[int, int], ...]]:
        return {SPLIT: ((2, 4),)}

    def being_loaded(self) -> dict[ModelId, BeingLoaded]:
        return self.loads

    async def ready(self) -> str | None:
        return self.not_ready

    @asynccontextmanager
    async def generate(self, request: GenerateRequest) -> AsyncIterator[AsyncIterator[GenerateEvent]]:
        self.requests.append(request)
        self.open_generations += 1
        self.begun.set()
        script = self.scripts.pop(0) if self.scripts else saying(choices=request.n)
        try:
            async with aclosing(self._play(script)) as events:
                yield events
        finally:
            self.open_generations -= 1
            self.left.set()

    async def _play(self, script: list[Step]) -> AsyncGenerator[GenerateEvent, None]:
        for step in script:
            if step == HANG:
                await trio.sleep_forever()
            elif isinstance(step, BaseException):
                raise step
            elif isinstance(step, float):
                await trio.sleep(step)
            else:
                assert not isinstance(step, str)
                yield step

    def explain(self, request_id: str) -> RequestReport | None:
        for request in self.requests:
            if request_id in (request.id, request.request_id):
                return RequestReport(request.id, ME, "done", 0, 1, [], [], [])
        return None

    def cancel(self, stream: StreamId) -> bool:
        self.cancelled.append(stream)
        return any(request.id == stream for request in self.requests)

    async def embed(self, texts: list[str]) -> list[list[float]]:
        return [[float(len(text)), 0.5, -0.25] for text in texts]

    async def count_embed_tokens(self, texts: list[str]) -> int:
        return sum(len(text.split()) for text in texts)

    async def create_store(self, name: str) -> StoreInfo:
        id = "vs_" + hashlib.sha256(name.encode()).hexdigest()[:24]
        self.store_names[id] = name
        self.store_files_by_id.setdefault(id, set())
        return self.store(id)

    def stores(self) -> list[StoreInfo]:
        return [self.store(id) for id in self.store_names]

    def store(self, store: str) -> StoreInfo:
        for id, name in self.store_names.items():
            if store in (id, name):
                documents = len(self.store_files_by_id[id])
                return StoreInfo(id, name, 1_700_000_000, documents, documents, 4, 3, True)
        raise BadRequest(f"no store {store!r}", "store", status=404)

    async def delete_store(self, store: str) -> None:
        id = self.store(store).id
        del self.store_names[id], self.store_files_by_id[id]

    async def put_file(self, name: str, content: bytes) -> FileInfo:
        digest = hashlib.sha256(name.encode() + b"\0" + content).hexdigest()
        file = FileInfo("file-" + digest[:24], name, len(content), 1_700_000_000 + len(self.stored), digest)
        self.stored[file.id] = (file, content)
        return file

    async def files(self) -> list[FileInfo]:
        return [file for file, _ in self.stored.values()]

    async def file(self, file_id: str) -> tuple[FileInfo, bytes]:
        if file_id not in self.stored:
            raise BadRequest(f"no file {file_id!r}", "file_id", status=404)
        return self.stored[file_id]

    async def delete_file(self, file_id: str) -> None:
        await self.file(file_id)
        del self.stored[file_id]
        for ids in self.store_files_by_id.values():
            ids.discard(file_id)

    async def attach(self, store: str, file_id: str) -> FileInfo:
        file, _ = await self.file(file_id)
        self.store_files_by_id[self.store(store).id].add(file_id)
        return file

    async def detach(self, store: str, file_id: str) -> None:
        self.store_files_by_id[self.store(store).id].discard(file_id)

    async def store_files(self, store: str) -> list[FileInfo]:
        return [self.stored[id][0] for id in sorted(self.store_files_by_id[self.store(store).id])]

    async def search(
        self, store: str, query: str, top_k: int, *, embedding_weight: float = 1.0, text_weight: float = 1.0
    ) -> SearchResult:
        self.weights = (embedding_weight, text_weight)
        found: list[Passage] = []
        for file in await self.store_files(store):
            text = self.stored[file.id][1].decode()
            if query in text:
                start = text.index(query)
                found.append(Passage(file.id, file.name, text, start, start + len(query), 1.0 / (1 + len(found))))
        return SearchResult(store, tuple(found[:top_k]), "d1", 4, 4)

    def statistics(self) -> Mapping[str, object]:
        return {"load": Load(running=self.open_generations, waiting=0)}
