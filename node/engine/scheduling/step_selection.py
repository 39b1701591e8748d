"""Selects which sequences of a lane a step computes, and how many positions of each: token budget, groups, and guesses.

Decoding sequences go first: the more important first, and of equals the one served longest ago. A quarter of the budget is
reserved for prefill while a prefill is ready, again the more important first, and of equals the oldest. The priority of a
sequence rises by one for every `AGEING_STEPS` steps that it waits, so every sequence is served in the end, however many more
important ones arrive later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mesh.view import Span
from node.engine.api import Lane
from node.engine.scheduling.microbatches import Microbatches
from node.engine.scheduling.sequence import StageSequence
from node.engine.scheduling.speculation import MAX_GUESS, StepCosts

PREFILL_SHARE = 4  # one part in so many of a step's budget is reserved for prefill
AGEING_STEPS = 16


class StepSelection:
    def __init__(self, step_tokens: int, speculates: bool) -> None:
        self.step_tokens = step_tokens
        self.speculates = speculates
        self.costs = StepCosts()
        self.guessed_tokens = 0
        self._groups: dict[Lane, Microbatches] = {}
        self._tokens_returned: dict[Lane, int] = {}  # since the lane's last step

    def token_returned(self, sequence: StageSequence, now_s: float) -> None:
        """Counts a drawn token that came back to a first stage which is not also the last."""
        self._tokens_returned[sequence.lane] = self._tokens_returned.get(sequence.lane, 0) + 1
        self._groups_of(sequence).round_trip_observed(now_s - sequence.planned_at_s)

    def forget_span(self, span: Span) -> None:
        """Forgets what was measured for the span's lanes. Measurements outlive sequences; there are few lanes for a span."""
        self._groups = {lane: groups for lane, groups in self._groups.items() if lane.span != span}
        self._tokens_returned = {lane: tokens for lane, tokens in self._tokens_returned.items() if lane.span != span}

    def select(self, lane: Lane, sequences: Iterable[StageSequence], step: int, now_s: float) -> list[tuple[StageSequence, int]]:
        """Returns the sequences of the lane that step number `step` computes, with counts of positions; no guesses yet."""
        sequences = list(sequences)
        ready = [sequence for sequence in sequences if sequence.ready > 0]
        isolated = [sequence for sequence in ready if sequence.isolated]
        # A sequence with which a step failed runs alone: if that step fails too, this sequence is the cause.
        return split_budget(isolated[:1] or ready, self.step_tokens, step, self._max_decodes(lane, sequences, now_s))

    def earliest_begin_s(self, sequences: list[StageSequence], now_s: float) -> float:
        """Returns when a step of a lane's sequences may begin if nothing else happens until then; some must be ready."""
        if not sequences[0].on_first_stage or sequences[0].on_last_stage:
            return now_s
        ready = [sequence for sequence in sequences if sequence.ready > 0]
        if not all(sequence.decodes for sequence in ready) or any(sequence.isolated for sequence in ready):
            return now_s
        return self._groups_of(sequences[0]).wait_until_s(len(ready), sum(map(_is_answering, sequences)), now_s)

    def _max_decodes(self, lane: Lane, sequences: list[StageSequence], now_s: float) -> int:
        """Returns how many decoding sequences the step may take: one group of them on a first stage that is not also the last."""
        if not sequences or lane.start > 0 or sequences[0].on_last_stage:
            return len(sequences)
        answering = sum(map(_is_answering, sequences))
        groups = self._groups_of(sequences[0])
        groups.tokens_returned(self._tokens_returned.pop(lane, 0), answering, now_s)
        groups.step_planned()
        return groups.group_size(answering)

    def _groups_of(self, sequence: StageSequence) -> Microbatches:
        lane = sequence.lane
        if lane not in self._groups:
            self._groups[lane] = Microbatches(stages=-(-sequence.model_layers // (lane.end - lane.start)))
        return self._groups[lane]

    def add_drafts(
        self, selected: list[tuple[StageSequence, int]], spare_tokens: Callable[[StageSequence], int]
    ) -> list[tuple[StageSequence, int]]:
        """Returns the selection with guesses added where they pay, for a first stage whose path is exact.

        `spare_tokens`: how many guesses fit into the blocks of a sequence.
        """
        if not self.speculates:
            return selected
        rows, tokens = sum(count for _, count in selected), float(len(selected))
        with_drafts = []
        for sequence, count in selected:
            if sequence.decodes and not sequence.isolated:
                draft = sequence.propose_draft(min(MAX_GUESS, self.step_tokens - rows, spare_tokens(sequence)))
                expected_tokens = sequence.next_draft.rate * len(draft)
                if draft and self.costs.pays(rows, tokens, len(draft), expected_tokens):
                    sequence.draft, sequence.draft_length = list(draft), len(draft)
                    self.guessed_tokens += len(draft)
                    count += len(draft)
                    rows, tokens = rows + len(draft), tokens + expected_tokens
            with_drafts.append((sequence, count))
        assert rows <= self.step_tokens
        return with_drafts


def split_budget(
    ready: Iterable[StageSequence], step_tokens: int, step: int = 0, max_decodes: int | None = None
) -> list[tuple[StageSequence, int]]:
    """Splits a step's token budget among sequences that have ready positions: (sequence, positions) pairs.

    `step`: the number of the step that is planned; `max_decodes`: how many decoding sequences it may take, None: all.
    """
    sequences = list(ready)

    def decode_order(sequence: StageSequence) -> tuple[int, int, int]:
        aged_priority = sequence.request.priority - (step - sequence.served_step) // AGEING_STEPS
        return aged_priority, sequence.served_step, sequence.number

    def prefill_order(sequence: StageSequence) -> tuple[int, int]:
        return sequence.request.priority - (step - sequence.admitted_step) // AGEING_STEPS, sequence.number

    decodes = sorted((sequence for sequence in sequences if sequence.decodes), key=decode_order)
    prefills = sorted((sequence for sequence in sequences if not sequence.decodes), key=prefill_order)
    reserved = -(-step_tokens // PREFILL_SHARE) if prefills else 0
    if prefills and step_tokens == 1 and decodes and decode_order(decodes[0]) < decode_order(prefills[0]):
        reserved = 0  # a budget of one token cannot be split: decode and prefill take turns
    left = step_tokens
    selected = []
    for sequence in decodes[:max_decodes]:
        count = min(sequence.ready, left - reserved)
        if count < 1:
            break
        left -= count
        selected.append((sequence, count))
    for sequence in prefills:
        if left < 1:
            break
        count = min(sequence.ready, left)
        left -= count
        selected.append((sequence, count))
    assert left >= 0
    return selected


def _is_answering(sequence: StageSequence) -> bool:
    """Returns whether all known tokens but the last are computed; a sequence of one token is answering from the start."""
    return sequence.computed >= sequence.request.known - 1 and not sequence.preempted
