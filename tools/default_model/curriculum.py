"""What is learned when. Pure.

Short rows and drills first: copying appears as an abrupt gain that comes the sooner, the shorter the way to what is copied. Then
ever longer contexts, and ever more real prose. Progress runs from 0 to 1, over steps or over a time budget.
"""

from __future__ import annotations

from dataclasses import dataclass

WARM_UP = 0.01  # shares of the whole run
COOL_DOWN = 0.3


@dataclass(frozen=True, slots=True)
class Stage:
    until: float  # of the whole run
    row_tokens: int
    mix: dict[str, float]  # kind of example -> share of examples


STAGES = (
    Stage(0.06, 128, {"echo": 0.40, "lookup": 0.40, "world": 0.18, "talk": 0.02}),
    Stage(0.15, 256, {"echo": 0.10, "lookup": 0.35, "world": 0.45, "prose": 0.08, "talk": 0.02}),
    Stage(0.40, 256, {"echo": 0.03, "lookup": 0.17, "world": 0.45, "prose": 0.33, "talk": 0.02}),
    Stage(0.75, 512, {"echo": 0.01, "lookup": 0.10, "world": 0.42, "prose": 0.45, "talk": 0.02}),
    Stage(0.92, 1024, {"echo": 0.01, "lookup": 0.06, "world": 0.41, "prose": 0.50, "talk": 0.02}),
    Stage(1.00, 2048, {"echo": 0.01, "lookup": 0.06, "world": 0.41, "prose": 0.50, "talk": 0.02}),
)


def stage_at(progress: float) -> int:
    """The number of the stage that `progress` falls into."""
    return next((number for number, stage in enumerate(STAGES) if progress < stage.until), len(STAGES) - 1)


def rate_at(progress: float) -> float:
    """The learning rate as a part of its peak: up, level, and down in a straight line to nothing."""
    if progress < WARM_UP:
        return max(progress, 1e-4) / WARM_UP
    return min(1.0, max(0.0, 1.0 - progress) / COOL_DOWN)
