"""What a count over some runs says of the rate behind it."""

from __future__ import annotations

import math

_DOUBT = 0.05


def rate_bound(events: int, runs: int) -> float:
    """With 95 % confidence there are fewer events a run than this, if they come independently of one another.

    The rate at which so few as `events` would be seen in one of twenty repetitions; with none, the rule of three: 3 / `runs`.
    Source: Garwood's exact interval for a Poisson mean (Biometrika 1936), its upper end, found by halving.
    """
    low, high = 0.0, 10.0 + 3.0 * events
    while high - low > 1e-9 * high:
        mean = (low + high) / 2
        if _at_most(events, mean) > _DOUBT:
            low = mean
        else:
            high = mean
    return high / runs


def _at_most(events: int, mean: float) -> float:
    """The chance of so many events or fewer, where `mean` are to be expected."""
    logs = [count * math.log(mean) - mean - math.lgamma(count + 1) for count in range(events + 1)]
    return math.fsum(math.exp(log) for log in logs)
