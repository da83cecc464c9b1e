"""Kills hosts that hang, in a thread of its own, also while the worker's event loop is blocked.

Sees what each host is doing on its board (``workers.host.stages``). The kill itself is the zygote's.
"""

from collections.abc import Callable, Mapping
from threading import Event, Thread
from time import monotonic
from typing import Final

from common.logs import get_logger
from workers.host.stages import Board, Stage
from workers.hosts.state import HostState

log = get_logger("workers")

LOAD_LIMIT_S: Final = 600.0
"""A load that takes longer is a hang."""
START_LIMIT_S: Final = 300.0
"""So long a host may take until it is ready, the zygote's imports from a cold disk included."""
LOAD_HANG: Final = "hang of a load"
WATCH_S: Final = 0.05
FROZEN_S: Final = 1.0
"""A watchdog that wakes up so much too late was frozen with its process, and perhaps the hosts were, too."""


class Watchdog:
    """A thread that looks at the hosts while they work, whatever the event loop is doing.

    Args:
        hosts: those to look at, now.
        kill: ends a host by its number; OSError if that cannot be done now.
    """

    def __init__(self, hosts: Callable[[], list[HostState]], kill: Callable[[int], None]) -> None:
        self._hosts = hosts
        self._kill = kill
        self._work = Event()
        self._stopped = Event()
        self._thread = Thread(target=self._run, name="host-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is something to watch."""
        if not self._work.is_set():
            self._work.set()

    def stop(self) -> None:
        self._stopped.set()
        self._work.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _run(self) -> None:
        excused = 0.0
        while True:
            self._work.wait()
            slept_at = monotonic()
            self._stopped.wait(WATCH_S)
            if monotonic() - slept_at > FROZEN_S + WATCH_S:
                excused = monotonic()
            self._work.clear()
            if self._stopped.is_set():  # asked after the clearing, so that no order to stop is overlooked
                return
            if self._has_work(excused):
                self._work.set()

    def _has_work(self, excused: float) -> bool:
        try:
            return self._look(excused)
        except (OSError, ValueError) as error:  # a host was being replaced under our eyes: look again
            log.debug("watchdog_look_failed", error=str(error))
            return True

    def _look(self, excused: float) -> bool:
        """Kill what hangs; returns whether there is anything to watch."""
        busy = False
        for host in self._hosts():
            limits = dict(host.outstanding)
            busy = busy or bool(limits) or bool(host.view.loading) or host.ready is None
            is_late = host.ready is None and monotonic() - max(host.asked_at, excused) > START_LIMIT_S
            reason = "hang of its start" if is_late else overdue(host.board, limits, excused)
            if reason is not None and host.killed_for is None:
                self._cut(host, reason)
        return busy

    def _cut(self, host: HostState, reason: str) -> None:
        """Noted first, since the loop may see the end of file at once."""
        host.killed_for = reason
        try:
            self._kill(host.view.id)
        except OSError:
            host.killed_for = None  # the next look tries again, unless the zygote has died, and the host with it


def overdue(board: Board, limits: Mapping[int, float], excused: float) -> str | None:
    """Why the host must be cut, if it must; notes are read twice, so that a change under way is not misread.

    Args:
        board: where the host notes what it is doing.
        limits: seconds that a stage of each micro-batch may last.
        excused: what began before this instant counts from it.
    """
    now = monotonic()
    for note in board.doing():
        limit_s = LOAD_LIMIT_S if note.stage is Stage.LOAD else limits.get(note.batch)
        if limit_s is not None and now - max(note.since, excused) > limit_s and note in board.doing():
            return LOAD_HANG if note.stage is Stage.LOAD else "hang"
    return None
