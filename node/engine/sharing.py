"""How a step's token budget is split among the rows of a lane that could compute something."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from node.engine.rows import Row

PREFILL_SHARE = 4  # one part in so many of a step's budget is kept for prefill


def share(ready: Iterable[Row], step_tokens: int) -> Iterator[tuple[Row, int]]:
    """Splits the budget: (row, tokens) pairs."""
    rows = sorted(ready, key=lambda row: (row.served, row.age))
    decodes = [row for row in rows if row.ready == 1]
    prefills = sorted((row for row in rows if row.ready > 1), key=lambda row: row.age)
    left = step_tokens
    kept = -(-left // PREFILL_SHARE) if prefills else 0
    if prefills and left == 1 and decodes and decodes[0].served < prefills[0].served:
        kept = 0  # a budget of one token: take turns
    for row in decodes[: left - kept]:
        left -= 1
        yield row, 1
    for row in prefills:
        if left < 1:
            return
        count = min(row.ready, left)
        left -= count
        yield row, count
