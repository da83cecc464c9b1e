"""Which models are on the device, and which leaves next.

Owns room, leases and eviction; loading is the ``loader``'s. Sizes are device bytes: reserved by an estimate, then
booked as measured. No more leave than are needed, leased and held ones (pinned, or of tier ``device``) never do.

The order is that of a segmented LRU with 2Q's memory of what has left (Karedla, Love and Wherry, "Caching strategies to
improve disk system performance", 1994; Johnson and Shasha, "2Q", 1994): a model is cold until it is used again some
time after its load, or comes back soon after it had to leave, and cold models leave before hot ones. So a sweep over
all models, each used once, displaces other cold ones only.

Used from several threads of one host; models are closed outside the lock, in the thread that evicts.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from math import inf
from threading import Condition
from time import monotonic
from typing import Any, Final, Generic, Protocol, TypeVar

from common.errors import ResidencyFullError

APART_S: Final = 1.0
"""Uses closer to the load than this are those it was loaded for, and say nothing about the next."""
HOT_SHARE: Final = 0.75
"""Hot models hold at most this share of the budget; what they hold beyond it, the least recently used one, is cold."""
REMEMBERED_SHARE: Final = 0.5
"""So much of the budget, in bytes, are the models that left last and are still remembered."""
STAY_S: Final = 1.0
"""What was loaded and has not served yet was loaded for something."""
ALTERNATIVES: Final = 5
"""So many of the models that stayed are named with an eviction."""


class Closable(Protocol):
    """What can be resident."""

    @property
    def bytes(self) -> int:
        """Device bytes it holds, measured."""

    def close(self) -> None:
        """Give the memory back."""


M = TypeVar("M", bound=Closable)


@dataclass(frozen=True, slots=True)
class Terms:
    """What the config says of a model's stay: ``held`` never leaves for room; idle for ``idle_unload_s``, it leaves."""

    held: bool = False
    idle_unload_s: float | None = None


DEFAULT_TERMS: Final = Terms()


@dataclass(frozen=True, slots=True)
class Eviction:
    """One model has left, and why.

    ``reason``: ``room``, ``idle``, ``out of memory``, ``replaced`` or ``removed``. For room, ``needed_by`` needed
    ``needed_bytes`` of which ``missing_bytes`` were not free. ``alternatives`` are models that stayed, and why.
    """

    key: str
    bytes: int
    reason: str
    resident_s: float
    idle_s: float
    was_hot: bool
    needed_by: str = ""
    needed_bytes: int = 0
    missing_bytes: int = 0
    alternatives: tuple[dict[str, Any], ...] = ()

    def details(self) -> dict[str, Any]:
        """As told to the worker and logged."""
        told: dict[str, Any] = {
            "bytes": self.bytes,
            "reason": self.reason,
            "resident_s": round(self.resident_s, 3),
            "idle_s": round(self.idle_s, 3),
            "was_hot": self.was_hot,
        }
        if self.needed_by:
            told |= {
                "needed_by": self.needed_by,
                "needed_bytes": self.needed_bytes,
                "missing_bytes": self.missing_bytes,
                "alternatives": list(self.alternatives),
            }
        return told


@dataclass(slots=True)
class _Resident(Generic[M]):
    """``asked_until`` is until when callers asked it to be kept, ``plain_at`` when one who did not was last served."""

    model: M
    bytes: int
    terms: Terms
    is_hot: bool
    leases: int = 0
    doomed: str = ""
    loaded_at: float = field(default_factory=monotonic)
    used_at: float = field(default_factory=monotonic)
    asked_until: float = -inf
    plain_at: float | None = None

    @property
    def has_served(self) -> bool:
        return self.plain_at is not None or self.asked_until > -inf

    @property
    def idle_at(self) -> float:
        """When it has been idle for long enough to leave."""
        allowed_s = inf if self.terms.idle_unload_s is None else self.terms.idle_unload_s
        if not self.has_served:
            return self.loaded_at + allowed_s
        return max(self.asked_until, -inf if self.plain_at is None else self.plain_at + allowed_s)


