"""How a step's token budget is split among the rows of a lane that could compute something.

Rows that decode go first, the more urgent and then those not served for longest ahead; a quarter of the budget stays for
prefill while any waits, the more urgent and then the oldest sequence first. A row becomes more urgent by one priority for
every `AGEING_STEPS` that it waits, so whoever waits is served in the end, whatever comes after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from node.engine.scheduling.sequence import StageSequence

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
