"""When the dispatcher looks for micro-batches to hand out: at the end of this turn of the loop, or at an instant."""

from collections.abc import Callable
from time import monotonic
from typing import Any


class Kicks:
    """Owns the calls that are due. Used by the event loop thread alone; before ``use`` nothing is called.

    Args:
        kick: what is called.
    """

    def __init__(self, kick: Callable[[], None]) -> None:
        self._kick = kick
        self._hub: Any = None
        self._is_due = False
        self._later: Any = None
        self._later_at = 0.0

    def use(self, hub: Any) -> None:
        """Use this hub from now on; what was to be called by one before it may be forgotten."""
        if self._later is not None:
            self._later.cancel()
        self._hub, self._is_due, self._later = hub, False, None

    def soon(self) -> None:
        """Call after the whole burst has been delivered, so that a burst becomes one batch without any wait."""
        if not self._is_due and self._hub is not None:
            self._is_due = True
            self._hub.call_soon(self._call)

    def at(self, instant: float) -> None:
        """Call at this instant of the monotonic clock, or before it."""
        if self._hub is None or (self._later is not None and self._later_at <= instant):
            return
        if self._later is not None:
            self._later.cancel()
        self._later_at = instant
        self._later = self._hub.call_later(max(0.0, instant - monotonic()), self._call_later)

    def _call_later(self) -> None:
        self._later = None
        self.soon()

    def _call(self) -> None:
        self._is_due = False
        self._kick()
