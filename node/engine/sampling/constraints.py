"""Samples a step's tokens under grammars: which tokens may come next is a pure function of (grammar, answer so far).

A matcher keeps the state it reached, for speed alone: for another answer it rolls back to the common beginning and consumes the
rest. So failover, preemption and speculation need nothing but the tokens. Each loaded model has one table of its tokens, built at
the first request that needs it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock

import llguidance
import llguidance.hf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mesh.errors import BadRequest, LocalError
from mesh.ids import ModelId
from node.engine.api import OpenSequence, SequenceKey
from node.engine.sampling import sampler
from node.engine.scheduling.step_plan import Drawn, ScheduledChunk, StepPlan
from node.requests import Grammar
from node.text.grammar import compiled


def draw(plan: StepPlan, logits: torch.Tensor, constraints: Constraints) -> dict[SequenceKey, list[Drawn]]:
    """`logits` `[chunks that draw, with a row more for each of their guesses, vocab]`, float32."""
    drawing = [chunk for chunk in plan.chunks if chunk.draws]
    rows = iter(logits.numpy() if drawing else ())  # without any, what came out are activations, in bfloat16 at times
    return {chunk.sequence.key: _draw_chunk(chunk, rows, constraints) for chunk in drawing}


def _draw_chunk(chunk: ScheduledChunk, rows: Iterator[NDArray[np.float32]], constraints: Constraints) -> list[Drawn]:
    logits = [next(rows) for _ in range(len(chunk.draft) + 1)]
    history = list(chunk.history)
    drawn: list[Drawn] = []
    for number, guess in enumerate([*chunk.draft, None]):
        at = chunk.draws_from + number
        one = constraints.draw(logits[number], chunk.sequence.opened, at, history, chunk.stop_ids)
        drawn.append(one)
        if one.token is None or one.token != guess or one.ends:
            break
        if chunk.history:
            history.append(one.token)
    return drawn


KEPT = 64  # compiled grammars of one model


class Ungrammatical(Exception):
    """The answer so far is not one that the grammar allows, or going on with it exceeds the grammar's limits."""


