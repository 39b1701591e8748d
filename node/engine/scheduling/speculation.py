"""Guesses the next tokens from the text itself: what followed the same three tokens before may follow them again.

Answers copy: quotations, code that is edited, lists, JSON keys. The guessed tokens are computed together with the token before
them, as a chunk of a prefill is, and the sampler draws at each position as usual; the answer keeps the drawn tokens up to the
first guess that differs. A draw depends on (seed, position, logits) alone and logits on tokens alone, so no guess can change a
token, at any temperature: a wrong guess costs the rows that were computed for it, nothing else (prompt lookup: A. Saxena, 2023;
`ngram` in vLLM and transformers).

What remains to decide is when a guess pays. Each sequence tries longer guesses while its guesses are right, and pauses for
longer and longer when they are wrong; and a step takes a guess only where the measured times of steps of that many rows promise
more tokens a millisecond with the guess than without. On a CPU a few rows cost about what one row costs; with thirty sequences
in a step guesses gain nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

NGRAM_TOKENS = 3  # tokens that must have occurred before: two match by accident too often, four miss the first repeated word
FIRST_GUESS = 3  # with the token before it four rows, which cost about what one does
MAX_GUESS = 15  # sixteen rows
MAX_PAUSE_STEPS = 256
AVERAGING = 0.2  # weight of the newest measurement


@dataclass(slots=True)
class NgramLookup:
    """Where each run of `NGRAM_TOKENS` tokens of one growing text ended last."""

    _ends: dict[tuple[int, ...], int] = field(default_factory=dict)
    _indexed: int = NGRAM_TOKENS - 1

    def guess(self, tokens: Sequence[int], max_tokens: int) -> tuple[int, ...]:
        """Returns up to `max_tokens` tokens that may follow; empty if the last `NGRAM_TOKENS` of `tokens` are new.

        `tokens` must begin with the tokens of the last call. A text that repeats itself is continued periodically, however
        short the period.
        """
        assert self._indexed <= max(len(tokens), NGRAM_TOKENS - 1)
        # The newest run itself is not indexed yet: the lookup below must find an earlier occurrence.
        for end in range(self._indexed + 1, len(tokens)):
            self._ends[tuple(tokens[end - NGRAM_TOKENS : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
        if max_tokens < 1 or len(tokens) < NGRAM_TOKENS:
            return ()
        found = self._ends.get(tuple(tokens[len(tokens) - NGRAM_TOKENS :]))
        if found is None:
            return ()
        period = len(tokens) - found
        return tuple(tokens[found + index % period] for index in range(max_tokens))


@dataclass(slots=True)
class DraftLength:
    """How many tokens to guess next for one sequence."""

    length: int = FIRST_GUESS
    rate: float = 0.5  # share of guessed tokens that were right
    _misses: int = 0
    _pause_steps: int = 0

    def next_length(self) -> int:
        """Returns the length of the next guess; 0 during a pause. Called once a step."""
        if self._pause_steps > 0:
            self._pause_steps -= 1
            return 0
        return self.length

    def verified(self, guessed: int, right: int) -> None:
        """Adapts to the outcome: the first `right` of `guessed` tokens were right."""
        assert 0 <= right <= guessed
        self.rate += (right / guessed - self.rate) * AVERAGING
        if right == guessed:
            self.length = min(MAX_GUESS, 2 * self.length + 1)
            self._misses = 0
        elif right > 0:
            self.length = max(FIRST_GUESS, self.length // 2)
            self._misses = 0
        else:
            self.length = FIRST_GUESS
            self._misses += 1
            self._pause_steps = min(MAX_PAUSE_STEPS, 2**self._misses)


@dataclass(slots=True)
class StepCosts:
    """Running averages of the measured times of steps, by the number of rows rounded up to a power of two."""

    _ms: dict[int, float] = field(default_factory=dict)

    def measured(self, rows: int, took_ms: float) -> None:
        exponent = (rows - 1).bit_length()
        before = self._ms.get(exponent, took_ms)
        self._ms[exponent] = before + (took_ms - before) * AVERAGING

    def pays(self, rows: int, tokens: float, more_rows: int, more_tokens: float) -> bool:
        """Returns whether a step of `rows` rows that brings `tokens` brings more tokens a millisecond with the additional rows.

        True where a size was never measured, so that each size is tried.
        """
        without = self._ms.get((rows - 1).bit_length())
        larger = self._ms.get((rows + more_rows - 1).bit_length())
        if without is None or larger is None:
            return True
        return (tokens + more_tokens) * without > tokens * larger
