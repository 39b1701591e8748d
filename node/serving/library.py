"""The files of this node's models: identifies their weights, offers them to peers, and fetches what is missing from peers."""

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

LOG_EVERY_S = 5.0  # progress of the hashing
GIB = 1 << 30

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class HashingState:
    """Progress of the hashing of one model's files."""

    bytes_done: int
    bytes: int


@dataclass(frozen=True, slots=True)
class LibraryStatistics:
    verifying: VerifyingStatistics
    hashing: Mapping[str, HashingState]  # by model, while its files are hashed


@dataclass(slots=True)
class _ModelFiles:
    """One model's identified files. `verified`: every byte was read since this node started."""

    catalogue: Catalogue
    differs: Differs
    verified: bool
    pulled: PulledModel | None = None


class ModelLibrary:
    """Identifies, offers and fetches model files.

    folder: the node's own, for records and fetched files. serving: whether requests run here. rate_bytes_s: see `WeightsSource`.
    """

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
        self._files: dict[ModelId, _ModelFiles] = {}
        self._hashing: dict[ModelId, HashingProgress] = {}
        self._record_is_wrong: set[ModelId] = set()  # models whose files did not match their record
        self.faults: dict[ModelId, str] = {}  # by model: the latest change or damage found in its files since the start

    def statistics(self) -> LibraryStatistics:
        hashing = {str(model): HashingState(each.bytes_done, each.bytes) for model, each in self._hashing.items()}
        return LibraryStatistics(self._verifier.statistics(), MappingProxyType(hashing))

    def share_ready(self, model: ModelId) -> float | None:
        """The share of the model's files that has been hashed, or fetched from peers; None if neither is under way."""
        progress = self._hashing.get(model)
        if progress is None:
            return self.fetching.share_here(model)
        return progress.bytes_done / progress.bytes if progress.bytes else 0.0

    def hashing(self) -> list[str]:
        """A sentence for each model whose files are being hashed, with the progress."""
        return [
            f"the files of {model} are being hashed, {each.bytes_done / GIB:.2f} of {each.bytes / GIB:.2f} GiB"
            for model, each in self._hashing.items()
        ]

    # --- identification

    async def identify(self, model: ServedModel) -> ServedModel:
        """Identifies the weights in a model's directory. Returns the model with them in its card; peers may fetch them now.

        By the record beside the files, else by hashing every byte in threads: a second for a gigabyte and thread.

        Raises:
            BadRequest: a damaged file, one that cannot be read, or files that change all the time.
        """
        if model.fetched is not None:
            return await self._identify_fetched(model, model.fetched.files)
        if (model.directory / MARK).is_file():
            try:
                pulled = await trio.to_thread.run_sync(PulledModel.at, model.directory)
            except OSError as error:
                raise unreadable(Path(error.filename or model.directory), error) from None
            return await self._identify_fetched(model, pulled)
        directory = model.directory
        found = await self._hash(model.card.id, directory)
        files = _ModelFiles(found.catalogue, lambda: _change(directory, found.files), verified=not found.kept)
        return await self._offer(model, files, found.written_at_s)

    async def _hash(self, model: ModelId, directory: Path) -> IdentifiedWeights:
        progress = self._hashing[model] = HashingProgress()
        failure: BadRequest | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._log_progress, model, progress)
                try:
                    work = partial(
                        identify, directory, self._folder / "manifests", progress, afresh=model in self._record_is_wrong
                    )
                    found = await trio.to_thread.run_sync(work, abandon_on_cancel=True)
                    self._record_is_wrong.discard(model)
                except BadRequest as error:  # raised after the nursery, which would wrap it in an exception group
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

    async def _identify_fetched(self, model: ServedModel, pulled: PulledModel) -> ServedModel:
        files = _ModelFiles(pulled.catalogue, pulled.differs, verified=False, pulled=pulled)
        return await self._offer(model, files, model.card.written_at_s)

    async def _offer(self, model: ServedModel, files: _ModelFiles, written_at_s: int) -> ServedModel:
        weights = files.catalogue.id
        is_fit = await trio.to_thread.run_sync(files.catalogue.is_fit_for_peers)
        self._files[model.card.id] = files
        if is_fit:
            self.source.add(files.catalogue)
        else:
            log.warning("weights.not_offered", model=model.card.id, why="its manifest is out of bounds for peers")
        log.info("weights.known", model=model.card.id, weights=weights[:16], from_record=not files.verified)
        manifest = weights if is_fit else ""
        card = msgspec.structs.replace(model.card, weights=weights, manifest=manifest, written_at_s=written_at_s)
        return replace(model, card=card)

    async def _log_progress(self, model: ModelId, progress: HashingProgress) -> None:
        while True:
            await trio.sleep(LOG_EVERY_S)
            log.info("weights.hashing", model=model, mib=progress.bytes_done >> 20, of_mib=progress.bytes >> 20)

    async def changed(self, model: ModelId) -> FilesChanged:
        """Waits until the model's files differ from those that were hashed: in size, time or inode, or in their bytes."""
        files = self._files[model]
        change = await self._verifier.changed(files.catalogue, files.differs, verified=files.verified)
        files.verified = False
        return change

    async def is_unchanged(self, model: ModelId) -> bool:
        """Whether the files have the size, time and inode that they had when they were hashed."""
        return await self._verifier.look(self._files[model].differs) is None

    def stop_offering(self, model: ModelId, change: FilesChanged) -> None:
        """Stops offering the model's files to peers, as they are not the weights of its card any more."""
        self.faults[model] = f"{change.why}; what was loaded before is served on until this node is started again"
        self.source.remove(self._files[model].catalogue.id)

    async def withdraw(self, model: ModelId, change: FilesChanged) -> None:
        """As `stop_offering`; a changed file that came from peers is set aside, to be fetched again.

        The model's weights are unknown until `identify`.
        """
        self.stop_offering(model, change)
        self.faults[model] = f"{change.why}; all is hashed again and served as the weights that it is"
        self._record_is_wrong.add(model)
        pulled = self._files[model].pulled
        if pulled is not None:
            await trio.to_thread.run_sync(_set_aside, pulled, change.file)

    async def renew(self, model: ServedModel, inspect: Callable[[Path, ModelId], ModelCard]) -> ServedModel:
        """Reads and identifies a model whose files have changed. `inspect`: as `Engine.inspect` (*blocking*).

        Raises:
            BadRequest: the model cannot be served any more; the message gives the reason.
            Refused: its text side has to be fetched from peers, and no peer sends it now.
        """
        if model.fetched is not None:
            return await self.identify(await self.text_side(model.fetched.card))
        card = await trio.to_thread.run_sync(inspect, model.directory, model.card.id, abandon_on_cancel=True)
        text = await trio.to_thread.run_sync(ModelText.load, model.directory, abandon_on_cancel=True)
        return await self.identify(ServedModel(card, model.directory, text))

    # --- from peers

    async def adopt(self, name: ModelId) -> ServedModel:
        """Fetches the text side of a model by a name that requests use, and identifies it; waits for peers that offer it.

        Raises:
            BadRequest: its tokenizer cannot be read, or the disk is full.
        """
        while True:
            card = await self.fetching.wait_for(name)
            try:
                return await self.identify(await self.text_side(card))
            except Refused as refused:  # its peers have left, or are busy
                log.info("weights.waiting", model=name, why=str(refused))
                await trio.sleep(RETRY_S)

    async def text_side(self, card: ModelCard) -> ServedModel:
        """Fetches and reads tokenizer, template and configs of a model that peers offer.

        Raises:
            Refused: no live peer sends its manifest now.
            BadRequest: the tokenizer cannot be read, or the disk is full.
        """
        return await self.read(await self.fetching.text_side(card))

    async def read(self, fetched: FetchedModel) -> ServedModel:
        """Reads a model whose text side has been fetched. Raises BadRequest if its tokenizer cannot be read."""
        text = await trio.to_thread.run_sync(ModelText.load, fetched.files.directory, abandon_on_cancel=True)
        return ServedModel(fetched.card, fetched.files.directory, text, fetched)

    async def fetch_span(self, model: ServedModel, span: Span) -> None:
        """Fetches the span's tensors if they are to come from peers. Raises BadRequest as `Fetching.span`."""
        if model.fetched is not None:
            await self.fetching.span(model.fetched, span.start, span.end)


def _change(directory: Path, before: tuple[FileStamp, ...]) -> FileChange | None:
    """The first file of a complete model's directory that was changed, removed or added (*blocking*); None if there is none."""
    if (change := changed_file(directory, before)) is not None:
        return change
    try:
        new = {stamp.name for stamp in stamps_of(directory)} - {stamp.name for stamp in before}
    except (OSError, BadRequest):
        new = {INDEX}  # the index names other files now
    return FileChange(min(new), in_place=False) if new else None


def _set_aside(pulled: PulledModel, name: str) -> None:
    pulled.set_aside(name)
    while (change := pulled.differs()) is not None:
        pulled.set_aside(change.file)


def capacity_layers(model: ServedModel, memory_bytes: int) -> int:
    """The number of layers of a model from peers that fit into `memory_bytes`."""
    assert model.fetched is not None
    return layers_within(model.fetched.parameters, model.card.layers, memory_bytes)
