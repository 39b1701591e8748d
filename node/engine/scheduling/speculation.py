"""Guessing the next tokens from the text itself: what came behind the same three tokens before may well come again.

Answers copy: quotations, code that is edited, lists, JSON keys. A guess is computed together with the token before it, as a
chunk of a prefill would be, and the sampler draws at each position as it always does; the answer keeps what it drew itself
up to the first guess that differs. Drawing depends on (seed, position, logits) alone and logits on tokens alone, so no guess
can change a token, at any temperature: a wrong one costs the rows it took, nothing else (prompt lookup: A. Saxena, 2023;
as `ngram` in vLLM and transformers).

So the only question is what pays. Each sequence tries longer guesses while they come true, and rests for longer and longer
when they do not; and a step takes a guess only where steps of that many rows were measured to bring more tokens a
millisecond with it than without. On a CPU a few rows cost what one costs, thirty sequences at once leave nothing to gain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

MATCHED = 3  # tokens that must have occurred before: two match by accident too often, four miss the first repeated word
FIRST_GUESS = 3  # with the token before it four rows, which cost about what one does
MAX_GUESS = 15  # sixteen rows
MAX_REST = 256  # tokens
AVERAGING = 0.2  # weight of the newest measurement


@dataclass(slots=True)
class NgramLookup:
    """Where each run of `MATCHED` tokens of one growing text ended last."""

    _ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    _indexed: int = MATCHED - 1

    def guess(self, tokens: Sequence[int], most: int) -> tuple[int, ...]:
        """Up to `most` tokens that may follow `tokens`, which only ever grow; empty when their end is new.

        A text that repeats itself is continued round and round, however short its period.
        """
        for end in range(self._indexed + 1, len(tokens)):
            self._ends[tuple(tokens[end - MATCHED : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
        if most < 1 or len(tokens) < MATCHED:
            return ()
        at = self._ends.get(tuple(tokens[len(tokens) - MATCHED :]))
        if at is None:
            return ()
        period = len(tokens) - at
        return tuple(tokens[at + index % period] for index in range(most))


@dataclass(slots=True)
class DraftLength:
    """How long the next guess of one sequence may be."""

    length: int = FIRST_GUESS
    rate: float = 0.5  # of guessed tokens that came true
    _misses: int = 0
    _rest: int = 0

    def next(self) -> int:
        """To be asked once a step; 0 while it rests."""
        if self._rest > 0:
            self._rest -= 1
            return 0
        return self.length

    def verified(self, guessed: int, true: int) -> None:
        """`true` of `guessed` tokens came true, from the first on."""
        self.rate += (true / guessed - self.rate) * AVERAGING
        if true == guessed:
            self.length = min(MAX_GUESS, 2 * self.length + 1)
            self._misses = 0
        elif true > 0:
            self.length = max(FIRST_GUESS, self.length // 2)
            self._misses = 0
        else:
            self.length = FIRST_GUESS
            self._misses += 1
            self._rest = min(MAX_REST, 2**self._misses)


@dataclass(slots=True)
class StepCosts:
    """What a step of so many rows takes here, as far as steps were measured: running averages by power of two."""

    _ms: dict[int, float] = field(default_factory=dict)

    def measured(self, rows: int, took_ms: float) -> None:
        bucket = _bucket(rows)
        before = self._ms.get(bucket, took_ms)
        self._ms[bucket] = before + (took_ms - before) * AVERAGING

    def pays(self, rows: int, tokens: float, more_rows: int, more_tokens: float) -> bool:
        """Whether a step of `rows` rows, expected to bring `tokens`, brings more tokens a millisecond with the additional ones.

        A size that was never measured is tried.
        """
        without, larger = self._ms.get(_bucket(rows)), self._ms.get(_bucket(rows + more_rows))
        if without is None or larger is None:
            return True
        return (tokens + more_tokens) * without > tokens * larger


def _bucket(rows: int) -> int:
    return (rows - 1).bit_length()
