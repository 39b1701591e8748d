"""Whether pages are worth fetching from a peer: only where their bytes take less time than computing them would."""

from __future__ import annotations

MIN_PAGES = 4  # fewer are computed within a few steps
PROBE_PAGES = 2  # fetched to see how fast the link is, where that is not known
BATCH_BYTES = 8 << 20  # of one answer: the link is shared with activations and tokens, whose frames wait behind it


def pages_to_fetch(missing: int, page_bytes: int, page_tokens: int, link_bytes_s: float | None, prefill_tok_s: float) -> int:
    """How many of the `missing` pages to ask for now; 0: it is no use.

    `link_bytes_s`: measured, from asking to having; None: not known. `prefill_tok_s`: measured; 0: not known, and then what
    is not known to be slow is not replaced.
    """
    if link_bytes_s is None:
        return PROBE_PAGES if missing >= MIN_PAGES else 0
    if missing < 1 or prefill_tok_s <= 0.0 or page_bytes / link_bytes_s >= page_tokens / prefill_tok_s:
        return 0
    return min(missing, max(1, BATCH_BYTES // page_bytes))
