"""Requests whose adapter is still on the Hub or in a bucket: they wait here until a host has brought it to this disk.

Owns which adapters are known to be here, and who waits for which. So a slow download holds up neither other models nor
other adapters; putting an adapter on its base takes milliseconds and is left to the host that is given the request.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

from common.errors import AdapterLoadingError, FarmError, error_from_dict
from common.logs import get_logger
from config_db.adapters import adapter_source
from config_db.spec import ModelSpec, Source
from tasks.messages import decode_body
from workers.hosts.pool import HostPool
from workers.intake import Held
from workers.settling import Settler

log = get_logger("workers")

REMEMBERED: Final = 4096
REMEMBER_PERMANENT_S: Final = 60.0
REMEMBER_PASSING_S: Final = 5.0
"""A failed fetch is answered from memory for so long."""
RETRY_AFTER_S: Final = 1.0


@dataclass(slots=True)
class _Fetch:
    """An adapter on its way. ``host`` brings it; None: no host has been asked yet, or the one that was has died."""

    source: Source
    host: int | None = None
    waiting: list[tuple[Held, ModelSpec]] = field(default_factory=list)


class AdapterFetches:
    """Keeps requests until their adapter's files are on this machine's disk.

    ``hosts`` is set before the first request.

    Args:
        settler: answers those that cannot go on.
        go_on: takes a request, with its spec, whose adapter is there.
    """

    hosts: HostPool

    def __init__(self, settler: Settler, go_on: Callable[[Held, ModelSpec], None]) -> None:
        self._settler = settler
        self._go_on = go_on
        self._here: OrderedDict[str, None] = OrderedDict()
        self._fetches: dict[str, _Fetch] = {}
        self._failures: OrderedDict[str, tuple[float, dict[str, Any]]] = OrderedDict()

    def keep(self, held: Held, spec: ModelSpec) -> bool:
        """Take a request that must wait for its adapter, or cannot have it; false: it need not wait."""
        adapter = held.ticket.adapter
        if adapter is None or adapter in self._here:
            return False
        fetch = self._fetches.get(adapter)
        if fetch is None:
            until, error = self._failures.get(adapter, (0.0, {}))
            if monotonic() < until:
                self._settler.fail(held, error_from_dict(error))
                return True
            try:
                source = adapter_source(decode_body(held.body)[1].options)
            except FarmError as refused:
                self._settler.fail(held, refused)
                return True
            if source.path is not None:
                _keep(self._here, adapter, None)
                return False
            fetch = self._fetches[adapter] = _Fetch(source)
            self._ask()
        fetch.waiting.append((held, spec))
        return True

    def tick(self, now: float) -> None:
        """Answer who has waited until the deadline; the fetch goes on."""
        self._ask()
        for fetch in self._fetches.values():
            late = [held for held, _ in fetch.waiting if held.deadline <= now]
            fetch.waiting = [one for one in fetch.waiting if one[0].deadline > now and not one[0].is_settling]
            for held in late:
                message = f"adapter {fetch.source} is still being fetched; ask again soon"
                self._settler.fail(held, AdapterLoadingError(message, retry_after_s=RETRY_AFTER_S))

    def on_fetched(self, adapter: str, error: dict[str, Any] | None) -> None:
        """It is there, or will not be."""
        fetch = self._fetches.pop(adapter, None)
        if fetch is None:
            return
        if error is None:
            _keep(self._here, adapter, None)
        else:
            log.warning("adapter_not_fetched", source=str(fetch.source), error=error.get("message"))
            keep_s = REMEMBER_PERMANENT_S if error.get("permanent") else REMEMBER_PASSING_S
            _keep(self._failures, adapter, (monotonic() + keep_s, error))
        for held, spec in fetch.waiting:
            if held.is_settling:
                continue
            if error is None:
                self._go_on(held, spec)
            else:
                self._settler.fail(held, error_from_dict(error))

    def forget_waiting(self) -> None:
        """Nobody waits any more: the requests were given up."""
        for fetch in self._fetches.values():
            fetch.waiting.clear()

    def on_host_lost(self, host: int) -> None:
        """Another one must bring what it was bringing."""
        for fetch in self._fetches.values():
            if fetch.host == host:
                fetch.host = None

    def _ask(self) -> None:
        """Have the least busy host bring what nobody brings yet."""
        views = self.hosts.hosts()
        if not views:
            return
        for adapter, fetch in self._fetches.items():
            if fetch.host is None:
                fetch.host = min(views, key=lambda view: view.outstanding).id
                self.hosts.fetch(fetch.host, adapter, fetch.source)


def _keep(memory: "OrderedDict[str, Any]", name: str, value: object) -> None:
    memory[name] = value
    memory.move_to_end(name)
    if len(memory) > REMEMBERED:
        memory.popitem(last=False)
