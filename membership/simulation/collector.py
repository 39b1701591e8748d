"""Makes Python's garbage collector rare while a mesh is simulated: it found almost no cycles and took a fifth of the time.

Thousands of nodes are a million objects that live as long as the run, and every event leaves a few more of them: what a node
has measured of a peer. By default each 700 of those start a search.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_MORE_OBJECTS = 200_000  # before the next search


@contextmanager
def seldom_collecting() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(_MORE_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
