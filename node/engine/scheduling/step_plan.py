"""What the scheduler hands the worker for a step, and what comes back. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mesh.view import Span
from node.engine.api import Lane, SequenceKey, SequenceLost
from node.engine.kv.blocks import BlockPool
from node.engine.scheduling.sequence import PushedActivations, StageSequence


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """One sequence's share of a step: positions `position … position + count - 1`, as tokens or as pushed activations."""

    sequence: StageSequence
    position: int
    count: int
    tokens: tuple[int, ...] = ()
    pushed: tuple[PushedActivations, ...] = ()  # may begin before `position` and end behind the chunk
    restore: tuple[int, ...] = ()  # pages that hold all positions before; read before anything is computed
    names: tuple[bytes, ...] = ()  # for the next stage: of the pages that have become whole
    draft: tuple[int, ...] = ()  # the tokens at its last so many positions are guesses
    rewinds: int = 0  # of the sequence, when this was planned
    draws: bool = False  # the logits behind its last position, and those before its guesses, give the next tokens
    draws_from: int = 0  # with `draws`: the position of the first token to be drawn
    history: tuple[int, ...] = ()  # with `draws`: all tokens so far, if sampling or a grammar looks at them
    stop_ids: frozenset[int] = frozenset()  # with `draws`: tokens that end the sequence


@dataclass(frozen=True, slots=True)
class StepPlan:
    number: int
    lane: Lane | None  # None: nothing to compute
    chunks: tuple[ScheduledChunk, ...]
    lost: tuple[SequenceLost, ...]
    freed: tuple[SequenceKey, ...]  # sequences gone since the last plan: their tensors can go
    dropped: tuple[tuple[Span, int], ...] = ()  # pages gone since the last plan
    spilling: tuple[tuple[Span, int], ...] = ()  # pages to be spilled once those are gone, before the step


@dataclass(frozen=True, slots=True)
class Drawn:
    """What the sampler made of a chunk that draws; `token` None: no token can be drawn from these logits."""

    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    ends: bool = False  # the grammar allows nothing behind this token
    why_none: str = ""  # with no token: the reason, where it is not the logits


@dataclass(frozen=True, slots=True)
class SchedulerStatistics:
    sequences: int
    blocks_used: int
    blocks_total: int
    steps: int
    opened: int
    finished: int
    evicted: int
    failed: int
    dropped: int  # pushes, tokens and opens that came twice, too early or too late
    pages: int = 0
    spilled_pages: int = 0  # those of them that are spilled
    prompt_tokens: int = 0  # of all sequences that a first stage took up
    cached_tokens: int = 0  # those of them that pages held
    guessed_tokens: int = 0  # by first stages
    true_guesses: int = 0
    preempted: int = 0  # sequences that gave their blocks up and waited here for others
    overdue: int = 0  # sequences whose deadline passed
    isolated: int = 0  # steps that failed and were tried again sequence by sequence, or without the youngest


@dataclass(frozen=True, slots=True, eq=False)
class HeldSpan:
    """What the scheduler must know of a loaded span."""

    pool: BlockPool
    layers: int  # of the whole model
    hidden_size: int
    vocab_size: int
    max_model_len: int
    end_ids: frozenset[int]  # the model's own end-of-sequence tokens
    whole_only: bool = False  # its layers cannot be served apart
    exact: bool = True  # its kernels give the same bits however sequences are cut: what guessing rests on
    weights: str = ""  # which they are (`mesh.manifest`)


def chunk_of(sequence: StageSequence, count: int, stop_ids: frozenset[int]) -> ScheduledChunk:
    """The next `count` positions of a sequence. `stop_ids`: what ends it, should the chunk draw."""
    position, end = sequence.computed, sequence.computed + count
    draws = sequence.last and end >= sequence.known
    sampling = sequence.opened.sampling
    looks_back = sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0
    looks_back = looks_back or sampling.grammar is not None
    sequence.learn_names()
    sequence.void_from = math.inf
    return ScheduledChunk(
        sequence,
        position,
        count,
        tokens=tuple([*sequence.tokens, *sequence.draft][position:end]) if sequence.first else (),
        pushed=() if sequence.first else tuple(part for part in sequence.pushed if part.position < end),
        restore=tuple(sequence.restoring),
        names=() if sequence.last else tuple(sequence.names[sequence.names_sent :]),
        draft=tuple(sequence.draft[max(0, position - sequence.known) : max(0, end - sequence.known)]),
        rewinds=sequence.rewinds,
        draws=draws,
        draws_from=sequence.known,
        history=tuple(sequence.tokens) if draws and looks_back else (),
        stop_ids=stop_ids if draws else frozenset(),
    )
