"""How fast weights may leave a node: a token bucket, so that handing weights over does not starve what it serves."""

from __future__ import annotations

BURST_S = 0.25  # so much of a second's worth may go at once


class RateLimit:
    """A token bucket: bytes are taken before they are sent; a sender that takes more than there are waits for them."""

    def __init__(self) -> None:
        self._free_at = 0.0  # when all that was taken is paid for

    def wait_s(self, size_bytes: int, rate_bytes_s: float, now: float) -> float:
        """Takes `size_bytes` at the rate that holds now; how long to wait before they may go."""
        began = max(self._free_at, now - BURST_S)
        self._free_at = began + size_bytes / rate_bytes_s
        return max(0.0, self._free_at - now)
