"""The client of a mesh: `Client` with blocking calls, `AsyncClient` under trio.

Both take the addresses of some nodes, fetch those of the others, call another node when one fails, and resume a broken stream
where a node can. `mesh.client.flow` decides all of that; the calls are in `mesh.client.api`. A client is for one thread, or for
the tasks of one trio run.
"""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeVar, Unpack, overload

from mesh.client import api as api
from mesh.client.answers import AnswerStream, AsyncAnswerStream
from mesh.client.api import ChatMessages, DocumentAdded, DocumentFile
from mesh.client.flow import ClientCore, Flow, FlowOutcome, KnownNodes, RetryBudget
from mesh.client.openai_sdk import arguments, openai_module
from mesh.client.params import ChatParams, CompletionParams
from mesh.client.transport import BlockingIo, TrioIo, connection_limits, proxied
from mesh.errors import BadRequest
from mesh.json_object import JsonObject

if TYPE_CHECKING:
    import openai

T = TypeVar("T")

DEFAULT_NODE = "http://127.0.0.1:8000"
UPLOAD_LIMIT_BYTES = 16 << 20  # a node's default limit on a body


def default_nodes() -> list[str]:
    """Returns the node URLs in `$MESH_NODE`, separated by commas; without it the default port of this machine."""
    return os.environ.get("MESH_NODE", DEFAULT_NODE).split(",")


def read_documents(paths: Iterable[str | Path]) -> Iterator[DocumentFile]:
    """Yields the files of `paths`; of a folder, all its files but hidden and oversized ones, with names that begin at the folder.

    Raises:
        BadRequest: a path does not exist or cannot be read.
    """
    for given in paths:
        path = Path(given)
        if not path.is_dir():
            yield DocumentFile(path.name, _content(path))
            continue
        root = path.resolve()
        for file in sorted(root.rglob("*")):
            inside = file.relative_to(root)
            hidden = any(part.startswith(".") for part in inside.parts)
            if not hidden and file.is_file() and file.stat().st_size < UPLOAD_LIMIT_BYTES:
                yield DocumentFile(f"{root.name}/{inside.as_posix()}", _content(file), found=True)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadRequest(f"expected a file or folder that can be read, got {str(path)!r}: {error.strerror}", "path") from None


def _caller(
    nodes: Sequence[str] | str | None, api_key: str | None, budget: RetryBudget, spread: bool, draw: Callable[[], float]
) -> ClientCore:
    urls = [nodes] if isinstance(nodes, str) else list(nodes) if nodes is not None else default_nodes()
    return ClientCore(KnownNodes(urls, draw, spread=spread), api_key, budget, draw, lambda: uuid.uuid4().hex)


