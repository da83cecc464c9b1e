"""Whether several tenants or lanes ask of late: then whoever asks for little must not wait long for who asks for much.

Batches are short meanwhile, and a host has one prepared beside the one it computes only if both are soon done.
"""

from typing import Final

from tasks.names import Lane

KEEPS_S: Final = 60.0
"""So long after works of one tenant or lane came after another's, the next such is expected: it finds things short."""


class Sharing:
    """Sees each work come."""

    def __init__(self) -> None:
        self._last: tuple[Lane, str] | None = None
        self._mixed_at = float("-inf")

    def note(self, lane: Lane, tenant: str, at: float) -> None:
        """A work has come."""
        kind = (lane, tenant)
        if self._last is not None and kind != self._last:
            self._mixed_at = at
        self._last = kind

    def is_mixed(self, now: float) -> bool:
        """Whether works of several tenants or lanes have come of late."""
        return now - self._mixed_at < KEEPS_S
