"""The figures of a load test under the names of vLLM's serving benchmark. Pure.

Times are in ms. TTFT: to the first token. TPOT: mean time a token after the first. ITL: gap between two
arrivals of tokens. E2EL: to the end. Added: what failures cost (`retries`, `resumes`) and whether tokens
were lost or repeated, which `mesh.seq` shows.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mesh.errors import BadRequest

OBJECTIVES = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """One request. `times_s`: when tokens arrived, after its start; several may arrive at once."""

    tokens: int
    prompt_tokens: int
    times_s: tuple[float, ...]
    took_s: float
    retries: int = 0
    resumes: int = 0
    missing_tokens: int = 0
    duplicate_tokens: int = 0
    error: str = ""

    @property
    def ttft_ms(self) -> float | None:
        return self.times_s[0] * 1000 if self.times_s else None

    @property
    def tpot_ms(self) -> float | None:
        """None where there is no second token."""
        if self.tokens < 2 or not self.times_s:
            return None
        return (self.times_s[-1] - self.times_s[0]) * 1000 / (self.tokens - 1)

    @property
    def itl_ms(self) -> list[float]:
        return [(later - earlier) * 1000 for earlier, later in zip(self.times_s, self.times_s[1:])]

    def meets(self, objectives_ms: Mapping[str, float]) -> bool:
        """Whether a finished request was as fast as asked for, in everything that was asked for."""
        values = {"ttft": self.ttft_ms, "tpot": self.tpot_ms, "e2el": self.took_s * 1000}
        return not self.error and all((values[name] or 0.0) <= limit for name, limit in objectives_ms.items())


def objectives(texts: Sequence[str]) -> dict[str, float]:
    """`ttft:500`, `tpot:50`, `e2el:10000` as limits in ms.

    Raises:
        BadRequest: any other form.
    """
    limits = {}
    for text in texts:
        name, _, limit = text.partition(":")
        try:
            limits[name] = float(limit)
        except ValueError:
            limits[name] = -1.0
        if name not in OBJECTIVES or not 0 < limits[name] < float("inf"):
            raise BadRequest(f"--goodput: expected ttft:MS, tpot:MS or e2el:MS, got {text!r}", "goodput")
    return limits


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy's default; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def report(outcomes: Sequence[RequestOutcome], duration_s: float, objectives_ms: Mapping[str, float]) -> dict[str, object]:
    """All figures. Without objectives every request that completed counts as good."""
    completed = [outcome for outcome in outcomes if not outcome.error]
    tokens = sum(outcome.tokens for outcome in completed)
    prompt_tokens = sum(outcome.prompt_tokens for outcome in completed)
    per_second = 1.0 / duration_s if duration_s > 0 else 0.0
    figures: dict[str, object] = {
        "duration": duration_s,
        "completed": len(completed),
        "failed": len(outcomes) - len(completed),
        "success_rate": len(completed) / len(outcomes) if outcomes else 0.0,
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": tokens,
        "request_throughput": len(completed) * per_second,
        "request_goodput": sum(outcome.meets(objectives_ms) for outcome in completed) * per_second,
        "output_throughput": tokens * per_second,
        "total_token_throughput": (tokens + prompt_tokens) * per_second,
    }
    for name, values in measured_ms(completed).items():
        figures |= {
            f"mean_{name}_ms": statistics.fmean(values) if values else 0.0,
            f"median_{name}_ms": percentile(values, 50),
            f"std_{name}_ms": statistics.pstdev(values) if values else 0.0,
            f"p99_{name}_ms": percentile(values, 99),
        }
    for name in ("retries", "resumes", "missing_tokens", "duplicate_tokens"):
        figures[name] = sum(getattr(outcome, name) for outcome in outcomes)
    figures["errors"] = dict(Counter(outcome.error[:200] for outcome in outcomes if outcome.error).most_common(10))
    return figures


def measured_ms(completed: Sequence[RequestOutcome]) -> dict[str, list[float]]:
    """The values behind the means and percentiles, by name."""
    return {
        "ttft": [outcome.ttft_ms for outcome in completed if outcome.ttft_ms is not None],
        "tpot": [outcome.tpot_ms for outcome in completed if outcome.tpot_ms is not None],
        "itl": [gap for outcome in completed for gap in outcome.itl_ms],
        "e2el": [outcome.took_s * 1000 for outcome in completed],
    }
