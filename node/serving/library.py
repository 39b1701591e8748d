"""The files of this node's models: which weights they are, what peers may have of them, and what has to come from peers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import msgspec
import structlog
import trio

from mesh.errors import BadRequest, Refused
from mesh.ids import ModelId
from mesh.view import ModelCard, Span, View
from mesh.wire.calls import Call
from node.checkpoints.capacity import layers_within
from node.checkpoints.safetensors_header import INDEX, unreadable
from node.serving.models import ServedModel
from node.text.tokenizer import ModelText
from node.weights.catalogue import Catalogue, IdentifiedWeights, identify
from node.weights.fetching import RETRY_S, FetchedModel, Fetching
from node.weights.hashing import HashingProgress, stamps_of
from node.weights.record import FileChange, FileStamp, changed_file
from node.weights.source import WeightsSource
from node.weights.store import MARK, PulledModel
from node.weights.verifying import Differs, FilesChanged, FileVerifier, VerifyingStatistics

TELL_EVERY_S = 5.0  # of the hashing, in the log
GIB = 1 << 30

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class HashingState:
    """How far the hashing of one model's files has come."""

    bytes_done: int
    bytes: int


@dataclass(frozen=True, slots=True)
class LibraryStatistics:
    verifying: VerifyingStatistics
    hashing: Mapping[str, HashingState]  # by model: what is under way


@dataclass(slots=True)
class _Held:
    """What is known of one model's files. `verified`: every byte was read since this node started."""

    catalogue: Catalogue
    differs: Differs
    verified: bool
    pulled: PulledModel | None = None


