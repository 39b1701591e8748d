"""When pages are fetched rather than computed: a table, and that it never asks where computing is cheaper."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.serving.page_exchange import BATCH_BYTES, MIN_PAGES, PROBE_PAGES, pages_to_fetch

MIB = 1 << 20


@pytest.mark.parametrize(
    ("missing", "page_bytes", "link_bytes_s", "prefill_tok_s", "count"),
    [
        (30, MIB, 100 * MIB, 300.0, 8),  # 10 ms against 107: a batch
        (5, MIB, 100 * MIB, 300.0, 5),
        (30, MIB, 8 * MIB, 300.0, 0),  # 125 ms
        (30, MIB, 100 * MIB, 4000.0, 0),  # a fast machine computes a page in 8 ms
        (30, 32 * MIB, 1000 * MIB, 300.0, 1),  # never less than a page
        (30, MIB, None, 300.0, PROBE_PAGES),  # the link is unknown: found out
        (MIN_PAGES - 1, MIB, None, 300.0, 0),  # and not worth finding out for so little
        (30, MIB, None, 0.0, PROBE_PAGES),
        (30, MIB, 100 * MIB, 0.0, 0),  # no prefill has been measured
        (0, MIB, 100 * MIB, 300.0, 0),
    ],
)
def test_how_many_pages_are_fetched(
    missing: int, page_bytes: int, link_bytes_s: float | None, prefill_tok_s: float, count: int
) -> None:
    assert pages_to_fetch(missing, page_bytes, 32, link_bytes_s, prefill_tok_s) == count


@given(st.integers(0, 500), st.integers(1, 1 << 26), st.floats(1.0, 1e11), st.floats(0.0, 1e6))
def test_pages_are_fetched_only_if_computing_takes_longer(missing: int, page_bytes: int, link: float, prefill: float) -> None:
    count = pages_to_fetch(missing, page_bytes, 32, link, prefill)
    assert 0 <= count <= missing and (count <= 1 or count * page_bytes <= BATCH_BYTES)
    assert count == 0 or page_bytes / link < 32 / prefill
