"""Fetches prefix pages from a peer before a stage computes a sequence whose beginning another node has cached.

The entry names a node that was sent such a beginning (`pages_from`); the stage asks that node for a few pages at a time, as long
as fetching is cheaper than computing (`pages_to_fetch`), and no longer than an open may take. Links authenticate the sender; a
page is requested by a name that can be computed only from the tokens and the tenant's salt. The answer must have the announced
length and hashes, and finite numbers; otherwise it is refused and counted, and the stage computes the pages. A peer that fails
costs nothing else.
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
from mesh.wire.calls import Call, CallReply, Handlers, Header
from node.engine.api import Engine, OpenSequence, PageRequest

PAGES_KIND = "stage.pages"
MAX_WAIT_S = 3.0  # for all of a sequence's pages; an open must be answered within five
MAX_READERS = 1  # threads that pack pages for peers; one fills a link
SPEED_KEPT_S = 60.0  # after this long a link's speed is measured anew
MAX_SOURCES = 256
DIGEST_BYTES = 16
MIN_PAGES = 4  # fewer are computed within a few steps
PROBE_PAGES = 2  # fetched to measure a link whose speed is not known
BATCH_BYTES = 8 << 20  # of one answer: the link also carries activations and tokens, whose frames wait behind it

log = structlog.get_logger()

Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class PagesAnswer(msgspec.Struct, frozen=True):
    """The header of an answer to `stage.pages`; the pages are its tail, one after the other."""

    digests: Annotated[tuple[Digest, ...], Meta(max_length=4096)]
    prefill_tok_s: Annotated[float, Meta(ge=0.0, le=1e9)] = 0.0  # the peer's, for a node that has not measured its own yet


@dataclass(slots=True)
class PageExchangeStatistics:
    """Counts since the start."""

    fetched_pages_total: int = 0
    fetched_bytes_total: int = 0
    sent_pages_total: int = 0
    refused_answers_total: int = 0  # with pages that were damaged, or of another layout
    failed_total: int = 0  # the peer did not answer
    not_worth_total: int = 0  # computing was cheaper


@dataclass(frozen=True, slots=True)
class _PageSource:
    """A peer that sent pages: the speed of its answer, the prefill rate that it reported, and when."""

    bytes_s: float
    prefill_tok_s: float
    at_s: float


class PageExchange:
    """Sends this node's pages to peers that ask for them, and fetches pages from peers."""

    def __init__(self, engine: Engine, call: Call) -> None:
        self._engine = engine
        self._call = call
        self._sources: OrderedDict[Address, _PageSource] = OrderedDict()  # in the order in which they were measured
        self._reading = trio.CapacityLimiter(MAX_READERS)
        self._counters = PageExchangeStatistics()
        self.handlers: Handlers = {PAGES_KIND: self._on_page_request}

    def statistics(self) -> PageExchangeStatistics:
        return replace(self._counters)

    # --- for peers

    async def _on_page_request(self, sender: NodeId, header: Header, tail: bytes) -> CallReply:
        try:
            request = msgspec.convert(header, PageRequest)
        except msgspec.ValidationError as error:
            raise RemoteError(sender, f"{PAGES_KIND}: {error}") from None
        pages = await trio.to_thread.run_sync(self._engine.pages.export_pages, request, BATCH_BYTES, limiter=self._reading)
        self._counters.sent_pages_total += len(pages)
        answer = PagesAnswer(tuple(map(_digest, pages)), self._engine.load_report().prefill_tok_s)
        return _header(answer), b"".join(pages)

    # --- from peers

    async def fetch(self, sequence: OpenSequence, source: Address) -> None:
        """Fetches the pages of the sequence's beginning that the peer at `source` has, while that is cheaper than computing them.

        Raises no MeshError: what is not fetched is computed.
        """
        with trio.move_on_after(MAX_WAIT_S):
            try:
                while await self._fetch_batch(sequence, source):
                    pass
            except RemoteError as error:
                self._counters.refused_answers_total += 1
                log.warning("pages.refused", peer=format_address(source), reason=error.reason)
            except MeshError:
                self._counters.failed_total += 1

    async def _fetch_batch(self, sequence: OpenSequence, source: Address) -> bool:
        """Fetches one batch of pages; False if there are no more, or fetching more is not worth it."""
        missing = self._engine.pages.missing_pages(sequence)
        if missing is None or missing.kept == missing.whole:
            return False
        measured, own_tok_s = self._measured(source), self._engine.load_report().prefill_tok_s
        count = pages_to_fetch(
            missing.whole - missing.kept,
            missing.page_bytes,
            PREFIX_PAGE_TOKENS,
            measured.bytes_s if measured else None,
            own_tok_s or (measured.prefill_tok_s if measured else 0.0),
        )
        if count == 0:
            self._counters.not_worth_total += 1
            return False
        began_s = trio.current_time()
        request = msgspec.structs.replace(missing.request, names=missing.request.names[missing.kept : missing.kept + count])
        pages, peer_tok_s = await self._request_pages(request, missing.page_bytes, source)
        if not pages:
            return False
        took_s = max(trio.current_time() - began_s, 1e-6)
        self._sources[source] = _PageSource(sum(map(len, pages)) / took_s, peer_tok_s, trio.current_time())
        self._sources.move_to_end(source)
        while len(self._sources) > MAX_SOURCES:
            self._sources.popitem(last=False)
        try:
            kept = await trio.to_thread.run_sync(self._engine.pages.import_pages, sequence, missing.kept, pages)
        except ValueError as error:
            raise RemoteError(format_address(source), str(error)) from None
        assert kept <= len(pages) <= count
        self._counters.fetched_pages_total += kept
        self._counters.fetched_bytes_total += kept * missing.page_bytes
        return kept == count

    def _measured(self, source: Address) -> _PageSource | None:
        """The latest measurement of a peer; None if there is none, or it is too old."""
        found = self._sources.get(source)
        return found if found is not None and trio.current_time() - found.at_s < SPEED_KEPT_S else None

    async def _request_pages(self, request: PageRequest, page_bytes: int, source: Address) -> tuple[list[bytes], float]:
        """Asks a peer for pages; returns them with the peer's prefill rate. Raises RemoteError for an invalid answer."""
        peer = format_address(source)
        header, tail = await self._call(source, PAGES_KIND, _header(request), timeout_s=MAX_WAIT_S)
        try:
            answer = msgspec.convert(header, PagesAnswer)
        except msgspec.ValidationError as error:
            raise RemoteError(peer, f"no answer to {PAGES_KIND}: {error}") from None
        if len(answer.digests) > len(request.names) or len(tail) != len(answer.digests) * page_bytes:
            raise RemoteError(peer, f"expected {len(answer.digests)} pages of {page_bytes} bytes, got {len(tail)} bytes")
        pages = [tail[at : at + page_bytes] for at in range(0, len(tail), page_bytes)]
        if tuple(map(_digest, pages)) != answer.digests:
            raise RemoteError(peer, "a page does not match its hash")
        return pages, answer.prefill_tok_s


def pages_to_fetch(missing: int, page_bytes: int, page_tokens: int, link_bytes_s: float | None, prefill_tok_s: float) -> int:
    """How many of the `missing` pages to fetch now: those whose bytes take less time than computing them; 0: none.

    `link_bytes_s`: measured from request to answer; None: not known, so a few pages are fetched to measure it. `prefill_tok_s`: 0
    if not known, and then no page is fetched.
    """
    if link_bytes_s is None:
        return PROBE_PAGES if missing >= MIN_PAGES else 0
    if missing < 1 or prefill_tok_s <= 0.0 or page_bytes / link_bytes_s >= page_tokens / prefill_tok_s:
        return 0
    return min(missing, max(1, BATCH_BYTES // page_bytes))


def _header(struct: msgspec.Struct) -> Header:
    header: Header = msgspec.to_builtins(struct, builtin_types=(bytes,))
    return header


def _digest(page: bytes) -> bytes:
    return blake2b(page, digest_size=DIGEST_BYTES).digest()
