"""Which adapters hang on which resident base, and which leaves next.

Owns adapters' leases, loading and eviction; what hanging means is the ``rack``'s, which each base owns. An adapter is
known by the digest of its source. All of a host's adapters share a part of the device's budget, in which the least
recently used leaves first, and are booked with their base: an evicted base takes its adapters along, and they are
loaded again when asked for. ``load`` is called by one thread, the rest by several.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from threading import Condition
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from common.errors import FarmError, ModelLoadError, RequestError, ResidencyFullError
from common.logs import get_logger
from config_db.spec import Source
from workers.host.families.protocol import Model
from workers.host.residency import Residency

if TYPE_CHECKING:
    from workers.host.rack import Rack
    from workers.weights.leases import Files

log = get_logger("host")

SHARE: Final = 0.25
"""The part of the device's budget that adapters may hold."""
WAIT_S: Final = 60.0
"""How long an adapter waits for others to be no longer in use, if they are in its way."""
REMEMBER_PERMANENT_S: Final = 60.0
REMEMBER_PASSING_S: Final = 5.0
"""A failed load is answered from memory for so long."""
MOST_FAILURES: Final = 1000
PARAM: Final = "params.options.lora"

Tell = Callable[[str, str, dict[str, Any]], None]


@dataclass(slots=True)
class _Hung:
    model: Model
    rack: "Rack"
    bytes: int
    leases: int = 0


