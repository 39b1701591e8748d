"""Selects the sequences of a lane for a step, and how many positions of each: token budget, microbatches, worthwhile guesses.

Decoding sequences go first, ordered by priority and then by how long ago they were served. A quarter of the budget stays for
prefill while any waits, ordered by priority and then by age. A sequence gains one priority for every `AGEING_STEPS` that it
waits, so each one is served in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from mesh.view import Span
from node.engine.api import Lane
from node.engine.scheduling.microbatches import Microbatches
from node.engine.scheduling.sequence import StageSequence
from node.engine.scheduling.speculation import MAX_GUESS, StepCosts

PREFILL_SHARE = 4  # one part in so many of a step's budget is kept for prefill
AGEING_STEPS = 16


def share(
    ready: Iterable[StageSequence], step_tokens: int, step: int = 0, most_decodes: int | None = None
) -> Iterator[tuple[StageSequence, int]]:
    """Splits the budget: (sequence, tokens) pairs. `step`: its number; `most_decodes`: at most so many decode."""
    sequences = list(ready)

    def waits(sequence: StageSequence) -> tuple[int, int, int]:
        return sequence.opened.priority - (step - sequence.served) // AGEING_STEPS, sequence.served, sequence.age

    decodes = sorted((sequence for sequence in sequences if sequence.decodes), key=waits)
    prefills = sorted(
        (sequence for sequence in sequences if not sequence.decodes),
        key=lambda sequence: (sequence.opened.priority - (step - sequence.admitted) // AGEING_STEPS, sequence.age),
    )
    left = step_tokens
    kept = -(-left // PREFILL_SHARE) if prefills else 0
    if prefills and left == 1 and decodes and waits(decodes[0]) < waits(prefills[0]):
        kept = 0  # a budget of one token: take turns
    for sequence in decodes[:most_decodes]:
        count = min(sequence.ready, left - kept)
        if count < 1:
            break
        left -= count
        yield sequence, count
    for sequence in prefills:
        if left < 1:
            return
        count = min(sequence.ready, left)
        left -= count
        yield sequence, count


class StepSelection:
    def __init__(self, step_tokens: int, speculates: bool) -> None:
        self.step_tokens = step_tokens
        self.speculates = speculates
        self.costs = StepCosts()
        self.guessed_tokens = 0
        self._groups: dict[Lane, Microbatches] = {}
        self._tokens_returned: dict[Lane, int] = {}  # tokens since the lane's last step

    def tokens_returned(self, sequence: StageSequence, now: float) -> None:
        """The token drawn for a first stage's sequence that is not also the last."""
        self._tokens_returned[sequence.lane] = self._tokens_returned.get(sequence.lane, 0) + 1
        self._groups_of(sequence).round_trip_observed(now - sequence.planned_s)

    def forget(self, span: Span) -> None:
        """What was learnt of its lanes; they outlast their sequences, and are as few as a span has parts."""
        self._groups = {lane: groups for lane, groups in self._groups.items() if lane.span != span}
        self._tokens_returned = {lane: tokens for lane, tokens in self._tokens_returned.items() if lane.span != span}

    def select(self, lane: Lane, sequences: Iterable[StageSequence], step: int, now: float) -> list[tuple[StageSequence, int]]:
        """Of the lane's sequences those that step number `step` computes, with their counts of positions. No guesses yet."""
        sequences = list(sequences)
        ready = [sequence for sequence in sequences if sequence.ready > 0]
        suspects = [sequence for sequence in ready if sequence.alone]
        return list(share(suspects[:1] or ready, self.step_tokens, step, self._most_decodes(lane, sequences, now)))

    def begins_s(self, sequences: list[StageSequence], now: float) -> float:
        """When a step of a lane's sequences may begin, of which some are ready, if nothing else happens until then."""
        if not sequences[0].first or sequences[0].last:
            return now
        ready = [sequence for sequence in sequences if sequence.ready > 0]
        if not all(sequence.decodes for sequence in ready) or any(sequence.alone for sequence in ready):
            return now
        return self._groups_of(sequences[0]).hold_until_s(len(ready), sum(map(_answers, sequences)), now)

    def _most_decodes(self, lane: Lane, sequences: list[StageSequence], now: float) -> int:
        if not sequences or lane.start > 0 or sequences[0].last:
            return len(sequences)
        answering = sum(map(_answers, sequences))
        groups = self._groups_of(sequences[0])
        groups.tokens_returned(self._tokens_returned.pop(lane, 0), answering, now)
        groups.begun()
        return groups.most_rows(answering)

    def _groups_of(self, sequence: StageSequence) -> Microbatches:
        lane = sequence.lane
        if lane not in self._groups:
            self._groups[lane] = Microbatches(stages=-(-sequence.layers // (lane.end - lane.start)))
        return self._groups[lane]

    def with_guesses(
        self, chosen: list[tuple[StageSequence, int]], spare: Callable[[StageSequence], int]
    ) -> list[tuple[StageSequence, int]]:
        """For a first stage whose path is exact: guesses where they pay. `spare`: how many there is room for."""
        if not self.speculates:
            return chosen
        sequences, tokens = sum(count for _, count in chosen), float(len(chosen))
        with_guesses = []
        for sequence, count in chosen:
            if sequence.decodes and not sequence.alone:
                guess = sequence.guess(min(MAX_GUESS, self.step_tokens - sequences, spare(sequence)))
                likely = sequence.pace.rate * len(guess)
                if guess and self.costs.pays(sequences, tokens, len(guess), likely):
                    sequence.draft, sequence.guessed = list(guess), len(guess)
                    self.guessed_tokens += len(guess)
                    count += len(guess)
                    sequences, tokens = sequences + len(guess), tokens + likely
            with_guesses.append((sequence, count))
        return with_guesses


def _answers(sequence: StageSequence) -> bool:
    """Whether its prefill is done, or all but its last token: one of a single token decodes from the first."""
    return sequence.computed >= sequence.opened.known - 1 and not sequence.waiting
