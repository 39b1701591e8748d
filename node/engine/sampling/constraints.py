"""Draws the tokens of a step, within the grammars of their sequences: what may come next is a function of (grammar, answer).

A matcher keeps the state that it reached, for speed alone: for another answer it rolls back to the common beginning and consumes
the rest. So failover, preemption and speculation need nothing but the tokens. The grammars of a model are compiled over its
own token table, which is built at the first request that needs it.
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
from node.engine.scheduling.sequence import DrawResult, ScheduledChunk, StepPlan
from node.requests import Grammar
from node.text.grammar import compiled

MAX_COMPILED = 64  # grammars of one model


class Ungrammatical(Exception):
    """The grammar does not allow the answer so far, or to continue it exceeds the limits of the matcher."""


class GrammarConstraint:
    """The grammar of one sequence, and the state that its matcher reached."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._consumed: list[int] = []
        self._vocab_size = vocab_size
        self._end_ids = [end for end in sorted(end_ids) if end < vocab_size]

    def allowed(self, answer: Sequence[int], *, may_end: bool = True) -> NDArray[np.bool_]:
        """Returns which tokens may follow `answer`, `[vocab]`. `may_end` False excludes end tokens, unless only they may follow.

        Raises:
            Ungrammatical: the grammar does not allow `answer`, or no token may follow it.
        """
        self._move_to(answer)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise Ungrammatical("the grammar became too complex to follow")
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little").astype(np.bool_)
        if not may_end:
            without_ends = mask.copy()
            without_ends[self._end_ids] = False
            mask = without_ends if without_ends.any() else mask
        if not mask.any():
            raise Ungrammatical("the grammar allows nothing more")
        return mask

    def complete(self, answer: Sequence[int]) -> bool:
        """Returns whether no token but the end may follow `answer`."""
        self._move_to(answer)
        return bool(self._matcher.is_stopped())

    def _move_to(self, answer: Sequence[int]) -> None:
        target = list(answer)
        common = len(self._consumed)
        if target[:common] != self._consumed:
            # The terminators differ, so that an answer which is a prefix of the other differs behind its end.
            common = next(i for i, (mine, other) in enumerate(zip([*self._consumed, -1], [*target, -2])) if mine != other)
            if not self._matcher.rollback(len(self._consumed) - common):
                self._matcher.reset()
                common = 0
            del self._consumed[common:]
        assert self._consumed == target[:common]
        further = target[common:]
        if self._matcher.is_error() or (further and not self._matcher.consume_tokens(further)):
            raise Ungrammatical("the answer so far does not fit the grammar")
        self._consumed = target