class Client:
    """A client of a mesh, with blocking calls.

    nodes: URLs of some of its nodes; None: `$MESH_NODE`, else the default port on this machine.
    spread: begins each call at a random node, not at the last that answered.
    proxy: the URL of a proxy; None: no proxy, also where the environment names one, because nodes are in the same network.

    All calls raise: NoNodeAnswers, Refused (budget spent while the mesh was full), BadRequest (4xx; names the field),
    DeadlineExceeded, RemoteError; streams also PeerLost, when a stream broke and no node can resume it.
    """

    def __init__(
        self,
        nodes: Sequence[str] | str | None = None,
        api_key: str | None = None,
        *,
        budget: RetryBudget = RetryBudget(),  # noqa: B008  (frozen)
        spread: bool = False,
        draw: Callable[[], float] = random.random,
        proxy: str | None = None,
    ) -> None:
        import httpx

        self._caller = _caller(nodes, api_key, budget, spread, draw)
        self._api_key, self._proxy = api_key, proxy
        self._http = proxied(httpx.Client, proxy, limits=connection_limits())
        self.docs = Docs(self)

    def run(self, flow: Flow[T]) -> T:
        """Carries out the effects of a flow and returns its result."""
        io = BlockingIo(self._http)
        outcome: FlowOutcome = None
        try:
            while True:
                outcome = io.carry_out(flow.send(outcome))
        except StopIteration as end:
            answer: T = end.value
            return answer
        finally:
            io.close()

    @overload
    def chat(self, messages: ChatMessages, *, stream: Literal[True], **params: Unpack[ChatParams]) -> AnswerStream: ...
    @overload
    def chat(self, messages: ChatMessages, *, stream: Literal[False] = False, **params: Unpack[ChatParams]) -> JsonObject: ...
    def chat(self, messages: ChatMessages, *, stream: bool = False, **params: Unpack[ChatParams]) -> JsonObject | AnswerStream:
        """A chat completion; `params` are those of `POST /v1/chat/completions`. A text is one message of the user."""
        return self._generate(api.CHAT, api.chat_body(messages, params), stream)

    @overload
    def ask(self, question: str, store: str, *, stream: Literal[True], **params: Unpack[ChatParams]) -> AnswerStream: ...
    @overload
    def ask(self, question: str, store: str, *, stream: Literal[False] = False, **params: Unpack[ChatParams]) -> JsonObject: ...
    def ask(self, question: str, store: str, *, stream: bool = False, **params: Unpack[ChatParams]) -> JsonObject | AnswerStream:
        """A chat completion over the `top_k` best passages of a store; `mesh.client.api.citations` returns its citations."""
        return self._generate(api.CHAT, api.question_body(question, store, params), stream)

    @overload
    def complete(
        self, prompt: str | Sequence[int], *, stream: Literal[True], **params: Unpack[CompletionParams]
    ) -> AnswerStream: ...
    @overload
    def complete(
        self, prompt: str | Sequence[int], *, stream: Literal[False] = False, **params: Unpack[CompletionParams]
    ) -> JsonObject: ...
    def complete(
        self, prompt: str | Sequence[int], *, stream: bool = False, **params: Unpack[CompletionParams]
    ) -> JsonObject | AnswerStream:
        """A completion of a text, or of token ids; `params` are those of `POST /v1/completions`."""
        return self._generate(api.COMPLETIONS, api.completion_body(prompt, params), stream)

    def _generate(self, path: str, body: Mapping[str, object], stream: bool) -> JsonObject | AnswerStream:
        if stream:
            return AnswerStream(self._caller, self._http, path, body)
        return self.run(api.generate(self._caller, path, body))

    def embed(self, texts: str | Sequence[str], *, model: str | None = None) -> list[list[float]]:
        """Returns a vector for each text, in order."""
        return self.run(api.embed(self._caller, [texts] if isinstance(texts, str) else texts, model))

    def status(self) -> JsonObject:
        """Returns the mesh as the called node sees it: `self, nodes, models, stores`."""
        return self.run(api.status(self._caller))

    def models(self) -> list[JsonObject]:
        return self.run(api.models(self._caller))

    def why(self, request_id: str) -> JsonObject:
        """Returns the records of a request, by stream id or x-request-id."""
        return self.run(api.why(self._caller, request_id))

    def doctor(self) -> JsonObject:
        """Returns the faults of the mesh as the called node sees it: `healthy`, and `findings`."""
        return self.run(api.doctor(self._caller))

    def rotate_key(self) -> JsonObject:
        """Gives the mesh a new key, or completes an unfinished rotation. Returns `key` (its name), `nodes`, `not_saved`."""
        return self.run(api.rotate_key(self._caller))

    def live_node(self) -> str:
        """Returns the URL of a node that answers now."""
        return self.run(api.live_node(self._caller))

    def nodes(self) -> list[str]:
        """Returns the URLs of all nodes found so far, the next to be called first."""
        return list(self._caller.nodes.urls)

    def openai(self, **options: object) -> openai.OpenAI:
        """Returns the official client for a node that answers now; it stays with that node. `options` are its own arguments.

        Raises:
            LocalError: the `openai` package is not installed.
        """
        module = openai_module()
        given = arguments(self.live_node(), self._api_key, module.DefaultHttpxClient, self._proxy, options)
        official: openai.OpenAI = module.OpenAI(**given)
        return official

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Docs:
    """The document stores of a mesh."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def add(
        self, paths: str | Path | Iterable[str | Path], store: str, progress: Callable[[DocumentAdded], None] = lambda added: None
    ) -> list[DocumentAdded]:
        """Adds files and folders. Unchanged files are skipped; an older file of the same name is replaced."""
        documents = read_documents([paths] if isinstance(paths, str | Path) else paths)
        return self.add_documents(documents, store, progress)

    def add_documents(
        self, documents: Iterable[DocumentFile], store: str, progress: Callable[[DocumentAdded], None] = lambda added: None
    ) -> list[DocumentAdded]:
        caller, run = self._client._caller, self._client.run
        run(api.open_store(caller, store))
        held = {row["filename"]: row["id"] for row in run(api.documents(caller, store))}
        outcomes = []
        for document in documents:
            outcomes.append(run(api.add_document(caller, store, document, held)))
            progress(outcomes[-1])
        return outcomes

    def stores(self) -> list[JsonObject]:
        return self._client.run(api.stores(self._client._caller))

    def list(self, store: str) -> Sequence[JsonObject]:
        """Returns the documents of a store, each with `id` and `filename`."""
        return self._client.run(api.documents(self._client._caller, store))

    def search(self, store: str, query: str, *, top_k: int = 5) -> Sequence[JsonObject]:
        """Returns the best passages: `file_id, filename, score, content`."""
        return self._client.run(api.search(self._client._caller, store, query, top_k))

    def remove(self, store: str, names: str | Sequence[str]) -> Sequence[str]:
        """Removes documents, given by file name or id, from a store. Returns the removed ids."""
        return self._client.run(api.remove(self._client._caller, store, [names] if isinstance(names, str) else names))


class AsyncClient:
    """`Client` under trio: the same methods with `await`; streams are read with `async for` inside `async with`."""

    def __init__(
        self,
        nodes: Sequence[str] | str | None = None,
        api_key: str | None = None,
        *,
        budget: RetryBudget = RetryBudget(),  # noqa: B008  (frozen)
        spread: bool = False,
        draw: Callable[[], float] = random.random,
        proxy: str | None = None,
    ) -> None:
        import httpx

        self._caller = _caller(nodes, api_key, budget, spread, draw)
        self._api_key, self._proxy = api_key, proxy
        self._http = proxied(httpx.AsyncClient, proxy, limits=connection_limits())
        self.docs = AsyncDocs(self)

    async def run(self, flow: Flow[T]) -> T:
        """Carries out the effects of a flow and returns its result."""
        io = TrioIo(self._http)
        outcome: FlowOutcome = None
        try:
            while True:
                outcome = await io.carry_out(flow.send(outcome))
        except StopIteration as end:
            answer: T = end.value
            return answer
        finally:
            await io.aclose()

    @overload
    async def chat(self, messages: ChatMessages, *, stream: Literal[True], **params: Unpack[ChatParams]) -> AsyncAnswerStream: ...
    @overload
    async def chat(
        self, messages: ChatMessages, *, stream: Literal[False] = False, **params: Unpack[ChatParams]
    ) -> JsonObject: ...
    async def chat(
        self, messages: ChatMessages, *, stream: bool = False, **params: Unpack[ChatParams]
    ) -> JsonObject | AsyncAnswerStream:
        """A chat completion; `params` are those of `POST /v1/chat/completions`. A text is one message of the user."""
        return await self._generate(api.CHAT, api.chat_body(messages, params), stream)

    @overload
    async def ask(
        self, question: str, store: str, *, stream: Literal[True], **params: Unpack[ChatParams]
    ) -> AsyncAnswerStream: ...
    @overload
    async def ask(
        self, question: str, store: str, *, stream: Literal[False] = False, **params: Unpack[ChatParams]
    ) -> JsonObject: ...
    async def ask(
        self, question: str, store: str, *, stream: bool = False, **params: Unpack[ChatParams]
    ) -> JsonObject | AsyncAnswerStream:
        """A chat completion over the `top_k` best passages of a store; `mesh.client.api.citations` returns its citations."""
        return await self._generate(api.CHAT, api.question_body(question, store, params), stream)

    @overload
    async def complete(
        self, prompt: str | Sequence[int], *, stream: Literal[True], **params: Unpack[CompletionParams]
    ) -> AsyncAnswerStream: ...
    @overload
    async def complete(
        self, prompt: str | Sequence[int], *, stream: Literal[False] = False, **params: Unpack[CompletionParams]
    ) -> JsonObject: ...
    async def complete(
        self, prompt: str | Sequence[int], *, stream: bool = False, **params: Unpack[CompletionParams]
    ) -> JsonObject | AsyncAnswerStream:
        """A completion of a text, or of token ids; `params` are those of `POST /v1/completions`."""
        return await self._generate(api.COMPLETIONS, api.completion_body(prompt, params), stream)

    async def _generate(self, path: str, body: Mapping[str, object], stream: bool) -> JsonObject | AsyncAnswerStream:
        if stream:
            return AsyncAnswerStream(self._caller, self._http, path, body)
        return await self.run(api.generate(self._caller, path, body))

    async def embed(self, texts: str | Sequence[str], *, model: str | None = None) -> list[list[float]]:
        return await self.run(api.embed(self._caller, [texts] if isinstance(texts, str) else texts, model))

    async def status(self) -> JsonObject:
        return await self.run(api.status(self._caller))

    async def models(self) -> list[JsonObject]:
        return await self.run(api.models(self._caller))

    async def why(self, request_id: str) -> JsonObject:
        return await self.run(api.why(self._caller, request_id))

    async def doctor(self) -> JsonObject:
        return await self.run(api.doctor(self._caller))

    async def rotate_key(self) -> JsonObject:
        return await self.run(api.rotate_key(self._caller))

    async def live_node(self) -> str:
        return await self.run(api.live_node(self._caller))

    def nodes(self) -> list[str]:
        return list(self._caller.nodes.urls)

    async def openai(self, **options: object) -> openai.AsyncOpenAI:
        module = openai_module()
        given = arguments(await self.live_node(), self._api_key, module.DefaultAsyncHttpxClient, self._proxy, options)
        official: openai.AsyncOpenAI = module.AsyncOpenAI(**given)
        return official

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()


class AsyncDocs:
    """`Docs` under trio."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def add(self, paths: str | Path | Iterable[str | Path], store: str) -> list[DocumentAdded]:
        import trio

        given = [paths] if isinstance(paths, str | Path) else list(paths)
        documents = await trio.to_thread.run_sync(lambda: list(read_documents(given)))
        caller, run = self._client._caller, self._client.run
        await run(api.open_store(caller, store))
        held = {row["filename"]: row["id"] for row in await run(api.documents(caller, store))}
        return [await run(api.add_document(caller, store, document, held)) for document in documents]

    async def stores(self) -> list[JsonObject]:
        return await self._client.run(api.stores(self._client._caller))

    async def list(self, store: str) -> Sequence[JsonObject]:
        return await self._client.run(api.documents(self._client._caller, store))

    async def search(self, store: str, query: str, *, top_k: int = 5) -> Sequence[JsonObject]:
        return await self._client.run(api.search(self._client._caller, store, query, top_k))

    async def remove(self, store: str, names: str | Sequence[str]) -> Sequence[str]:
        return await self._client.run(api.remove(self._client._caller, store, [names] if isinstance(names, str) else names))
