"""The seam between the node and its engine: what goes in, what comes out. No torch here.

One engine thread computes; the trio thread talks to it through `Engine`. A sequence is a row of
one attempt of one choice of one stream on one stage `[start, end)` of a model. Positions count
tokens from 0 over prompt and answer. Everything is idempotent by (key, position): what comes twice
changes nothing; what comes for an unknown or closed key is counted and dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol

import msgspec
from msgspec import Meta

from mesh.ids import ModelId, StreamId
from mesh.prefix import NAME_BYTES
from mesh.view import Load, ModelCard, Span
from node.requests import SamplingParams


class SequenceKey(NamedTuple):
    stream: StreamId
    choice: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Lane:
    """The layers `[start, end)` of one loaded span."""

    span: Span
    start: int
    end: int


class Prefix(msgspec.Struct, frozen=True):
    """What a stage needs to find the pages of earlier sequences that begin with the same tokens, and to keep its own.

    `names` are those of the whole pages of the known tokens (`mesh.prefix`). The first stage of several is asked last, and
    told `elsewhere`: the fewest pages that all others have; it begins behind what all have, and the position of its first
    activations tells the others where that is.
    """

    salt: bytes
    names: tuple[bytes, ...]
    numerics: str  # of the whole path
    elsewhere: int | None = None  # None: there are no other stages


class OpenSequence(msgspec.Struct, frozen=True):
    """Take up one sequence on the layers `[start, end)`, which lie within a span that is loaded here.

    `tokens` are all tokens known so far, prompt and then answer; the first stage (`start == 0`) needs
    them to prefill, the last (`end == layers`) for penalties and for where sampling begins; stages
    between are sent only `known`, their count. The last stage samples position `known` first; the
    sequence ends at position `prompt_tokens + sampling.max_tokens`.
    """

    stream: StreamId
    choice: int
    attempt: int
    model: ModelId
    start: int
    end: int
    prompt_tokens: int
    known: int
    tokens: tuple[int, ...]
    sampling: SamplingParams
    prefix: Prefix | None = None  # None: nothing is looked up or kept, for the path's numerics are not exact
    priority: int = 0  # lower goes first
    remaining_ms: int | None = None  # until the request's own deadline
    last_choice: bool = False  # no other node could take this part of the path
    weights: str = ""  # that compute it, and no others; empty: the entry does not say

    @property
    def key(self) -> SequenceKey:
        return SequenceKey(self.stream, self.choice, self.attempt)


@dataclass(frozen=True, slots=True)
class HiddenOut:
    """Activations for the next stage: positions `position … position + count - 1`.

    `data` is the raw little-endian bytes of a `[count, hidden]` array in the model's dtype.
    """

    key: SequenceKey
    position: int
    count: int
    data: bytes
    names: tuple[bytes, ...] = ()  # of the pages that became whole since the last
    draft: tuple[int, ...] = ()  # the tokens at the last so many positions are guessed (`speculation`)
    rewinds: int = 0  # guesses that had proved wrong when this was computed; what is of an older one is void


@dataclass(frozen=True, slots=True)
class TokenOut:
    """The token drawn for `position`; with `finish` ("stop" or "length") it is the last.

    `cached`: how many tokens before it were not computed but taken from pages.
    """

    key: SequenceKey
    position: int
    token: int
    finish: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # alternatives (token, logprob), likeliest first
    cached: int = 0


@dataclass(frozen=True, slots=True)
class SequenceLost:
    """This stage gave the sequence up and freed its blocks.

    retryable: another attempt may succeed (evicted for lack of KV blocks, step failed); else the request itself is at fault.
    by_previous: the stage before is to blame, for what it sent.
    """

    key: SequenceKey
    reason: str
    retryable: bool = True
    by_previous: bool = False


@dataclass(frozen=True, slots=True)
class SpanLost:
    """The workers that computed a span have ended: it is unloaded, and may be loaded again. Its sequences are lost as well."""

    span: Span
    reason: str


EngineOutput = HiddenOut | TokenOut | SequenceLost | SpanLost

Deliver = Callable[[list[EngineOutput]], None]
"""Called in the ENGINE thread with the outputs of one step; the node's shell passes them on to trio."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    dtype: str = "auto"  # auto | float32 | bfloat16 | a linear kernel's name, e.g. fbgemm-fp16
    quantize: str = "none"  # none | int8 | int4: how weights are held
    graphs: bool = True  # on a GPU: decoding steps are recorded and played again
    threads: int = 1  # torch threads; several nodes on one machine: 1 each
    tensor_parallel: int = 1  # worker processes that compute a span together, `threads` each; 1: this process computes it
    kv_memory_bytes: int | None = None  # for all KV caches; None: a share of free memory
    spill_memory_bytes: int = 0  # for pages that the KV memory has no room for: so many in host memory
    spill_disk_bytes: int = 0  # and so many in files
    spill_folder: Path | None = None  # of those files, and of nothing else; without it there are none
    step_tokens: int = 512  # token budget of one step: prefill chunks and decodes together
    max_sequences: int = 64  # per stage; one more is refused as BUSY
    speculates: bool = True  # guesses the next tokens from the text where that pays (`speculation`)


