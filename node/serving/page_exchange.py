"""Fetches prefix pages from a peer before a stage computes a sequence whose beginning another node has cached.

The entry names a node that was sent such a beginning (`pages_from`); the stage asks it, a few pages at a time, as long as that
is cheaper than computing them (`page_gate`), and no longer than an open may take. Links authenticate the sender; a page is
requested by a name that can be computed only from the tokens and the tenant's salt. The answer must have the announced length
and hashes, and finite numbers; otherwise it is refused, counted, and computed here. A peer that fails costs nothing more.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Annotated

import msgspec
import structlog
import trio
from msgspec import Meta

from mesh.errors import MeshError, RemoteError
from mesh.ids import Address, NodeId, format_address
from mesh.prefix import PREFIX_PAGE_TOKENS
from mesh.wire.calls import Call, Handlers, Header, Reply
from node.engine.api import Engine, OpenSequence, PageRequest
from node.serving.page_gate import BATCH_BYTES, pages_to_fetch

PAGES_KIND = "stage.pages"
MAX_WAIT_S = 3.0  # for all of a sequence's pages: an open must be answered within five
READS_AT_ONCE = 1  # threads that pack pages for peers; one fills a link
SPEED_KEPT_S = 60.0  # a link is measured anew after so long
SOURCES_KEPT = 256
DIGEST_BYTES = 16

log = structlog.get_logger()

Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class PagesTold(msgspec.Struct, frozen=True):
    """The header of an answer to `stage.pages`; the pages are its tail, one after the other."""

    digests: Annotated[tuple[Digest, ...], Meta(max_length=4096)]
    prefill_tok_s: Annotated[float, Meta(ge=0.0, le=1e9)] = 0.0  # of the peer: a guess for a node that has not measured its own


@dataclass(slots=True)
class PageExchangeStatistics:
    """Since the start."""

    fetched_pages_total: int = 0
    fetched_bytes_total: int = 0
    sent_pages_total: int = 0
    refused_answers_total: int = 0  # with pages that were damaged, or of another kind
    failed_total: int = 0  # the peer did not answer
    not_worth_total: int = 0  # computing is cheaper


@dataclass(frozen=True, slots=True)
class _PageSource:
    """A peer that gave pages: how fast, what it says of its own prefill, and when that was."""

    bytes_s: float
    prefill_tok_s: float
    at_s: float


class PageExchange:
    def __init__(self, engine: Engine, call: Call) -> None:
        self._engine = engine
        self._call = call
        self._sources: OrderedDict[Address, _PageSource] = OrderedDict()  # measured last comes last
        self._reading = trio.CapacityLimiter(READS_AT_ONCE)
        self._counters = PageExchangeStatistics()
        self.handlers: Handlers = {PAGES_KIND: self._on_ask}

    def statistics(self) -> PageExchangeStatistics:
        return replace(self._counters)

    # --- for peers

    async def _on_ask(self, sender: NodeId, header: Header, tail: bytes) -> Reply:
        try:
            ask = msgspec.convert(header, PageRequest)
        except msgspec.ValidationError as error:
            raise RemoteError(sender, f"{PAGES_KIND}: {error}") from None
        pages = await trio.to_thread.run_sync(self._engine.pages.export_pages, ask, BATCH_BYTES, limiter=self._reading)
        self._counters.sent_pages_total += len(pages)
        told = PagesTold(tuple(map(_digest, pages)), self._engine.load_report().prefill_tok_s)
        return _header(told), b"".join(pages)

    # --- from peers

    async def fetch(self, sequence: OpenSequence, source: Address) -> None:
        """Has what the peer at `source` keeps of the sequence's beginning here, as far as that pays. Raises no MeshError."""
        with trio.move_on_after(MAX_WAIT_S):
            try:
                while await self._fetch_some(sequence, source):
                    pass
            except RemoteError as error:
                self._counters.refused_answers_total += 1
                log.warning("pages.refused", peer=format_address(source), reason=error.reason)
            except MeshError:
                self._counters.failed_total += 1

    async def _fetch_some(self, sequence: OpenSequence, source: Address) -> bool:
        """One batch; False: there is no more to be had, or it is no use."""
        wanted = self._engine.pages.missing_pages(sequence)
        if wanted is None or wanted.kept == wanted.whole:
            return False
        known, rate = self._known(source), self._engine.load_report().prefill_tok_s
        count = pages_to_fetch(
            wanted.whole - wanted.kept,
            wanted.page_bytes,
            PREFIX_PAGE_TOKENS,
            known.bytes_s if known else None,
            rate or (known.prefill_tok_s if known else 0.0),
        )
        if count == 0:
            self._counters.not_worth_total += 1
            return False
        began_s = trio.current_time()
        ask = msgspec.structs.replace(wanted.request, names=wanted.request.names[wanted.kept : wanted.kept + count])
        pages, told_rate = await self._ask(ask, wanted.page_bytes, source)
        if not pages:
            return False
        took_s = max(trio.current_time() - began_s, 1e-6)
        self._sources[source] = _PageSource(sum(map(len, pages)) / took_s, told_rate, trio.current_time())
        self._sources.move_to_end(source)
        while len(self._sources) > SOURCES_KEPT:
            self._sources.popitem(last=False)
        try:
            kept = await trio.to_thread.run_sync(self._engine.pages.import_pages, sequence, wanted.kept, pages)
        except ValueError as error:
            raise RemoteError(format_address(source), str(error)) from None
        self._counters.fetched_pages_total += kept
        self._counters.fetched_bytes_total += kept * wanted.page_bytes
        return kept == count

    def _known(self, source: Address) -> _PageSource | None:
        known = self._sources.get(source)
        return known if known is not None and trio.current_time() - known.at_s < SPEED_KEPT_S else None

    async def _ask(self, ask: PageRequest, page_bytes: int, source: Address) -> tuple[list[bytes], float]:
        """Raises RemoteError: the answer is none, or damaged."""
        peer = format_address(source)
        header, tail = await self._call(source, PAGES_KIND, _header(ask), timeout_s=MAX_WAIT_S)
        try:
            told = msgspec.convert(header, PagesTold)
        except msgspec.ValidationError as error:
            raise RemoteError(peer, f"no answer to {PAGES_KIND}: {error}") from None
        if len(told.digests) > len(ask.names) or len(tail) != len(told.digests) * page_bytes:
            raise RemoteError(peer, f"expected {len(told.digests)} pages of {page_bytes} bytes, got {len(tail)} bytes")
        pages = [tail[at : at + page_bytes] for at in range(0, len(tail), page_bytes)]
        if tuple(map(_digest, pages)) != told.digests:
            raise RemoteError(peer, "a page is not what its hash says")
        return pages, told.prefill_tok_s


def _header(said: msgspec.Struct) -> Header:
    header: Header = msgspec.to_builtins(said, builtin_types=(bytes,))
    return header


def _digest(page: bytes) -> bytes:
    return blake2b(page, digest_size=DIGEST_BYTES).digest()
