"""In how many groups the answers of a split model go round, so that its stages compute at the same time.

Were all rows that decode taken in one step, they would march together: while one stage computes them the others wait. So
a first stage takes only a part of them in a step, and sends the next part after it while the later stages have the first.
Groups need no names: the first stage's limit parts what has met, and where fewer rows than a group's are there it waits
for more, no longer than rows are away on the average.

How many groups are best depends on what this node cannot see: how many stages there are, which is the slowest, whether a step
of half the rows takes half the time, what lies between. So it is found out: a window of several rounds is counted in
tokens a second, one more or one fewer is tried now and then, and ever more seldom while that changes nothing. Any
grouping gives the same tokens (`docs/architecture.md`, the last section).
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_GROUPS = 6
ROUNDS = 4  # in a window, after one that does not count: what was decided before it is still on its way
AVERAGING = 0.5  # weight of the newest window
AWAY_AVERAGING = 0.05  # weight of the newest token
BETTER = 1.03  # by less it may as well be chance
FIRST_PATIENCE, MAX_PATIENCE = 2, 64  # windows between two trials


@dataclass(slots=True)
class GroupTuning:
    """The number of groups for one order of magnitude of rows."""

    best: int
    trial: int = 0  # being tried; 0: none
    patience: int = FIRST_PATIENCE
    until_trial: int = FIRST_PATIENCE
    step: int = 1  # what the next trial adds
    rates: dict[int, float] = field(default_factory=dict)  # groups -> tokens a second

    @property
    def groups(self) -> int:
        return self.trial or self.best

    def measured(self, tokens_per_s: float, rows: int) -> None:
        """A window of `groups` groups went by."""
        groups = self.groups
        before = self.rates.get(groups, tokens_per_s)
        self.rates[groups] = before + (tokens_per_s - before) * AVERAGING
        if self.trial:
            self._judge()
            return
        self.until_trial -= 1
        if self.until_trial <= 0:
            wanted = self.best + self.step
            if 1 <= wanted <= min(MAX_GROUPS, rows):
                self.trial = wanted
            self.step = -self.step
            self.until_trial = self.patience

    def _judge(self) -> None:
        better = self.rates[self.trial] > self.rates[self.best] * BETTER
        if better:
            self.step = self.trial - self.best  # further that way
            self.best, self.patience = self.trial, FIRST_PATIENCE
        else:
            self.patience = min(MAX_PATIENCE, 2 * self.patience)
        self.trial, self.until_trial = 0, self.patience


@dataclass(slots=True)
class Microbatches:
    """Of one first stage. `stages`: of equal parts there would be so many; what to begin with."""

    stages: int
    _tunings: dict[int, GroupTuning] = field(default_factory=dict)  # by order of magnitude of rows
    _rows: int = 0  # when the window under way began; 0: none
    _settling: int = 0  # tokens that do not count
    _counted: int = 0
    _began_s: float = 0.0
    _away_s: float = 0.0  # from a row's step to the token drawn for it
    _held_since_s: float | None = None

    def round_trip_observed(self, seconds: float) -> None:
        self._away_s += (seconds - self._away_s) * (AWAY_AVERAGING if self._away_s else 1.0)

    def hold_until_s(self, ready: int, rows: int, now: float) -> float:
        """Until when to wait for more rows than those that are ready, if no more become so; `now`: begin."""
        if ready >= rows // self._tuning(self._rows or rows).groups:
            self._held_since_s = None
            return now
        if self._held_since_s is None:
            self._held_since_s = now
        return max(now, self._held_since_s + self._away_s)

    def begun(self) -> None:
        """A step was planned."""
        self._held_since_s = None

    def most_rows(self, rows: int) -> int:
        """How many of `rows` that decode one step may take."""
        return -(-rows // min(rows, self._tuning(self._rows or rows).groups)) if rows > 1 else 1

    def tokens_returned(self, tokens: int, rows: int, now: float) -> None:
        """So many tokens came since the last call, for sequences of which `rows` decode."""
        if rows < 2:
            self._rows = 0
        elif not self._rows / 2 < rows < self._rows * 2:
            self._begin(rows)
        elif self._settling > 0:
            self._settling -= tokens
            self._counted, self._began_s = 0, now
        else:
            self._counted += tokens
            if self._counted >= ROUNDS * rows and now > self._began_s:
                self._tuning(self._rows).measured(self._counted / (now - self._began_s), rows)
                self._begin(self._rows)

    def _begin(self, rows: int) -> None:
        self._rows, self._settling = rows, rows

    def _tuning(self, rows: int) -> GroupTuning:
        magnitude = rows.bit_length()
        if magnitude not in self._tunings:
            self._tunings[magnitude] = GroupTuning(best=max(1, min(self.stages, rows, MAX_GROUPS)))
        return self._tunings[magnitude]