PageNames = Annotated[tuple[Annotated[bytes, Meta(min_length=NAME_BYTES, max_length=NAME_BYTES)], ...], Meta(max_length=4096)]


class PageRequest(msgspec.Struct, frozen=True):
    """Whose content a peer wants: the pages of these names, and only of this layout, from these kernels."""

    model: ModelId
    start: Annotated[int, Meta(ge=0, le=2**15)]
    end: Annotated[int, Meta(ge=1, le=2**15)]
    numerics: Annotated[str, Meta(max_length=200)]
    layout: Annotated[bytes, Meta(max_length=64)]
    names: PageNames


@dataclass(frozen=True, slots=True)
class PagesMissing:
    """Of the `whole` pages that a sequence could begin behind the first `kept` are here. `ask`: for all of them."""

    kept: int
    whole: int
    page_bytes: int
    ask: PageRequest


class PageAccess(Protocol):
    """What pages of a prefix hold, in and out of the engine as bytes. Any thread may call."""

    def wanted(self, sequence: OpenSequence) -> PagesMissing | None:
        """None: pages of such a sequence are not for exchange here."""

    def export_pages(self, ask: PageRequest, most_bytes: int) -> list[bytes]:
        """The first of the pages asked for, as far as they are here and within `most_bytes`, but one at least (*blocking*)."""

    def import_pages(self, sequence: OpenSequence, first: int, contents: list[bytes]) -> int:
        """Keeps the contents as the sequence's pages from number `first` on; how many there was room for (*blocking*).

        Raises:
            ValueError: they are no such pages.
        """


class Engine(Protocol):
    """All methods may be called from the trio thread; those marked *blocking* in a worker thread."""

    @property
    def pages(self) -> PageAccess: ...

    def start(self, deliver: Deliver) -> None: ...

    def stop(self) -> None:
        """Ends the engine thread after its current step (*blocking*)."""

    def inspect(self, directory: Path, model: ModelId) -> ModelCard:
        """Reads the checkpoint's config and the headers of its files (*blocking*, at most seconds).

        `weights` and `numerics` are empty: no byte of weights is read.

        Raises:
            BadRequest: not a directory, not a causal LM, pickled or missing weights, or an architecture that cannot be served
                exactly; the message gives the reason and what would work.
        """

    def load(self, directory: Path, model: ModelId, start: int, end: int, weights: str = "") -> ModelCard:
        """Loads layers `[start, end)`, runs the self-check, and serves them from its return on (*blocking*).

        `weights`: which they are (`mesh.manifest`); empty: the files are hashed for it.

        Raises:
            BadRequest: as `inspect`; also layers out of range, or the self-check failed.
        """

    def unload(self, span: Span) -> None:
        """Drops a span; its sequences are lost (*blocking*)."""

    def prepare(self, sequence: OpenSequence) -> None:
        """What must be ready before `open`: compiles the sequence's grammar, if it is drawn here (*blocking*).

        Raises:
            BadRequest: the grammar does not compile within its limits.
        """

    def open(self, sequence: OpenSequence) -> int:
        """Admits a sequence; a first stage begins its prefill at the next step.

        Returns how many of its pages are kept here; they stay until it begins.

        Raises:
            Refused: no room (sequences or KV blocks); try elsewhere or later.
            BadRequest: it can never fit here.
            LocalError: no loaded span holds `[start, end)`.
        """

    def push(self, *hidden: HiddenOut) -> None:
        """Activations from the stage before, for sequences that are open here. What comes together is computed together."""

    def token(self, *drawn: TokenOut) -> None:
        """Tokens drawn by the last stage, back at the first: it decodes on from there, with all of them together."""

    def close(self, key: SequenceKey) -> None:
        """Frees the sequence within a step. Unknown keys are fine."""

    def close_streams(self, keep: Callable[[StreamId], bool]) -> None:
        """Frees every sequence whose stream `keep` does not want (its entry node died)."""

    def load_report(self) -> Load: ...

    def overdue_s(self) -> float:
        """How long the step under way is past all that earlier ones explain: an engine that hangs. 0 when it does well."""

    def statistics(self) -> object:
        """A frozen dataclass of counters and of what is loaded, for metrics."""