class CompiledGrammars:
    """Grammars compiled for one model. Worker threads call `prepare`, the engine thread `constraint`."""

    def __init__(self, directory: Path, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._directory = directory
        self._vocab_size = vocab_size
        self._end_ids = end_ids
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._matchers: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()
        self._lock = Lock()

    def prepare(self, grammar: Grammar) -> None:
        """Compiles `grammar` for this model, once (*blocking*; the first call also reads the tokenizer).

        Raises:
            BadRequest: the grammar does not compile within the limits, or the model's tokens cannot be read.
        """
        self._matcher(grammar)

    def constraint(self, grammar: Grammar) -> GrammarConstraint:
        """Returns the constraint of a new sequence, within microseconds after `prepare`. Raises BadRequest, as `prepare`."""
        return GrammarConstraint(self._matcher(grammar).deep_copy(), self._vocab_size, self._end_ids)

    def _matcher(self, grammar: Grammar) -> llguidance.LLMatcher:
        with self._lock:
            matcher = self._matchers.get(grammar)
            if matcher is not None:
                self._matchers.move_to_end(grammar)
                return matcher
            tokenizer = self._tokenizer = self._tokenizer or self._read_tokenizer(grammar.param)
        matcher = compiled(grammar, tokenizer)  # without the lock: compiling may take long, and other grammars are in use
        with self._lock:
            self._matchers[grammar] = matcher
            while len(self._matchers) > MAX_COMPILED:
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


class StepSampler:
    """Draws the tokens of a step on the last stage, and holds the grammars of the models whose last layers are loaded."""

    def __init__(self) -> None:
        self._grammars: dict[ModelId, CompiledGrammars] = {}
        self._constraints: dict[SequenceKey, GrammarConstraint] = {}  # used by the engine thread alone

    def serve(self, model: ModelId, grammars: CompiledGrammars) -> None:
        """Draws for `model` from now on; the last layers of the model are loaded."""
        self._grammars[model] = grammars

    def prepare(self, request: OpenSequence) -> None:
        """Compiles the grammar of a sequence that is drawn here, if it has one (*blocking*). Raises BadRequest."""
        grammars = self._grammars.get(request.model)
        if request.sampling.grammar is not None and grammars is not None:
            grammars.prepare(request.sampling.grammar)

    @property
    def constrained_sequences(self) -> int:
        """How many sequences have a matcher state."""
        return len(self._constraints)

    def forget(self, key: SequenceKey) -> None:
        self._constraints.pop(key, None)

    def draw_step(self, plan: StepPlan, logits: torch.Tensor) -> dict[SequenceKey, list[DrawResult]]:
        """Draws for each chunk that draws: the next token, and one more behind each guess that proves right.

        `logits`: float32 `[rows, vocab]`, for each such chunk one row and one more for each of its guesses.
        """
        chunks = [chunk for chunk in plan.chunks if chunk.draws]
        # If no chunk draws, the tensor holds activations, possibly bfloat16, which numpy does not have.
        rows = iter(logits.numpy() if chunks else ())
        return {chunk.sequence.key: self._draw_chunk(chunk, rows) for chunk in chunks}

    def _draw_chunk(self, chunk: ScheduledChunk, rows: Iterator[NDArray[np.float32]]) -> list[DrawResult]:
        logits = [next(rows) for _ in range(len(chunk.draft) + 1)]
        history = list(chunk.history)
        drawn: list[DrawResult] = []
        for number, guess in enumerate([*chunk.draft, None]):
            position = chunk.draws_from + number
            result = self.draw(logits[number], chunk.sequence.request, position, history, chunk.stop_ids)
            drawn.append(result)
            # The rows behind a wrong guess, or behind the end, were computed from tokens that are not in the answer.
            if result.token is None or result.token != guess or result.ends:
                break
            if chunk.history:
                history.append(result.token)
        return drawn

    def draw(
        self,
        logits: NDArray[np.float32],
        request: OpenSequence,
        position: int,
        history: Sequence[int],
        stop_ids: Collection[int],
    ) -> DrawResult:
        """Draws the token for `position`, as `sampler.draw`, within the grammar of the sequence if it has one.

        `logits`: `[vocab]`; `history`: all tokens before `position`, needed for penalties and grammars only. An answer that
        the grammar does not allow to continue gives a result without a token.
        """
        grammar, params = request.sampling.grammar, request.sampling
        if grammar is None:
            return sampler.draw(logits, params, position, request.prompt_tokens, history, stop_ids)
        assert len(history) == position
        answer = list(history[request.prompt_tokens :])
        try:
            constraint = self._constraints.get(request.key)
            if constraint is None:
                constraint = self._constraints[request.key] = self._constraint(request.model, grammar)
            allowed = constraint.allowed(answer, may_end=not params.ignore_eos)
            drawn = sampler.draw(logits, params, position, request.prompt_tokens, history, stop_ids, allowed)
            if drawn.token is None:
                return drawn
            return replace(drawn, ends=constraint.complete([*answer, drawn.token]))
        except (Ungrammatical, BadRequest) as error:
            return DrawResult(None, why_none=f"{grammar.param}: {error}")

    def _constraint(self, model: ModelId, grammar: Grammar) -> GrammarConstraint:
        if model not in self._grammars:
            raise LocalError(f"the last layers of {model} are not served here")
        return self._grammars[model].constraint(grammar)
