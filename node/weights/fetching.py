"""Fetches a model that this node has no files of from the peers that hand it out: the shell around `node.weights.pull`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import structlog
import trio

from mesh.errors import BadRequest, MeshError, Refused
from mesh.ids import ModelId
from mesh.manifest import (
    MANIFEST_KIND,
    MAX_MANIFEST_BYTES,
    NOT_HELD,
    PIECE_KIND,
    BadManifest,
    Manifest,
    TensorEntry,
    decode,
    is_identity,
    tensors_of_span,
)
from mesh.versions import card_of, named
from mesh.view import ModelCard, Peer, View
from mesh.wire.calls import CALL_FAILURES, Call
from node.weights.pull import (
    ASK_TIMEOUT_S,
    AskFailed,
    AskPiece,
    HashMismatch,
    NotHeld,
    PieceKept,
    Pull,
    PullDone,
    PullEffect,
    PullEvent,
    PullStatistics,
    SourcesChanged,
)
from node.weights.store import PulledModel, WrongPiece

CALL_TIMEOUT_S = 2 * ASK_TIMEOUT_S  # an answer that comes late is still worth keeping
RETRY_S = 1.0  # to look again for a manifest that no peer gave
TELL_EVERY_S = 5.0  # of progress, in the log

log = structlog.get_logger()
Changed = Callable[[int], Awaitable[View]]


@dataclass(frozen=True, slots=True)
class FetchingStatistics:
    """`of`: what the pulls under way have to fetch, and have; totals since the start."""

    pulls: int = 0
    bytes_all: int = 0
    bytes_kept: int = 0
    bytes_fetched_total: int = 0
    retries_total: int = 0
    lies_total: int = 0


@dataclass(frozen=True, slots=True)
class FetchedModel:
    """A model whose text side is here. `card`: as peers tell it, without their numerics."""

    card: ModelCard
    files: PulledModel

    @property
    def parameters(self) -> int:
        return self.files.manifest.parameters


class Fetching:
    """`folder`: where pulled models are kept, one directory a manifest."""

    def __init__(self, view: Callable[[], View], changed: Changed, call: Call, folder: Path) -> None:
        self._view, self._changed, self._call = view, changed, call
        self._folder = folder
        self._disk = trio.CapacityLimiter(1)
        self._pulls: dict[int, Pull] = {}
        self._pulled: dict[int, ModelId] = {}  # the model of each
        self._files: dict[str, PulledModel] = {}  # by weights
        self._opening: dict[str, trio.Lock] = {}  # by weights: of one model only one pull of the text side
        self._totals = FetchingStatistics()
        self._last_pull = 0

    def statistics(self) -> FetchingStatistics:
        now = [pull.statistics() for pull in self._pulls.values()]
        return replace(
            self._totals,
            pulls=len(now),
            bytes_all=sum(each.bytes_all for each in now),
            bytes_kept=sum(each.bytes_kept for each in now),
            **_sums(self._totals, now),
        )

    def share_here(self, model: ModelId) -> float | None:
        """Of the bytes that are being fetched of the model, the share that is here; None: nothing is being fetched."""
        pulls = [self._pulls[number].statistics() for number, each in self._pulled.items() if each == model]
        all_bytes = sum(pull.bytes_all for pull in pulls)
        return sum(pull.bytes_kept for pull in pulls) / all_bytes if all_bytes else None

    # --- a model's text side

    async def wait_for(self, name: ModelId) -> ModelCard:
        """Waits until peers hand out the version that `name` means, as a request would mean it."""
        waits = False
        while True:
            view = self._view()
            card = announced(view, name)
            if card is not None:
                return card
            if not waits:  # the view changes with every member and load: one line is enough
                log.info("weights.waiting", model=name, why="no live peer hands out this model's files yet", known=_known(view))
                waits = True
            await self._changed(view.version)

    async def text_side(self, card: ModelCard, limit_bytes: int | None = None) -> FetchedModel:
        """Fetches manifest, configs and tokenizer of a version, as far as they are not here. Calls share the files.

        Raises:
            Refused: no peer gave the manifest.
            BadRequest: the disk has no room, or cannot be written; the files are larger than `limit_bytes` together.
        """
        if not is_identity(card.weights):
            reason = "its nodes are hashing their files, or run an earlier release"
            raise Refused(f"which weights {card.id} has is not known yet: {reason}", RETRY_S)
        async with self._opening.setdefault(card.weights, trio.Lock()):
            files = self._files.get(card.weights) or await self._open(card)
            texts = files.manifest.files
            if limit_bytes is not None and (all_bytes := sum(file.size_bytes for file in texts)) > limit_bytes:
                raise BadRequest(f"the text files of {card.id} take {all_bytes} bytes; {limit_bytes} are allowed", "model")
            await self._pull(card.id, files, [file.name for file in texts])
        return FetchedModel(msgspec.structs.replace(card, numerics=""), files)

    async def _open(self, card: ModelCard) -> PulledModel:
        """The directory of these weights, which all that fetch of them share. Raises Refused: no peer gave the manifest."""
        directory = self._folder / card.weights[:32]
        try:
            files = await trio.to_thread.run_sync(_fetched_before, directory, card.weights)
            if files is None:
                files = await trio.to_thread.run_sync(PulledModel, directory, await self._manifest(card))
        except OSError as error:
            raise _no_disk(error) from None
        self._files[card.weights] = files
        return files

    async def _manifest(self, card: ModelCard) -> Manifest:
        """From any peer that hands the files out. Raises Refused: none gave it now."""
        for peer in sources(self._view(), card.id, card.weights):
            try:
                encoded = await self._read_manifest(peer, card.weights)
                return await trio.to_thread.run_sync(decode, encoded, card.weights)  # it may be of many megabytes
            except (MeshError, BadManifest) as error:
                log.warning("weights.no_manifest", model=card.id, peer=peer.id, why=str(error)[:200])
        raise Refused(
            f"no live peer hands out the files of {card.id} with weights {card.weights[:16]}; "
            f"start a node that has them, or ask a node that serves this model",
            RETRY_S,
        )

    async def _read_manifest(self, peer: Peer, manifest: str) -> bytes:
        encoded = b""
        while True:
            header, tail = await self._call(
                peer.address, MANIFEST_KIND, {"manifest": manifest, "offset": len(encoded)}, timeout_s=CALL_TIMEOUT_S
            )
            size_bytes = header.get("size_bytes")
            encoded += tail
            if type(size_bytes) is not int or not len(encoded) <= size_bytes <= MAX_MANIFEST_BYTES or not tail:
                raise BadManifest("its length is not what was told")
            if len(encoded) == size_bytes:
                return encoded

    # --- a span of it

    async def span(self, fetched: FetchedModel, start: int, end: int) -> None:
        """Fetches what is missing of the tensors of the layers `[start, end)`.

        Raises:
            BadRequest: the disk has no room, or cannot be written.
        """
        layers = fetched.card.layers
        names = [tensor.name for tensor in await trio.to_thread.run_sync(_of_span, fetched.files, layers, start, end)]
        await self._pull(fetched.card.id, fetched.files, names)

    async def _pull(self, model: ModelId, files: PulledModel, names: Iterable[str]) -> None:
        try:
            pieces = await trio.to_thread.run_sync(files.missing, list(names), limiter=self._disk, abandon_on_cancel=True)
        except OSError as error:
            raise _no_disk(error) from None
        if pieces:
            await self._run(model, files, Pull(pieces))

    async def _run(self, model: ModelId, files: PulledModel, pull: Pull) -> None:
        """Drives one pull to its end."""
        self._last_pull += 1
        number, began = self._last_pull, trio.current_time()
        self._pulls[number], self._pulled[number] = pull, model
        log.info("weights.fetching", model=model, mib=pull.statistics().bytes_all >> 20, pieces=pull.statistics().pieces)
        try:
            await _Run(self, model, files, pull).run()
        finally:
            self._totals = replace(self._totals, **_sums(self._totals, [pull.statistics()]))
            del self._pulls[number], self._pulled[number]
        fetched, took_s = pull.statistics(), trio.current_time() - began
        log.info(
            "weights.fetched", model=model, mib=fetched.bytes_all >> 20, seconds=round(took_s, 1), retries=fetched.retries_total
        )


class _Run:
    """The tasks of one pull: events go into the core, its asks become tasks."""

    def __init__(self, fetching: Fetching, model: ModelId, files: PulledModel, pull: Pull) -> None:
        self._fetching, self._model, self._files, self._pull = fetching, model, files, pull
        self._nursery: trio.Nursery
        self._woken = trio.Event()
        self._failure: BadRequest | None = None

    async def run(self) -> None:
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._watch_sources)
            self._nursery.start_soon(self._tell)
            while not self._pull.done and self._failure is None:
                with trio.move_on_at(self._pull.deadline):
                    await self._woken.wait()
                self._woken = trio.Event()
                self._carry_out(self._pull.tick(trio.current_time()))
            self._nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    def _receive(self, event: PullEvent) -> None:
        self._carry_out(self._pull.receive(event, trio.current_time()))
        self._woken.set()  # the deadline may be another now

    def _carry_out(self, effects: Iterable[PullEffect]) -> None:
        for effect in effects:
            match effect:
                case AskPiece():
                    self._nursery.start_soon(self._ask, effect)
                case PullDone():
                    self._woken.set()

    async def _watch_sources(self) -> None:
        while True:
            view = self._fetching._view()
            peers = sources(view, self._model, self._files.catalogue.id)
            self._receive(SourcesChanged(tuple(peer.id for peer in peers)))
            await self._fetching._changed(view.version)

    async def _ask(self, ask: AskPiece) -> None:
        peer = self._fetching._view().peers.get(ask.node)
        if peer is None:
            self._receive(AskFailed(ask.number))
            return
        header = {"manifest": self._files.catalogue.id, "name": ask.piece.name, "number": ask.piece.number}
        try:
            _, content = await self._fetching._call(peer.address, PIECE_KIND, header, timeout_s=CALL_TIMEOUT_S)
            await trio.to_thread.run_sync(self._files.keep, ask.piece, content, limiter=self._fetching._disk)
            self._receive(PieceKept(ask.number))
        except OSError as error:
            self._failure = _no_disk(error)
            self._woken.set()
        except WrongPiece:
            log.warning("weights.wrong_piece", model=self._model, peer=ask.node, piece=f"{ask.piece.name}:{ask.piece.number}")
            self._receive(HashMismatch(ask.number))
        except Refused as error:
            self._receive(AskFailed(ask.number, error.retry_after_s))
        except BadRequest as error:
            self._receive(NotHeld(ask.number) if error.code == NOT_HELD else AskFailed(ask.number))
        except CALL_FAILURES:
            self._receive(AskFailed(ask.number))

    async def _tell(self) -> None:
        while True:
            await trio.sleep(TELL_EVERY_S)
            now = self._pull.statistics()
            event = "weights.no_source" if self._pull.starved else "weights.coming"
            log.info(event, model=self._model, mib=now.bytes_kept >> 20, of_mib=now.bytes_all >> 20, retries=now.retries_total)


def sources(view: View, model: ModelId, manifest: str) -> list[Peer]:
    """Live peers that hand out exactly these files, those that are not just suspect first."""
    telling = [
        peer
        for peer in view.live()
        if peer.id != view.me and any(_hands_out(card, model, manifest) for card in peer.facts.models)
    ]
    return sorted(telling, key=lambda peer: (not peer.usable, peer.id))


def _hands_out(card: ModelCard, model: ModelId, manifest: str) -> bool:
    return card.id == model and card.weights == card.manifest == manifest


def announced(view: View, name: ModelId) -> ModelCard | None:
    """The card of the version that requests mean by `name`; None: there is none, or no other node hands out its files."""
    version = named(view, name)
    if version is None or not is_identity(weights := version.card.weights):
        return None
    cards = [card_of(peer, version.card.id) for peer in sources(view, version.card.id, weights)]
    votes = Counter(msgspec.structs.replace(card, numerics="", written_at_s=0) for card in cards if card is not None)
    most = min(votes, key=lambda card: (-votes[card], card.layers, card.max_model_len), default=None)  # a peer may be wrong
    return None if most is None else msgspec.structs.replace(most, written_at_s=version.written_at_s)


def _fetched_before(directory: Path, weights: str) -> PulledModel | None:
    """What is in the directory of these weights (*blocking*); None: nothing that can be gone on with."""
    try:
        files = PulledModel.at(directory)
    except (BadRequest, FileNotFoundError):
        return None
    return files if files.catalogue.id == weights else None


def _of_span(files: PulledModel, layers: int, start: int, end: int) -> list[TensorEntry]:
    """By the model's config (*blocking*: it is a file)."""
    manifest = files.manifest
    try:
        config: Any = msgspec.json.decode((files.directory / "config.json").read_bytes())
        vocab_size, tied = config.get("vocab_size"), config.get("tie_word_embeddings") is not False
    except (OSError, msgspec.DecodeError, AttributeError):
        vocab_size, tied = None, True
    size = vocab_size if isinstance(vocab_size, int) else None
    return tensors_of_span(manifest.tensors, layers, start, end, size, tied=tied)


def _sums(totals: FetchingStatistics, pulls: Iterable[PullStatistics]) -> dict[str, int]:
    every = list(pulls)
    return {
        "bytes_fetched_total": totals.bytes_fetched_total + sum(each.bytes_kept for each in every),
        "retries_total": totals.retries_total + sum(each.retries_total for each in every),
        "lies_total": totals.lies_total + sum(each.lies_total for each in every),
    }


def _no_disk(error: OSError) -> BadRequest:
    return BadRequest(f"weights cannot be kept: {error.strerror or error}; make room, or give another --data-dir", "data_dir")


def _known(view: View) -> list[str]:
    """The models that live peers announce: a name that is not among them may be mistyped."""
    return sorted({card.id for peer in view.live() for card in peer.facts.models})
