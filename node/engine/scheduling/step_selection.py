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
    """Splits the budget: (row, tokens) pairs. `step`: the number of the step that is planned; `most_decodes`: rows that may."""
    rows = list(ready)

    def waits(row: StageSequence) -> tuple[int, int, int]:
        return row.opened.priority - (step - row.served) // AGEING_STEPS, row.served, row.age

    decodes = sorted((row for row in rows if row.decodes), key=waits)
    prefills = sorted(
        (row for row in rows if not row.decodes),
        key=lambda row: (row.opened.priority - (step - row.admitted) // AGEING_STEPS, row.age),
    )
    left = step_tokens
    kept = -(-left // PREFILL_SHARE) if prefills else 0
    if prefills and left == 1 and decodes and waits(decodes[0]) < waits(prefills[0]):
        kept = 0  # a budget of one token: take turns
    for row in decodes[:most_decodes]:
        count = min(row.ready, left - kept)
        if count < 1:
            break
        left -= count
        yield row, count
    for row in prefills:
        if left < 1:
            return
        count = min(row.ready, left)
        left -= count
        yield row, count


class StepSelection:
    def __init__(self, step_tokens: int, speculates: bool) -> None:
        self.step_tokens = step_tokens
        self.speculates = speculates
        self.costs = StepCosts()
        self.guessed_tokens = 0
        self._groups: dict[Lane, Microbatches] = {}
        self._came_back: dict[Lane, int] = {}  # tokens since the lane's last step

    def came_back(self, row: StageSequence, now: float) -> None:
        """The token drawn for a first stage's row that is not also the last."""
        self._came_back[row.lane] = self._came_back.get(row.lane, 0) + 1
        self._groups_of(row).was_away(now - row.planned_s)

    def forget(self, span: Span) -> None:
        """What was learnt of its lanes; they outlast their sequences, and are as few as a span has parts."""
        self._groups = {lane: groups for lane, groups in self._groups.items() if lane.span != span}
        self._came_back = {lane: tokens for lane, tokens in self._came_back.items() if lane.span != span}

    def rows(self, lane: Lane, rows: Iterable[StageSequence], step: int, now: float) -> list[tuple[StageSequence, int]]:
        """Of the lane's rows those that step number `step` computes, with their counts of positions. No guesses yet."""
        rows = list(rows)
        ready = [row for row in rows if row.ready > 0]
        suspects = [row for row in ready if row.alone]
        return list(share(suspects[:1] or ready, self.step_tokens, step, self._most_decodes(lane, rows, now)))

    def begins_s(self, rows: list[StageSequence], now: float) -> float:
        """When a step of a lane's rows may begin, of which some are ready, if nothing else happens until then."""
        if not rows[0].first or rows[0].last:
            return now
        ready = [row for row in rows if row.ready > 0]
        if not all(row.decodes for row in ready) or any(row.alone for row in ready):
            return now
        return self._groups_of(rows[0]).hold_until_s(len(ready), sum(map(_answers, rows)), now)

    def _most_decodes(self, lane: Lane, rows: list[StageSequence], now: float) -> int:
        if not rows or lane.start > 0 or rows[0].last:
            return len(rows)
        answering = sum(map(_answers, rows))
        groups = self._groups_of(rows[0])
        groups.came_back(self._came_back.pop(lane, 0), answering, now)
        groups.begun()
        return groups.most_rows(answering)

    def _groups_of(self, row: StageSequence) -> Microbatches:
        lane = row.lane
        if lane not in self._groups:
            self._groups[lane] = Microbatches(stages=-(-row.layers // (lane.end - lane.start)))
        return self._groups[lane]

    def with_guesses(
        self, chosen: list[tuple[StageSequence, int]], spare: Callable[[StageSequence], int]
    ) -> list[tuple[StageSequence, int]]:
        """For a first stage whose path is exact: guesses where they pay. `spare`: how many there is room for."""
        if not self.speculates:
            return chosen
        rows, tokens = sum(count for _, count in chosen), float(len(chosen))
        with_guesses = []
        for row, count in chosen:
            if row.decodes and not row.alone:
                guess = row.guess(min(MAX_GUESS, self.step_tokens - rows, spare(row)))
                likely = row.pace.rate * len(guess)
                if guess and self.costs.pays(rows, tokens, len(guess), likely):
                    row.draft, row.guessed = list(guess), len(guess)
                    self.guessed_tokens += len(guess)
                    count += len(guess)
                    rows, tokens = rows + len(guess), tokens + likely
            with_guesses.append((row, count))
        return with_guesses


def _answers(row: StageSequence) -> bool:
    """Whether its prefill is done, or all but its last token: one of a single token decodes from the first."""
    return row.computed >= row.opened.known - 1 and not row.waiting
