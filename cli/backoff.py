"""How long a child that died waits for its next start."""

from dataclasses import dataclass


@dataclass
class Backoff:
    """Waits that double from ``first_s`` to ``most_s``, and start over after a life of ``healthy_s``.

    >>> backoff = Backoff()
    >>> [backoff.next_wait_s(lived_s=1) for _ in range(3)], backoff.next_wait_s(lived_s=31)
    ([0.5, 1.0, 2.0], 0.5)
    """

    first_s: float = 0.5
    most_s: float = 30.0
    healthy_s: float = 30.0
    _last_s: float = 0.0

    def next_wait_s(self, *, lived_s: float) -> float:
        """Seconds to wait after a life of ``lived_s``."""
        in_a_row = self._last_s > 0 and lived_s < self.healthy_s
        self._last_s = min(self.most_s, self._last_s * 2) if in_a_row else self.first_s
        return self._last_s
