"""Fetches a model that this node has no files of from the peers that tell of it: the shell around `node.weights.pull`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import structlog
import trio

from mesh.calls import Call
from mesh.errors import BadRequest, MeshError, Refused
from mesh.ids import ModelId
from mesh.view import ModelCard, Peer, View
from mesh.weights import (
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
from node.weights.pull import ASK_TIMEOUT_S, Ask, Done, Effect, Event, Failed, Kept, Lacks, Lied, Pull, PullStatistics, Sources
from node.weights.store import PulledModel, WrongPiece

CALL_TIMEOUT_S = 2 * ASK_TIMEOUT_S  # an answer that comes late is still worth keeping
RETRY_S = 1.0  # to look again for a manifest that nobody gave
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
class Fetched:
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
        self._files: dict[str, PulledModel] = {}  # by manifest
        self._opening: dict[str, trio.Lock] = {}  # by manifest: of each model only one pull of the text side
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

    # --- a model, known by name

    async def text_side(self, model: ModelId, limit_bytes: int | None = None) -> Fetched:
        """Waits until peers tell of the model, then fetches its manifest, config and tokenizer. A second call shares the files.

        Raises:
            BadRequest: the disk has no room, or cannot be written; the files are larger than `limit_bytes` together.
        """
        while True:
            view = self._view()
            card = announced(view, model)
            if card is None:
                log.info("weights.waiting", model=model, why="no live peer tells of this model's files yet")
                await self._changed(view.version)
                continue
            async with self._opening.setdefault(card.manifest, trio.Lock()):
                files = self._files.get(card.manifest) or await self._open(card)
                if files is not None:
                    names = [file.name for file in files.manifest.files]
                    if limit_bytes is not None and (all_bytes := sum(f.size_bytes for f in files.manifest.files)) > limit_bytes:
                        raise BadRequest(f"the text files of {model} take {all_bytes} bytes; {limit_bytes} are allowed", "model")
                    await self._pull(model, files, names)
                    return Fetched(msgspec.structs.replace(card, numerics=""), files)
            await trio.sleep(RETRY_S)

    async def _open(self, card: ModelCard) -> PulledModel | None:
        """The directory of the model's files, which all that fetch of it share; None: no peer gave its manifest now."""
        manifest = await self._manifest(card)
        if manifest is None:
            return None
        try:
            files = await trio.to_thread.run_sync(PulledModel, self._folder / card.manifest[:32], manifest)
        except OSError as error:
            raise _no_disk(error) from None
        self._files[card.manifest] = files
        return files

    async def _manifest(self, card: ModelCard) -> Manifest | None:
        """From any peer that tells of it; None: nobody gave it now."""
        for peer in sources(self._view(), card.id, card.manifest):
            try:
                manifest = decode(await self._read_manifest(peer, card.manifest), card.manifest)
                if not manifest.agrees_with(card):
                    raise BadManifest("it is of another model than the card says")
                return manifest
            except (MeshError, BadManifest) as error:
                log.warning("weights.no_manifest", model=card.id, peer=peer.id, why=str(error)[:200])
        return None

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

    async def span(self, fetched: Fetched, start: int, end: int) -> None:
        """Fetches what is missing of the tensors of the layers `[start, end)`.

        Raises:
            BadRequest: the disk has no room, or cannot be written.
        """
        names = [tensor.name for tensor in await trio.to_thread.run_sync(_of_span, fetched.files, start, end)]
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

    def _receive(self, event: Event) -> None:
        self._carry_out(self._pull.receive(event, trio.current_time()))
        self._woken.set()  # the deadline may be another now

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Ask():
                    self._nursery.start_soon(self._ask, effect)
                case Done():
                    self._woken.set()

    async def _watch_sources(self) -> None:
        while True:
            view = self._fetching._view()
            peers = sources(view, self._model, self._files.catalogue.id)
            self._receive(Sources(tuple(peer.id for peer in peers)))
            await self._fetching._changed(view.version)

    async def _ask(self, ask: Ask) -> None:
        peer = self._fetching._view().peers.get(ask.node)
        if peer is None:
            self._receive(Failed(ask.number))
            return
        header = {"manifest": self._files.catalogue.id, "name": ask.piece.name, "number": ask.piece.number}
        try:
            _, content = await self._fetching._call(peer.address, PIECE_KIND, header, timeout_s=CALL_TIMEOUT_S)
            await trio.to_thread.run_sync(self._files.keep, ask.piece, content, limiter=self._fetching._disk)
            self._receive(Kept(ask.number))
        except OSError as error:
            self._failure = _no_disk(error)
            self._woken.set()
        except WrongPiece:
            log.warning("weights.wrong_piece", model=self._model, peer=ask.node, piece=f"{ask.piece.name}:{ask.piece.number}")
            self._receive(Lied(ask.number))
        except Refused as error:
            self._receive(Failed(ask.number, error.retry_after_s))
        except BadRequest as error:
            self._receive(Lacks(ask.number) if error.code == NOT_HELD else Failed(ask.number))
        except MeshError:
            self._receive(Failed(ask.number))

    async def _tell(self) -> None:
        while True:
            await trio.sleep(TELL_EVERY_S)
            now = self._pull.statistics()
            event = "weights.no_source" if self._pull.starved else "weights.coming"
            log.info(event, model=self._model, mib=now.bytes_kept >> 20, of_mib=now.bytes_all >> 20, retries=now.retries_total)


def sources(view: View, model: ModelId, manifest: str) -> list[Peer]:
    """Live peers that tell of exactly these files, those that are not just suspect first."""
    telling = [
        peer
        for peer in view.live()
        if peer.id != view.me and any(card.id == model and card.manifest == manifest for card in peer.facts.models)
    ]
    return sorted(telling, key=lambda peer: (not peer.usable, peer.id))


def announced(view: View, model: ModelId) -> ModelCard | None:
    """The card, with a manifest, that most live peers tell of the model; of equals the lowest manifest's."""
    cards = [card for peer in view.live() if peer.id != view.me for card in peer.facts.models if card.id == model]
    told = Counter(msgspec.structs.replace(card, numerics="") for card in cards if is_identity(card.manifest))
    return min(told, key=lambda card: (-told[card], card.manifest), default=None)


def _of_span(files: PulledModel, start: int, end: int) -> list[TensorEntry]:
    """By what the model's config says (*blocking*: it is a file)."""
    manifest = files.manifest
    try:
        config: Any = msgspec.json.decode((files.directory / "config.json").read_bytes())
        vocab_size, tied = config.get("vocab_size"), config.get("tie_word_embeddings") is not False
    except (OSError, msgspec.DecodeError, AttributeError):
        vocab_size, tied = None, True
    size = vocab_size if isinstance(vocab_size, int) else None
    return tensors_of_span(manifest.tensors, manifest.layers, start, end, size, tied=tied)


def _sums(totals: FetchingStatistics, pulls: Iterable[PullStatistics]) -> dict[str, int]:
    every = list(pulls)
    return {
        "bytes_fetched_total": totals.bytes_fetched_total + sum(each.bytes_kept for each in every),
        "retries_total": totals.retries_total + sum(each.retries_total for each in every),
        "lies_total": totals.lies_total + sum(each.lies_total for each in every),
    }


def _no_disk(error: OSError) -> BadRequest:
    return BadRequest(f"weights cannot be kept: {error.strerror or error}; make room, or give another --data-dir", "data_dir")
