"""The interface between the node and its engine: requests and outputs. No torch.

One engine thread computes; the trio thread calls it through `Engine`. A sequence is one attempt of one choice of one stream, on
one stage `[start, end)` of a model. Positions count tokens from 0 over prompt and answer. Every call is idempotent by (key,
position): a duplicate changes nothing, and a call for an unknown or closed key is counted and dropped.
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
    """The names by which a stage finds pages of earlier sequences that begin with the same tokens, and keeps its own.

    `names`: of the whole pages of the known tokens (`mesh.prefix`). `elsewhere`: the first stage of several is opened last, and
    is given the number of pages that every other stage has; it starts behind the pages that all stages have, and the position
    of its first activations shows the other stages where that is.
    """

    salt: bytes
    names: tuple[bytes, ...]
    numerics: str  # of every stage of the path
    elsewhere: int | None = None  # None: there are no other stages


class OpenSequence(msgspec.Struct, frozen=True):
    """A request to compute one sequence on the layers `[start, end)`, which lie within a loaded span.

    `tokens`: all tokens known so far, prompt and then answer; the first stage (`start == 0`) needs them for the prefill, the
    last (`end == layers`) for penalties and grammars; stages between receive only their count, `known`. The last stage draws
    position `known` first; the sequence ends before position `prompt_tokens + sampling.max_tokens`.
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
    prefix: Prefix | None = None  # None: no page is read or kept, because the path is not exact
    priority: int = 0  # lower goes first
    remaining_ms: int | None = None  # until the request's own deadline
    last_choice: bool = False  # no other node could take this part of the path
    weights: str = ""  # the only weights that may compute it; empty: the entry named none

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
    names: tuple[bytes, ...] = ()  # of the pages that became whole since the last activations
    draft: tuple[int, ...] = ()  # the tokens at the last so many positions are guessed (`speculation`)
    rewinds: int = 0  # wrong guesses found before this was computed; activations with an older count are void


@dataclass(frozen=True, slots=True)
class TokenOut:
    """The token drawn for `position`; with `finish` ("stop" or "length") it is the last.

    `cached`: how many tokens before it were restored from pages.
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
    """This stage stopped computing the sequence and freed its blocks.

    retryable: another attempt may succeed (evicted for lack of KV blocks, step failed); else the cause is the request itself.
    by_previous: the cause is what the stage before sent.
    no_room: evicted for lack of KV blocks; no fault of the stage.
    """

    key: SequenceKey
    reason: str
    retryable: bool = True
    by_previous: bool = False
    no_room: bool = False


@dataclass(frozen=True, slots=True)
class SpanLost:
    """The worker processes of a span have ended: it is unloaded, its sequences are lost, and it may be loaded again."""

    span: Span
    reason: str


EngineOutput = HiddenOut | TokenOut | SequenceLost | SpanLost

Deliver = Callable[[list[EngineOutput]], None]
"""Called in the ENGINE thread with the outputs of one step; the node's shell passes them to the trio thread."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    dtype: str = "auto"  # auto | float32 | bfloat16 | a linear kernel's name, e.g. fbgemm-fp16
    quantize: str = "none"  # none | int8 | int4: how weights are held
    graphs: bool = True  # on a GPU: decoding steps are recorded and replayed as CUDA graphs
    threads: int = 1  # torch threads; several nodes on one machine: 1 each
    tensor_parallel: int = 1  # worker processes that compute a span together, `threads` each; 1: this process computes it
    kv_memory_bytes: int | None = None  # for all KV caches; None: a share of free memory
    spill_memory_bytes: int = 0  # of host memory, for pages that find no room in the KV memory
    spill_disk_bytes: int = 0  # of files, for pages that find no room in host memory
    spill_folder: Path | None = None  # for those files and nothing else; None: no files
    step_tokens: int = 512  # token budget of one step: prefill chunks and decodes together
    max_sequences: int = 64  # per span; more are refused
    speculates: bool = True  # guess the next tokens from the text where that pays (`speculation`)