class GrammarConstraint:
    """One sequence's grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._taken: list[int] = []
        self._vocab_size = vocab_size
        self._ends = [end for end in sorted(end_ids) if end < vocab_size]

    def allowed(self, answer: Sequence[int], *, may_end: bool = True) -> NDArray[np.bool_]:
        """`[vocab]`: the tokens that may follow `answer`. `may_end` False leaves the end tokens out, unless only they are left.

        Raises:
            Ungrammatical: also where no token may follow.
        """
        self._move_to(answer)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise Ungrammatical("the grammar became too complex to follow")
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(np.bool_)
        if not may_end:
            without = mask.copy()
            without[self._ends] = False
            mask = without if without.any() else mask
        if not mask.any():
            raise Ungrammatical("the grammar allows nothing more")
        return mask

    def complete(self, answer: Sequence[int]) -> bool:
        """Whether nothing but the end may follow `answer`."""
        self._move_to(answer)
        return bool(self._matcher.is_stopped())

    def _move_to(self, answer: Sequence[int]) -> None:
        wanted = list(answer)
        common = len(self._taken)
        if wanted[:common] != self._taken:
            common = next(i for i, (mine, other) in enumerate(zip([*self._taken, -1], [*wanted, -2])) if mine != other)
            if not self._matcher.rollback(len(self._taken) - common):
                self._matcher.reset()
                common = 0
            del self._taken[common:]
        fresh = wanted[common:]
        if self._matcher.is_error() or (fresh and not self._matcher.consume_tokens(fresh)):
            raise Ungrammatical("the answer so far does not fit the grammar")
        self._taken = wanted


class CompiledGrammars:
    """Grammars compiled for one model. `prepare` in worker threads, `constraint` in the engine's."""

    def __init__(self, directory: Path, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._directory = directory
        self._vocab_size = vocab_size
        self._end_ids = end_ids
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._matchers: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()
        self._lock = Lock()

    def prepare(self, grammar: Grammar) -> None:
        """Compiles `grammar` for this model, once (*blocking*; the first time also reads the tokenizer).

        Raises:
            BadRequest: it does not compile within the limits, or the model's tokens cannot be read.
        """
        self._matcher(grammar)

    def constraint(self, grammar: Grammar) -> GrammarConstraint:
        """For a new sequence; microseconds for a grammar that is prepared. Raises BadRequest, as `prepare`."""
        return GrammarConstraint(self._matcher(grammar).deep_copy(), self._vocab_size, self._end_ids)

    def _matcher(self, grammar: Grammar) -> llguidance.LLMatcher:
        with self._lock:
            known = self._matchers.get(grammar)
            if known is not None:
                self._matchers.move_to_end(grammar)
                return known
            tokenizer = self._tokenizer = self._tokenizer or self._read_tokenizer(grammar.param)
        matcher = compiled(grammar, tokenizer)
        with self._lock:
            self._matchers[grammar] = matcher
            while len(self._matchers) > KEPT:
                self._matchers.popitem(last=False)
        return matcher

    def _read_tokenizer(self, param: str) -> llguidance.LLTokenizer:
        try:
            tokenizer = AutoTokenizer.from_pretrained(self._directory, local_files_only=True, trust_remote_code=False)
            if not isinstance(tokenizer, PreTrainedTokenizerFast):
                raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer")
            ends = sorted(self._end_ids) or tokenizer.eos_token_id
            return llguidance.hf.from_tokenizer(tokenizer, n_vocab=self._vocab_size, eos_token=ends)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise BadRequest(f"{param}: this model's tokens cannot be read for a grammar: {reason}", param) from None


class Constraints:
    """The grammars of all models that end here, and the states of the sequences under way."""

    def __init__(self) -> None:
        self._books: dict[ModelId, CompiledGrammars] = {}
        self._of: dict[SequenceKey, GrammarConstraint] = {}  # the engine thread's

    def serve(self, model: ModelId, directory: Path, vocab_size: int, end_ids: frozenset[int]) -> None:
        """The last layers of `model` are served here from now on."""
        self._books[model] = CompiledGrammars(directory, vocab_size, end_ids)

    def prepare(self, sequence: OpenSequence) -> None:
        """Compiles the sequence's grammar, if it has one and is drawn here (*blocking*). Raises BadRequest."""
        book = self._books.get(sequence.model)
        if sequence.sampling.grammar is not None and book is not None:
            book.prepare(sequence.sampling.grammar)

    def forget(self, key: SequenceKey) -> None:
        self._of.pop(key, None)

    def draw(
        self,
        logits: NDArray[np.float32],
        sequence: OpenSequence,
        position: int,
        history: Sequence[int],
        stop_ids: Collection[int],
    ) -> Drawn:
        """The token for `position`, as `sampler.draw`, within the sequence's grammar if it has one.

        `history`: all tokens before `position`. An answer that cannot go on gives a `Drawn` without a token.
        """
        grammar, params = sequence.sampling.grammar, sequence.sampling
        if grammar is None:
            return sampler.draw(logits, params, position, sequence.prompt_tokens, history, stop_ids)
        answer = list(history[sequence.prompt_tokens :])
        try:
            constraint = self._of.get(sequence.key) or self._of.setdefault(sequence.key, self._constraint(sequence))
            allowed = constraint.allowed(answer, may_end=not params.ignore_eos)
            drawn = sampler.draw(logits, params, position, sequence.prompt_tokens, history, stop_ids, allowed)
            if drawn.token is None:
                return drawn
            return replace(drawn, ends=constraint.complete([*answer, drawn.token]))
        except (Ungrammatical, BadRequest) as error:
            return Drawn(None, why_none=f"{grammar.param}: {error}")

    def _constraint(self, sequence: OpenSequence) -> GrammarConstraint:
        book = self._books.get(sequence.model)
        if book is None or sequence.sampling.grammar is None:
            raise LocalError(f"the last layers of {sequence.model} are not served here")
        return book.constraint(sequence.sampling.grammar)