class ModelLibrary:
    """`folder`: of the node's own; records and what is fetched are kept there. `rate_bytes_s`: see `WeightsSource`."""

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
        self._verifier = FileVerifier(serving)
        self._held: dict[ModelId, _Held] = {}
        self._hashing: dict[ModelId, HashingProgress] = {}
        self._doubted: set[ModelId] = set()  # models of which the record proved wrong
        self.faults: dict[ModelId, str] = {}  # by model: what its files were found to be since the start; the newest

    def statistics(self) -> LibraryStatistics:
        hashing = {str(model): HashingState(each.bytes_done, each.bytes) for model, each in self._hashing.items()}
        return LibraryStatistics(self._verifier.statistics(), MappingProxyType(hashing))

    def share_ready(self, model: ModelId) -> float | None:
        """The share of the model's files that is hashed, or has come from peers; None: neither is under way."""
        progress = self._hashing.get(model)
        if progress is None:
            return self.fetching.share_here(model)
        return progress.bytes_done / progress.bytes if progress.bytes else 0.0

    def hashing(self) -> list[str]:
        """Says of each model whose files are being hashed how far that has come."""
        return [
            f"the files of {model} are being hashed, {each.bytes_done / GIB:.2f} of {each.bytes / GIB:.2f} GiB"
            for model, each in self._hashing.items()
        ]

    # --- which weights

    async def identify(self, model: ServedModel) -> ServedModel:
        """Finds out which weights the model's directory holds; its card says so, and peers may fetch them from now on.

        From the record beside the files, else by hashing every byte in threads: a second a gigabyte and thread.

        Raises:
            BadRequest: a damaged file, one that cannot be read, or files that change all the time.
        """
        if model.fetched is not None:
            return await self._keep(model, model.fetched.files)
        if (model.directory / MARK).is_file():
            try:
                pulled = await trio.to_thread.run_sync(PulledModel.at, model.directory)
            except OSError as error:
                raise unreadable(Path(error.filename or model.directory), error) from None
            return await self._keep(model, pulled)
        directory = model.directory
        found = await self._hash(model.card.id, directory)
        held = _Held(found.catalogue, lambda: _change(directory, found.files), verified=not found.kept)
        return await self._offer(model, held, found.written_at_s)

    async def _hash(self, model: ModelId, directory: Path) -> IdentifiedWeights:
        progress = self._hashing[model] = HashingProgress()
        failure: BadRequest | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell, model, progress)
                try:
                    work = partial(identify, directory, self._folder / "manifests", progress, afresh=model in self._doubted)
                    found = await trio.to_thread.run_sync(work, abandon_on_cancel=True)
                    self._doubted.discard(model)
                except BadRequest as error:  # raised behind the nursery, which would put it into a group
                    failure = error
                except OSError as error:
                    failure = unreadable(Path(error.filename or directory), error)
                nursery.cancel_scope.cancel()
        finally:
            progress.stop.set()
            del self._hashing[model]
        if failure is not None:
            raise failure
        return found

    async def _keep(self, model: ServedModel, pulled: PulledModel) -> ServedModel:
        held = _Held(pulled.catalogue, pulled.differs, verified=False, pulled=pulled)
        return await self._offer(model, held, model.card.written_at_s)

    async def _offer(self, model: ServedModel, held: _Held, written_at_s: int) -> ServedModel:
        weights = held.catalogue.id
        is_fit = await trio.to_thread.run_sync(held.catalogue.is_fit_for_peers)
        self._held[model.card.id] = held
        if is_fit:
            self.source.add(held.catalogue)
        else:
            log.warning("weights.not_offered", model=model.card.id, why="its manifest is out of bounds for peers")
        log.info("weights.known", model=model.card.id, weights=weights[:16], from_record=not held.verified)
        manifest = weights if is_fit else ""
        card = msgspec.structs.replace(model.card, weights=weights, manifest=manifest, written_at_s=written_at_s)
        return replace(model, card=card)

    async def _tell(self, model: ModelId, progress: HashingProgress) -> None:
        while True:
            await trio.sleep(TELL_EVERY_S)
            log.info("weights.hashing", model=model, mib=progress.bytes_done >> 20, of_mib=progress.bytes >> 20)

    async def changed(self, model: ModelId) -> FilesChanged:
        """Waits until the model's files are not those that were hashed: by their looks, or because other bytes were read."""
        held = self._held[model]
        change = await self._verifier.changed(held.catalogue, held.differs, verified=held.verified)
        held.verified = False
        return change

    async def is_unchanged(self, model: ModelId) -> bool:
        """Whether the files look as they did when they were hashed."""
        return await self._verifier.look(self._held[model].differs) is None

    def hand_out_no_more(self, model: ModelId, change: FilesChanged) -> None:
        """Peers get nothing of the model's files any more: they are others than its card says."""
        self.faults[model] = f"{change.why}; what was loaded before is served on until this node is started again"
        self.source.remove(self._held[model].catalogue.id)

    async def withdraw(self, model: ModelId, change: FilesChanged) -> None:
        """As `hand_out_no_more`; of files that came from peers, the changed one must come again.

        Until `identify` the model's weights are not known here.
        """
        self.hand_out_no_more(model, change)
        self.faults[model] = f"{change.why}; all is hashed again and served as the weights that it is"
        self._doubted.add(model)
        held = self._held[model]
        if held.pulled is not None:
            await trio.to_thread.run_sync(_set_aside, held.pulled, change.file)

    async def renew(self, model: ServedModel, inspect: Callable[[Path, ModelId], ModelCard]) -> ServedModel:
        """Reads a model anew whose files have changed, and identifies it. `inspect`: as the engine's (*blocking*).

        Raises:
            BadRequest: it cannot be served any more; the message gives the reason.
            Refused: its text side has to come from peers, and no peer gives it now.
        """
        if model.fetched is not None:
            return await self.identify(await self.text_side(model.fetched.card))
        card = await trio.to_thread.run_sync(inspect, model.directory, model.card.id, abandon_on_cancel=True)
        text = await trio.to_thread.run_sync(ModelText.load, model.directory, abandon_on_cancel=True)
        return await self.identify(ServedModel(card, model.directory, text))

    # --- from peers

    async def adopt(self, name: ModelId) -> ServedModel:
        """A model by a name that requests could ask for; waits for peers that hand it out. Its text side is here afterwards.

        Raises:
            BadRequest: its tokenizer cannot be read, or the disk has no room.
        """
        while True:
            card = await self.fetching.wait_for(name)
            try:
                return await self.identify(await self.text_side(card))
            except Refused as refused:  # its peers went, or are busy
                log.info("weights.waiting", model=name, why=str(refused))
                await trio.sleep(RETRY_S)

    async def text_side(self, card: ModelCard) -> ServedModel:
        """Tokenizer, template and configs of a model that peers hand out.

        Raises:
            Refused: no live peer gives its manifest now.
            BadRequest: the tokenizer cannot be read, or the disk has no room.
        """
        return await self.read(await self.fetching.text_side(card))

    async def read(self, fetched: FetchedModel) -> ServedModel:
        """The model whose text side is here. Raises BadRequest: its tokenizer cannot be read."""
        text = await trio.to_thread.run_sync(ModelText.load, fetched.files.directory, abandon_on_cancel=True)
        return ServedModel(fetched.card, fetched.files.directory, text, fetched)

    async def bring(self, model: ServedModel, span: Span) -> None:
        """Sees to it that the span's tensors are here. Raises BadRequest as `Fetching.span`."""
        if model.fetched is not None:
            await self.fetching.span(model.fetched, span.start, span.end)


def _change(directory: Path, before: tuple[FileStamp, ...]) -> FileChange | None:
    """A file of a whole model's directory that looks otherwise now, is gone, or has come beside the others (*blocking*)."""
    if (change := changed_file(directory, before)) is not None:
        return change
    try:
        new = {stamp.name for stamp in stamps_of(directory)} - {stamp.name for stamp in before}
    except (OSError, BadRequest):
        new = {INDEX}  # it leads elsewhere now
    return FileChange(min(new), in_place=False) if new else None


def _set_aside(pulled: PulledModel, name: str) -> None:
    pulled.set_aside(name)
    while (change := pulled.differs()) is not None:
        pulled.set_aside(change.file)


def capacity_layers(model: ServedModel, memory_bytes: int) -> int:
    """Layers of a model from peers that `memory_bytes` have room for."""
    assert model.fetched is not None
    return layers_within(model.fetched.parameters, model.card.layers, memory_bytes)