class Residency(Generic[M]):
    """The models on one device, under a budget.

    Args:
        budget_bytes: what resident models and loads under way may hold together.
        on_evicted: called, without the lock held, after a model was closed.
        stay_s: for so long a model that has served nothing yet leaves only if nothing else can.
        apart_s: a use makes a model hot if it comes so long after the load.
    """

    def __init__(
        self,
        budget_bytes: int,
        on_evicted: Callable[[Eviction], None],
        *,
        stay_s: float = STAY_S,
        apart_s: float = APART_S,
    ) -> None:
        self.budget_bytes = budget_bytes
        self._stay_s = stay_s
        self._apart_s = apart_s
        self._on_evicted = on_evicted
        self._changed = Condition()
        self._residents: OrderedDict[str, _Resident[M]] = OrderedDict()
        self._reserved: dict[str, int] = {}
        self._remembered: OrderedDict[str, int] = OrderedDict()

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
            one.doomed = ""
            self._residents.move_to_end(key)
            one.leases += 1
            one.used_at = monotonic()
            if not one.is_hot and one.used_at - one.loaded_at >= self._apart_s:
                one.is_hot = True
                self._cool()
            return one.model

    def release(self, key: str, keep_alive: Sequence[float | None] = (None,)) -> None:
        """End one hold.

        Args:
            key: names the model.
            keep_alive: what each request that was served asked for, in seconds; None: nothing. The longest counts, so
                that no caller shortens what another was promised.
        """
        now = monotonic()
        with self._changed:
            one = self._residents[key]
            one.leases -= 1
            for asked_s in keep_alive:
                if asked_s is None:
                    one.plain_at = now
                else:
                    one.asked_until = max(one.asked_until, now + asked_s)
            leaves = [self._take(key, one.doomed)] if one.doomed and not one.leases else []
            self._changed.notify_all()
        self._close(leaves)

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

    def admit(self, key: str, model: M, terms: Terms = DEFAULT_TERMS, *, wait_s: float = 0.0) -> int:
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
            is_back = self._remembered.pop(key, None) is not None
            self._residents[key] = _Resident(model, size, terms, is_hot=is_back)
            self._cool()
            self._changed.notify_all()
        return size

    def grow(self, key: str, model: M, more_bytes: int, *, wait_s: float = 0.0) -> None:
        """Book more, or fewer, bytes for what hangs on a resident model; nothing happens if it has left.

        Raises:
            ResidencyFullError: there is no room and none can be made.
        """
        with self._changed:
            one = self._residents.get(key)
            others = self._held_for_good() - (one.bytes if one is not None and one.terms.held else 0)
            if one is not None and one.bytes + more_bytes > self.budget_bytes - others:  # waiting would not help
                self._refuse(key, one.bytes + more_bytes)
        room = self.reserved(f"what hangs on {key}", more_bytes, wait_s=wait_s) if more_bytes > 0 else nullcontext()
        with room, self._changed:
            one = self._residents.get(key)
            if one is not None and one.model is model:
                one.bytes += more_bytes
                self._changed.notify_all()

    def take_spare(self, key: str, model: M, more_bytes: int) -> bool:
        """Book more bytes for a resident model before they are used, if the budget has them to spare.

        Nobody leaves for them, and none is promised to a load under way; false, and nothing booked, if there are not
        so many, or the model has left.
        """
        with self._changed:
            one = self._residents.get(key)
            if one is None or one.model is not model or self._used() + more_bytes > self.budget_bytes:
                return False
            one.bytes += more_bytes
            return True

    def place(self, key: str, terms: Terms) -> None:
        """Let a resident model stay on other terms from now on."""
        with self._changed:
            if key in self._residents:
                self._residents[key].terms = terms
                self._changed.notify_all()

    def evict(self, key: str, reason: str = "removed") -> bool:
        """Close a model, held or not, as soon as no lease holds it; false if it is not resident."""
        with self._changed:
            one = self._residents.get(key)
            if one is None:
                return False
            one.doomed = reason
            leaves = [] if one.leases else [self._take(key, reason)]
            self._changed.notify_all()
        self._close(leaves)
        return True

    def evict_idle(self) -> int:
        """Evict everything that is neither leased nor held, after the device ran out of memory; returns the bytes."""
        with self._changed:
            idle = [key for key, one in self._residents.items() if not one.leases and not one.terms.held]
            leaves = [self._take(key, "out of memory") for key in idle]
            self._changed.notify_all()
        self._close(leaves)
        return sum(left.bytes for _, left in leaves)

    def unload_idle(self) -> None:
        """Evict what has been idle for as long as it may be."""
        now = monotonic()
        with self._changed:
            idle = [
                key
                for key, one in self._residents.items()
                if not one.leases and not one.terms.held and one.idle_at <= now
            ]
            leaves = [self._take(key, "idle") for key in idle]
            self._changed.notify_all()
        self._close(leaves)

    # -- with the lock held --------------------------------------------------------------------------------------

    def _used(self) -> int:
        return sum(one.bytes for one in self._residents.values()) + sum(self._reserved.values())

    def _cool(self) -> None:
        """Keep hot models within their share: the least recently used of them are cold again."""
        hot = [one for one in self._residents.values() if one.is_hot and not one.terms.held]
        held = sum(one.bytes for one in hot)
        for one in hot:
            if held <= HOT_SHARE * self.budget_bytes:
                return
            one.is_hot = False
            held -= one.bytes

    def _take(self, key: str, reason: str) -> tuple[M, Eviction]:
        one, now = self._residents.pop(key), monotonic()
        left = Eviction(key, one.bytes, reason, now - one.loaded_at, now - one.used_at, one.is_hot)
        return one.model, left

    def _take_for(self, leavers: Sequence[str], key: str, size: int, missing: int) -> list[tuple[M, Eviction]]:
        """Take these to make room for ``key``, and say what else there was."""
        others = tuple(self._alternative(name) for name in self._residents if name not in leavers)[:ALTERNATIVES]
        taken = []
        for leaver in leavers:
            model, left = self._take(leaver, "room")
            if not left.was_hot:
                self._remember(leaver, left.bytes)
            taken.append(
                (
                    model,
                    Eviction(
                        *(left.key, left.bytes, left.reason, left.resident_s, left.idle_s, left.was_hot),
                        *(key, size, missing, others),
                    ),
                )
            )
        return taken

    def _alternative(self, key: str) -> dict[str, Any]:
        one = self._residents[key]
        why = "leased" if one.leases else "held" if one.terms.held else "hot" if one.is_hot else "not needed"
        return {"spec": key, "bytes": one.bytes, "idle_s": round(monotonic() - one.used_at, 3), "stays": why}

    def _remember(self, key: str, size: int) -> None:
        self._remembered[key] = size
        self._remembered.move_to_end(key)
        while sum(self._remembered.values()) > REMEMBERED_SHARE * self.budget_bytes:
            self._remembered.popitem(last=False)

    def _leavers(self, missing: int, idle_s: float) -> list[str] | None:
        """Those that leave for the bytes that are missing; None if they cannot be made up.

        Cold before hot, each the least recently used first, and at last those that have not served yet; none that the
        others make unnecessary.
        """
        now = monotonic()
        could: list[tuple[bool, bool, int, str]] = []
        for place, (key, one) in enumerate(self._residents.items()):
            is_new = not one.has_served and now - one.loaded_at < self._stay_s
            if one.leases or one.terms.held or one.used_at > now - idle_s or (is_new and idle_s):
                continue
            could.append((is_new, one.is_hot, place, key))
        chosen: list[str] = []
        for *_, key in sorted(could):
            if missing <= 0:
                break
            chosen.append(key)
            missing -= self._residents[key].bytes
        if missing > 0:
            return None
        for key in reversed(chosen[:-1]):  # the last one was large: what it makes unnecessary stays
            if missing + self._residents[key].bytes <= 0:
                chosen.remove(key)
                missing += self._residents[key].bytes
        return chosen

    def _held_for_good(self) -> int:
        return sum(one.bytes for one in self._residents.values() if one.terms.held)

    # -- without it ----------------------------------------------------------------------------------------------

    def _make_room(self, key: str, size: int, *, wait_s: float, idle_s: float) -> None:
        """Reserve ``size`` for ``key``, evicting what must leave; waits while only leases are in the way."""
        until = monotonic() + wait_s
        with self._changed:
            while True:
                if size > self.budget_bytes - self._held_for_good():
                    self._refuse(key, size)
                missing = self._used() - self._reserved.get(key, 0) + size - self.budget_bytes
                leavers = self._leavers(missing, idle_s)
                if leavers is not None:
                    break
                if not self._changed.wait(until - monotonic()) and monotonic() >= until:
                    self._refuse(key, size)
            leaves = self._take_for(leavers, key, size, missing)
            self._reserved[key] = size
        self._close(leaves)

    def _refuse(self, key: str, size: int) -> None:
        held = [name for name, one in self._residents.items() if one.leases or one.terms.held]
        raise ResidencyFullError(
            f"{key} needs {size:,} bytes; of the device's budget of {self.budget_bytes:,}, models in use or pinned "
            f"hold {sum(self._residents[name].bytes for name in held):,}. Raise FARMHAND_DEVICE_MEMORY or pin fewer"
        )

    def _close(self, leaves: Sequence[tuple[M, Eviction]]) -> None:
        for model, left in leaves:
            model.close()
            self._on_evicted(left)