class Adapters:
    """The adapters of one host.

    Args:
        residency: where their bytes are booked.
        resolve: finds an adapter's files; FarmError if there is none.
        tell: called with the base's digest, ``adapter_loaded|adapter_failed|adapter_evicted`` and details.
    """

    def __init__(self, residency: Residency[Model], resolve: "Callable[[Source], Files]", tell: Tell) -> None:
        self._residency = residency
        self._resolve = resolve
        self._tell = tell
        self._share_bytes = int(residency.budget_bytes * SHARE)
        self._changed = Condition()
        self._hung: OrderedDict[tuple[str, str], _Hung] = OrderedDict()
        self._failures: OrderedDict[tuple[str, str], tuple[float, FarmError]] = OrderedDict()

    @property
    def bytes(self) -> int:
        """What all of them hold."""
        with self._changed:
            return self._used()

    def lease(self, base: str, model: Model, wanted: Collection[str]) -> bool:
        """Hold adapters of a leased base until ``release``; false, and none held, unless all of them hang."""
        with self._changed:
            if not all(self._is_hung(base, model, name) for name in wanted):
                return False
            for name in wanted:
                self._hold(base, name)
            return True

    def load(self, base: str, model: Model, wanted: Mapping[str, Source]) -> tuple[set[str], dict[str, FarmError]]:
        """Hold as many of these as fit, at least one if it can be loaded; those that hang are held first.

        Returns:
            Which are held, and why others never will be. What is in neither is in the way of those that are held:
            ask again when they have been released.
        """
        held: set[str] = set()
        refused: dict[str, FarmError] = {}
        there = [name for name in wanted if self.lease(base, model, [name])]
        held.update(there)
        for name, source in wanted.items():
            if name in held:
                continue
            try:
                if not self._load(base, model, name, source, may_wait=not held):
                    break
                held.add(name)
            except FarmError as error:
                refused[name] = error
        return held, refused

    def release(self, base: str, names: Collection[str]) -> None:
        """End one hold on each."""
        with self._changed:
            for name in names:
                self._hung[base, name].leases -= 1
            self._changed.notify_all()

    def forget(self, base: str) -> None:
        """The base was evicted, and its adapters with it."""
        with self._changed:
            gone = [key for key, one in self._hung.items() if key[0] == base and one.rack.is_closed]
            for key in gone:
                del self._hung[key]
            self._changed.notify_all()

    def evict_idle(self) -> int:
        """Evict all that are not leased, after the device ran out of memory; returns the bytes."""
        with self._changed:
            idle = [key for key, one in self._hung.items() if not one.leases]
            leaves = [(key, self._hung.pop(key)) for key in idle]
        for key, one in leaves:
            self._close(key, one, "out of memory")
        return sum(one.bytes for _, one in leaves)

    # -- with the lock held ------------------------------------------------------------------------------------------

    def _is_hung(self, base: str, model: Model, name: str) -> bool:
        one = self._hung.get((base, name))
        return one is not None and one.model is model

    def _hold(self, base: str, name: str) -> None:
        self._hung[base, name].leases += 1
        self._hung.move_to_end((base, name))

    def _used(self) -> int:
        return sum(one.bytes for one in self._hung.values() if not one.rack.is_closed)

    def _pop_idle(self) -> tuple[tuple[str, str], _Hung] | None:
        """The least recently used one that is not leased."""
        key = next((key for key, one in self._hung.items() if not one.leases), None)
        return None if key is None else (key, self._hung.pop(key))

    # -- without it --------------------------------------------------------------------------------------------------

    def _load(self, base: str, model: Model, name: str, source: Source, *, may_wait: bool) -> bool:
        """Load, hang and hold one adapter; false if only held ones are in its way and it must not wait for them.

        Raises:
            FarmError: it cannot be.
        """
        rack: Rack | None = getattr(model, "rack", None)
        if rack is None:
            raise RequestError("this model takes no adapters", param=PARAM)
        self._raise_remembered(base, name)
        started = monotonic()
        try:
            with self._resolve(source) as found:
                files = rack.read(found.path)
            size = rack.bytes_of(files)
            if not (self._make_room(size, may_wait=may_wait) and self._book(base, model, size, may_wait=may_wait)):
                return False
            try:
                rack.hang(name, files)
            except BaseException:
                self._residency.grow(base, model, -size)
                raise
        except Exception as error:
            raise self._remember(base, name, source, error) from error
        with self._changed:
            self._hung[base, name] = _Hung(model, rack, size)
            self._hold(base, name)
        load_s = round(monotonic() - started, 6)
        self._tell(base, "adapter_loaded", {"adapter": name, "files": files.digest, "bytes": size, "load_s": load_s})
        return True

    def _make_room(self, size: int, *, may_wait: bool) -> bool:
        """Evict least recently used adapters until this many bytes are free; waits while leased ones are in the way."""
        if size > self._share_bytes:
            raise ResidencyFullError(
                f"the adapter needs {size:,} bytes; of this device's budget adapters may hold {self._share_bytes:,}",
                param=PARAM,
            )
        until = monotonic() + WAIT_S
        while True:
            with self._changed:
                if self._used() + size <= self._share_bytes:
                    return True
                leaver = self._pop_idle()
                if leaver is None and not may_wait:
                    return False
                if leaver is None and not self._changed.wait(until - monotonic()):
                    raise ResidencyFullError("every adapter on this device is in use", param=PARAM)
            if leaver is not None:
                self._close(*leaver, "room")

    def _book(self, base: str, model: Model, size: int, *, may_wait: bool) -> bool:
        """Book an adapter with its base; where models in use leave no room for it, idle adapters make some."""
        while True:
            with self._changed:
                has_idle = any(not one.leases for one in self._hung.values())
            try:
                self._residency.grow(base, model, size, wait_s=WAIT_S if may_wait and not has_idle else 0.0)
            except ResidencyFullError:
                with self._changed:
                    leaver = self._pop_idle()
                if leaver is None and may_wait:
                    raise
                if leaver is None:
                    return False
                self._close(*leaver, "room")
            else:
                return True

    def _close(self, key: tuple[str, str], one: _Hung, reason: str) -> None:
        base, name = key
        one.rack.take(name)
        self._residency.grow(base, one.model, -one.bytes)
        self._tell(base, "adapter_evicted", {"adapter": name, "bytes": one.bytes, "reason": reason})

    def _raise_remembered(self, base: str, name: str) -> None:
        until, error = self._failures.get((base, name), (0.0, None))
        if error is not None and monotonic() < until:
            raise error

    def _remember(self, base: str, name: str, source: Source, error: Exception) -> FarmError:
        """The error as callers see it; a want of room is not remembered."""
        if isinstance(error, ResidencyFullError):
            return error
        failed = adapter_error(source, error)
        keep_s = REMEMBER_PERMANENT_S if failed.details.get("permanent") else REMEMBER_PASSING_S
        self._failures[base, name] = (monotonic() + keep_s, failed)
        self._failures.move_to_end((base, name))
        if len(self._failures) > MOST_FAILURES:
            self._failures.popitem(last=False)
        log.warning("adapter_load_failed", base=base, adapter=name, source=str(source), error=failed.message)
        self._tell(base, "adapter_failed", {"adapter": name, "error": failed.as_dict()})
        return failed


def adapter_error(source: Source, error: Exception) -> FarmError:
    """Whatever came of reading or hanging an adapter, as the one error that callers know; it names the source."""
    if isinstance(error, ModelLoadError):
        details = {"error_class": "UNKNOWN", "permanent": False, **error.details}
        return ModelLoadError(f"adapter {source}: {error.message}", param=PARAM, details=details)
    if isinstance(error, FarmError):
        return error
    what = f"{type(error).__name__}: {str(error)[:300]}"
    details = {"error_class": "ENGINE", "permanent": False}
    return ModelLoadError(f"adapter {source} cannot be loaded: {what}", param=PARAM, details=details)