PageNames = Annotated[tuple[Annotated[bytes, Meta(min_length=NAME_BYTES, max_length=NAME_BYTES)], ...], Meta(max_length=4096)]


class PageRequest(msgspec.Struct, frozen=True):
    """A peer's request for the content of pages: of these names, this layout, and computed by these kernels."""

    model: ModelId
    start: Annotated[int, Meta(ge=0, le=2**15)]
    end: Annotated[int, Meta(ge=1, le=2**15)]
    numerics: Annotated[str, Meta(max_length=200)]
    layout: Annotated[bytes, Meta(max_length=64)]
    names: PageNames


@dataclass(frozen=True, slots=True)
class PagesMissing:
    """Of the `whole` pages behind which a sequence could start, the first `kept` are here. `request`: for all `whole` pages."""

    kept: int
    whole: int
    page_bytes: int
    request: PageRequest


class PageAccess(Protocol):
    """Exports pages from the engine, and imports them, as bytes. Any thread may call."""

    def missing_pages(self, sequence: OpenSequence) -> PagesMissing | None:
        """Returns which pages of a sequence are missing here; None: its pages cannot be exchanged."""

    def export_pages(self, request: PageRequest, max_bytes: int) -> list[bytes]:
        """Returns the contents of the requested pages up to the first that is missing, within `max_bytes` but at least one.

        *Blocking*.
        """

    def import_pages(self, sequence: OpenSequence, first: int, contents: list[bytes]) -> int:
        """Keeps the contents as pages `first`, `first + 1`, … of the sequence; returns how many found room (*blocking*).

        Raises:
            ValueError: a content has the wrong length, or holds numbers that are not finite.
        """


class Engine(Protocol):
    """All methods may be called from the trio thread, except those marked *blocking*: call them from a worker thread."""

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
                exactly; the message gives the reason and the remedy.
        """

    def load(self, directory: Path, model: ModelId, start: int, end: int, weights: str = "") -> ModelCard:
        """Loads layers `[start, end)`, runs the self-check, and serves them from then on (*blocking*).

        `weights`: the identity of the weights (`mesh.manifest`); empty: the files are hashed to find it.

        Raises:
            BadRequest: as `inspect`; also layers out of range, or the self-check failed.
        """

    def unload(self, span: Span) -> None:
        """Drops a span; its sequences are lost (*blocking*)."""

    def prepare(self, sequence: OpenSequence) -> None:
        """Compiles the grammar of a sequence that is drawn here, before `open` (*blocking*).

        Raises:
            BadRequest: the grammar does not compile within the limits.
        """

    def open(self, sequence: OpenSequence) -> int:
        """Admits a sequence; a first stage begins its prefill at the next step.

        Returns how many of its pages are kept here; they are pinned until the sequence starts.

        Raises:
            Refused: too many sequences, or too few free KV blocks; try elsewhere or later.
            BadRequest: the sequence can never be served here.
            LocalError: no loaded span holds `[start, end)`.
        """

    def push(self, *hidden: HiddenOut) -> None:
        """Takes activations from the stage before, for open sequences. Those of one call are computed in one step if they fit."""

    def token(self, *drawn: TokenOut) -> None:
        """Takes tokens drawn by the last stage, on the first stage, which computes them next. Those of one call share a step."""

    def close(self, key: SequenceKey) -> None:
        """Frees the sequence, at the latest after the step under way; no effect for an unknown key."""

    def close_streams(self, keep: Callable[[StreamId], bool]) -> None:
        """Frees every sequence for whose stream `keep` returns False, for instance because its entry node died."""

    def load_report(self) -> Load: ...

    def has_model(self, model: ModelId) -> bool:
        """Returns whether a span of the model is loaded."""

    def room(self, model: ModelId) -> int:
        """Returns how many more sequences of usual length the loaded spans of a model have memory for."""

    def overdue_s(self) -> float:
        """Returns for how long the step under way has taken longer than earlier steps explain, in seconds; 0 if it has not."""

    def statistics(self) -> object:
        """Returns a frozen dataclass of counters and of the loaded spans, for metrics."""
