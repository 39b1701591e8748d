"""Chooses into how many groups (microbatches) the decoding sequences of a split model are divided, so that stages overlap.

If every decoding sequence were in each step, all of them would be on the same stage at any time, and the other stages idle. So
a first stage takes only a part of them in a step, and begins the next part while the later stages compute the first.
Groups have no identity: the limit of the first stage divides the sequences that are ready. Where fewer than a group are ready,
the stage waits for more, for no longer than an average round trip.

The best number of groups depends on what this stage cannot observe: the number of stages, which of them is the slowest, how
the time of a step depends on its size, and the links. So it is searched by measurement: the tokens a second of a window of
several rounds are compared with those of one group more or fewer, in trials that become rarer while they change nothing. Any
grouping gives the same tokens (`docs/architecture.md`, the last section).
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_GROUPS = 6
WINDOW_ROUNDS = 4  # in a window, after one round that is not counted: it was planned with the number of groups before
RATE_AVERAGING = 0.5  # weight of the newest window
ROUND_TRIP_AVERAGING = 0.05  # weight of the newest token
MIN_GAIN = 1.03  # a smaller improvement may be chance
MIN_TRIAL_INTERVAL, MAX_TRIAL_INTERVAL = 2, 64  # windows between two trials


@dataclass(slots=True)
class GroupTuning:
    """The search for the number of groups, for one power of two of decoding sequences."""

    best: int
    trial: int = 0  # number of groups being tried; 0: none
    trial_interval: int = MIN_TRIAL_INTERVAL
    windows_until_trial: int = MIN_TRIAL_INTERVAL
    next_step: int = 1  # what the next trial adds to `best`
    rates: dict[int, float] = field(default_factory=dict)  # groups -> tokens a second

    @property
    def groups(self) -> int:
        return self.trial or self.best

    def window_measured(self, tokens_per_s: float, decoding: int) -> None:
        """Counts a window that ran with `groups` groups and `decoding` decoding sequences."""
        groups = self.groups
        before = self.rates.get(groups, tokens_per_s)
        self.rates[groups] = before + (tokens_per_s - before) * RATE_AVERAGING
        if self.trial:
            self._end_trial()
            return
        self.windows_until_trial -= 1
        if self.windows_until_trial <= 0:
            candidate = self.best + self.next_step
            if 1 <= candidate <= min(MAX_GROUPS, decoding):
                self.trial = candidate
            self.next_step = -self.next_step
            self.windows_until_trial = self.trial_interval

    def _end_trial(self) -> None:
        assert self.trial != self.best and abs(self.trial - self.best) == 1
        if self.rates[self.trial] > self.rates[self.best] * MIN_GAIN:
            self.next_step = self.trial - self.best  # continue in the direction that improved
            self.best, self.trial_interval = self.trial, MIN_TRIAL_INTERVAL
        else:
            self.trial_interval = min(MAX_TRIAL_INTERVAL, 2 * self.trial_interval)
        self.trial, self.windows_until_trial = 0, self.trial_interval


@dataclass(slots=True)
class Microbatches:
    """The groups of one first stage. `stages`: how many stages of its size the model would take; the search begins there."""

    stages: int
    _tunings: dict[int, GroupTuning] = field(default_factory=dict)  # by the bit length of the number of decoding sequences
    _window_decoding: int = 0  # decoding sequences when the window began; 0: no window
    _uncounted_tokens: int = 0  # tokens still to come that belong to the round before the window
    _counted_tokens: int = 0
    _began_s: float = 0.0
    _round_trip_s: float = 0.0  # average time from a sequence's step to the return of its token
    _waiting_since_s: float | None = None

    def round_trip_observed(self, seconds: float) -> None:
        self._round_trip_s += (seconds - self._round_trip_s) * (ROUND_TRIP_AVERAGING if self._round_trip_s else 1.0)

    def wait_until_s(self, ready: int, decoding: int, now_s: float) -> float:
        """Returns until when to wait for more ready sequences if no more become ready; `now_s`: the step may begin.

        `ready` of the `decoding` sequences are ready.
        """
        if ready >= decoding // self._tuning(self._window_decoding or decoding).groups:
            self._waiting_since_s = None
            return now_s
        if self._waiting_since_s is None:
            self._waiting_since_s = now_s
        return max(now_s, self._waiting_since_s + self._round_trip_s)

    def step_planned(self) -> None:
        self._waiting_since_s = None

    def group_size(self, decoding: int) -> int:
        """Returns how many of the `decoding` sequences one step may take."""
        return -(-decoding // min(decoding, self._tuning(self._window_decoding or decoding).groups)) if decoding > 1 else 1

    def tokens_returned(self, tokens: int, decoding: int, now_s: float) -> None:
        """Counts tokens that came back since the last call; `decoding`: sequences that decode now."""
        if decoding < 2:
            self._window_decoding = 0
        elif not self._window_decoding / 2 < decoding < self._window_decoding * 2:
            self._begin_window(decoding)  # rates at such different loads cannot be compared
        elif self._uncounted_tokens > 0:
            self._uncounted_tokens -= tokens
            self._counted_tokens, self._began_s = 0, now_s
        else:
            self._counted_tokens += tokens
            if self._counted_tokens >= WINDOW_ROUNDS * decoding and now_s > self._began_s:
                tokens_per_s = self._counted_tokens / (now_s - self._began_s)
                self._tuning(self._window_decoding).window_measured(tokens_per_s, decoding)
                self._begin_window(self._window_decoding)

    def _begin_window(self, decoding: int) -> None:
        self._window_decoding, self._uncounted_tokens = decoding, decoding

    def _tuning(self, decoding: int) -> GroupTuning:
        magnitude = decoding.bit_length()
        if magnitude not in self._tunings:
            self._tunings[magnitude] = GroupTuning(best=max(1, min(self.stages, decoding, MAX_GROUPS)))
        return self._tunings[magnitude]
