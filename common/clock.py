"""Wall-clock instants that several machines compare: Redis TIME, by a measured offset.

Durations inside one process come from ``time.monotonic``; only deadlines that cross machines come from here.
"""

import time
from collections.abc import Callable


class FarmClock:
    """The farm's wall clock as this process sees it; owned by whoever owns the Redis connection.

    The offset to Redis TIME is measured with ``sync`` (at start and every 30 s), by halving the round trip.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._offset_s = time.time() - monotonic()  # noqa: TID251 - until the first sync the machine's own clock serves
        self.synced_at: float | None = None

    def now(self) -> float:
        """Seconds since the Unix epoch on the farm's clock."""
        return self._monotonic() + self._offset_s

    def sync(self, redis_time: tuple[int, int], *, asked_at: float, answered_at: float) -> None:
        """Take the answer to one TIME command: (seconds, microseconds), with monotonic instants around it."""
        seconds, micros = redis_time
        self._offset_s = seconds + micros / 1e6 - (asked_at + answered_at) / 2
        self.synced_at = answered_at

    def monotonic_of(self, instant: float) -> float:
        """The monotonic instant in this process of a farm-clock instant."""
        return instant - self._offset_s
