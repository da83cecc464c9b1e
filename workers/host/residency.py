"""Which models are on the device, and which leaves next.

Owns room, leases and eviction; loading is the ``loader``'s. Sizes are device bytes: reserved by an estimate, then
booked as measured. The least recently leased model leaves first, and no more leave than are needed; leased and pinned
ones never do. Used from several threads of one host; models are closed outside the lock, in the thread that evicts.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition
from time import monotonic
from typing import Generic, Protocol, TypeVar

from common.errors import ResidencyFullError


class Closable(Protocol):
    """What can be resident."""

    @property
    def bytes(self) -> int:
        """Device bytes it holds, measured."""

    def close(self) -> None:
        """Give the memory back."""


M = TypeVar("M", bound=Closable)


@dataclass(slots=True)
class _Resident(Generic[M]):
    model: M
    bytes: int
    pinned: bool
    leases: int = 0
    doomed: bool = False
    used_at: float = field(default_factory=monotonic)


class Residency(Generic[M]):
    """The models on one device, under a budget.

    Args:
        budget_bytes: what resident models and loads under way may hold together.
        on_evicted: called, without the lock held, after a model was closed, with its key, bytes and the reason.
    """

    def __init__(self, budget_bytes: int, on_evicted: Callable[[str, int, str], None]) -> None:
        self.budget_bytes = budget_bytes
        self._on_evicted = on_evicted
        self._changed = Condition()
        self._residents: OrderedDict[str, _Resident[M]] = OrderedDict()
        self._reserved: dict[str, int] = {}

    @property
    def used_bytes(self) -> int:
        """Held by resident models and reserved for loads under way."""
        with self._changed:
            return self._used()

    def resident(self) -> dict[str, int]:
        """Bytes of each resident model, least recently used first."""
        with self._changed:
            return {key: one.bytes for key, one in self._residents.items()}

    def lease(self, key: str) -> M | None:
        """Hold a resident model until ``release``; None if it is not resident. One about to be evicted stays."""
        with self._changed:
            one = self._residents.get(key)
            if one is None:
                return None
            one.doomed = False
            self._residents.move_to_end(key)
            one.leases += 1
            one.used_at = monotonic()
            return one.model

    def release(self, key: str) -> None:
        """End one hold."""
        with self._changed:
            one = self._residents[key]
            one.leases -= 1
            leaves = [self._take(key)] if one.doomed and not one.leases else []
            self._changed.notify_all()
        self._close(leaves, "asked")

    @contextmanager
    def reserved(self, key: str, estimate_bytes: int, *, wait_s: float = 0.0, idle_s: float = 0.0) -> Iterator[None]:
        """Keep room for a load for the length of the block; ``admit`` turns it into a resident model.

        Args:
            key: names the model.
            estimate_bytes: what it is going to need.
            wait_s: how long to wait for leases to end, if only leased models are in the way.
            idle_s: evict only models not leased for so long.

        Raises:
            ResidencyFullError: there is no room and none can be made.
        """
        self._make_room(key, estimate_bytes, wait_s=wait_s, idle_s=idle_s)
        try:
            yield
        finally:
            with self._changed:
                self._reserved.pop(key, None)
                self._changed.notify_all()

    def admit(self, key: str, model: M, *, pinned: bool = False, wait_s: float = 0.0) -> int:
        """Book a loaded model at its measured size, in place of what was reserved for it; returns that size.

        Raises:
            ResidencyFullError: it turned out larger than the room that can be made; it has been closed.
        """
        size = model.bytes
        try:
            self._make_room(key, size, wait_s=wait_s, idle_s=0.0)
        except ResidencyFullError:
            model.close()
            raise
        with self._changed:
            del self._reserved[key]
            self._residents[key] = _Resident(model, size, pinned)
            self._changed.notify_all()
        return size

    def evict(self, key: str) -> bool:
        """Close a model, pinned or not, as soon as no lease holds it; false if it is not resident."""
        with self._changed:
            one = self._residents.get(key)
            if one is None:
                return False
            one.doomed = True
            leaves = [] if one.leases else [self._take(key)]
            self._changed.notify_all()
        self._close(leaves, "asked")
        return True

    def evict_idle(self) -> int:
        """Evict everything that is neither leased nor pinned, after the device ran out of memory; returns the bytes."""
        with self._changed:
            idle = [key for key, one in self._residents.items() if not one.leases and not one.pinned]
            leaves = [self._take(key) for key in idle]
            self._changed.notify_all()
        self._close(leaves, "out of memory")
        return sum(one.bytes for _, one in leaves)

    # -- with the lock held --------------------------------------------------------------------------------------

    def _used(self) -> int:
        return sum(one.bytes for one in self._residents.values()) + sum(self._reserved.values())

    def _take(self, key: str) -> tuple[str, _Resident[M]]:
        return key, self._residents.pop(key)

    def _leavers(self, missing: int, idle_s: float) -> list[str] | None:
        """The fewest least recently used models whose bytes make up what is missing; None if they cannot."""
        leavers: list[str] = []
        before = monotonic() - idle_s
        for key, one in self._residents.items():
            if missing <= 0:
                break
            if one.leases or one.pinned or one.used_at > before:
                continue
            leavers.append(key)
            missing -= one.bytes
        return None if missing > 0 else leavers

    def _held_for_good(self) -> int:
        return sum(one.bytes for one in self._residents.values() if one.pinned)

    # -- without it ----------------------------------------------------------------------------------------------

    def _make_room(self, key: str, size: int, *, wait_s: float, idle_s: float) -> None:
        """Reserve ``size`` for ``key``, evicting what must leave; waits while only leases are in the way."""
        until = monotonic() + wait_s
        with self._changed:
            if size > self.budget_bytes - self._held_for_good():
                self._refuse(key, size)
            while True:
                missing = self._used() - self._reserved.get(key, 0) + size - self.budget_bytes
                leavers = self._leavers(missing, idle_s)
                if leavers is not None:
                    break
                if not self._changed.wait(until - monotonic()) and monotonic() >= until:
                    self._refuse(key, size)
            leaves = [self._take(leaver) for leaver in leavers]
            self._reserved[key] = size
        self._close(leaves, "room")

    def _refuse(self, key: str, size: int) -> None:
        held = [name for name, one in self._residents.items() if one.leases or one.pinned]
        raise ResidencyFullError(
            f"{key} needs {size:,} bytes; of the device's budget of {self.budget_bytes:,}, models in use or pinned "
            f"hold {sum(self._residents[name].bytes for name in held):,}. Raise FARMHAND_DEVICE_MEMORY or pin fewer"
        )

    def _close(self, leaves: list[tuple[str, _Resident[M]]], reason: str) -> None:
        for key, one in leaves:
            one.model.close()
            self._on_evicted(key, one.bytes, reason)
