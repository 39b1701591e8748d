"""Virtual time: it moves from one event to the next."""

from __future__ import annotations

from collections.abc import Callable

from membership.simulation.events import Events


class VirtualTime:
    """`now`: seconds since the start."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events = Events()

    @property
    def happened(self) -> int:
        """The number of events so far."""
        return self._events.taken

    def run(self, duration_s: float) -> None:
        """Lets `duration_s` of virtual time pass."""
        end = self.now + duration_s
        take = self._events.take
        while (event := take(end)) is not None:
            self.now, _, happen, with_what = event
            happen(*with_what)
        self.now = end

    def run_until(self, condition: Callable[[], bool], within_s: float, *, step_s: float = 0.05) -> float:
        """Lets time pass until `condition` holds; returns how long that took, in virtual seconds.

        Raises:
            AssertionError: it did not hold within `within_s`.
        """
        start = self.now
        while not condition():
            assert self.now - start < within_s, f"not within {within_s} s"
            self.run(step_s)
        return self.now - start

    def later(self, delay_s: float, happen: Callable[..., None], *with_what: object) -> None:
        self._events.put(self.now + delay_s, happen, with_what)
