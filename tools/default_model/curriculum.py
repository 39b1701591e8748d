"""What is learned when. Pure.

Short rows and drills first: copying and choosing appear as abrupt gains, and each next step only when the one before it is there.
So a stage ends when its skill is mastered, or at its share of the run at the latest. Progress runs from 0 to 1, over
steps or over a time budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WARM_UP = 0.01  # shares of the whole run
COOL_DOWN = 0.75  # drills bear the full rate; choosing among sentences gets worse under it, and better as soon as it falls
LESSON_STEPS = 25  # after so many it is asked whether the stage is mastered
MASTERED = 0.85  # share of tokens of the stage's skill that are right
NOTICE_STEPS = 32  # a stage is ended so many steps ahead: its last batches are made already


@dataclass(frozen=True, slots=True)
class Stage:
    until: float  # of the whole run, at the latest
    row_tokens: int
    mix: dict[str, float]  # kind of example -> share of examples
    brief: float = 0.65  # share of conversations whose answers break off behind their labels
    skill: str = "choosing"  # or copying: what ends the stage


STAGES = (
    Stage(0.12, 128, {"echo": 0.45, "lookup": 0.35, "world": 0.20}, brief=0.0, skill="copying"),
    Stage(0.16, 128, {"recall": 0.80, "echo": 0.10, "lookup": 0.10}),
    Stage(0.20, 128, {"recall": 0.10, "quiz": 0.70, "lookup": 0.10, "echo": 0.10}),
    Stage(0.28, 128, {"quiz": 0.10, "lookup": 0.25, "world": 0.48, "prose": 0.15, "talk": 0.02}),
    Stage(0.34, 256, {"quiz": 0.05, "lookup": 0.08, "world": 0.55, "prose": 0.30, "talk": 0.02}),
    Stage(0.48, 512, {"quiz": 0.03, "lookup": 0.05, "world": 0.55, "prose": 0.35, "talk": 0.02}),
    Stage(0.94, 1024, {"quiz": 0.02, "lookup": 0.04, "world": 0.57, "prose": 0.35, "talk": 0.02}),
    Stage(1.00, 2048, {"quiz": 0.02, "lookup": 0.04, "world": 0.52, "prose": 0.40, "talk": 0.02}),
)
LAST_BY_MASTERY = 4  # the long rows after it are dear, and wait for their share of the run


def stage_at(progress: float, step: int, ends: Sequence[int]) -> int:
    """The number of the stage of batch `step`. `ends` are the steps at which mastered stages ended."""
    latest = next((number for number, stage in enumerate(STAGES) if progress < stage.until), len(STAGES) - 1)
    return max(latest, sum(end <= step for end in ends))


def rate_at(progress: float) -> float:
    """The learning rate as a part of its peak: up, level, and down in a straight line to nothing."""
    if progress < WARM_UP:
        return max(progress, 1e-4) / WARM_UP
    return min(1.0, max(0.0, 1.0 - progress) / COOL_DOWN)
