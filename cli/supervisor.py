"""Children that depend on each other: started when what they need is ready, restarted when they die, ended in order.

States of a unit: waiting (for what it needs, or for its back-off) -> running -> ready; of the farm: starting -> up
-> stopping. While the farm starts, a unit that cannot start ends it; once it is up, nothing but a signal does.
Owned by the main thread, the only one of its process.
"""

import json
import os
import select
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from time import monotonic
from types import FrameType
from typing import Any, Final

from cli import logs, processes
from cli.backoff import Backoff
from cli.data_dir import DataDir
from cli.screen import Screen
from common.errors import SetupError

STARTING_TICK_S: Final = 0.02
TICK_S: Final = 5.0
SAY_AFTER_S: Final = 1.0
SAY_AGAIN_S: Final = 15.0
SERVING_STOP_S: Final = 8.3
"""How long what serves may take to end: a worker drains 7 s and ends its hosts."""
STORING_STOP_S: Final = 1.0
UNSERVED_S: Final = 0.5
"""How long the API waits for answers once no worker is left to give any."""
KILLED_S: Final = 0.5
"""How long the kernel may take to bury what was killed. With both stages' waits: the farm ends within 10 s."""
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stage(IntEnum):
    """In which order units are ended."""

    SERVING = 0
    STORING = 1


@dataclass(frozen=True)
class Unit:
    """One child.

    Args:
        name: of the unit and its log.
        doing: what is under way until it is ready, for the operator.
        command: gives what is run; asked at every start.
        environment: all of it.
        needs: units that must be ready before it is started.
        is_ready: asked again and again, with the child's process id; must not block. Ignored for ``once``.
        once: a step with an end: ready when it has ended well, never started again.
        on_ready: called once, when it is ready for the first time.
        on_death: called with the process id of a child that died.
        tries: how often it is started before the farm gives up starting.
        is_vital: whether the farm gives up starting without it.
        hurry: the signal that ends it at once but cleanly.
    """

    name: str
    doing: str
    command: Callable[[], Sequence[str]]
    environment: Mapping[str, str]
    needs: tuple[str, ...] = ()
    is_ready: Callable[[int], bool] = lambda _: True
    once: bool = False
    on_ready: Callable[[], object] = lambda: None
    on_death: Callable[[int], object] = lambda _: None
    tries: int = 1
    is_vital: bool = True
    is_worker: bool = False
    stage: Stage = Stage.SERVING
    stop_signal: signal.Signals = signal.SIGTERM
    hurry: signal.Signals = signal.SIGKILL


@dataclass
class _Child:
    """The present life of a unit, and what is known of the former ones."""

    unit: Unit
    backoff: Backoff = field(default_factory=Backoff)
    process: "subprocess.Popen[bytes] | None" = None
    start_at: float = 0.0
    started_at: float = 0.0
    first_started_at: float | None = None
    say_at: float = 0.0
    has_told: bool = False
    log_from: int = 0
    deaths: int = 0
    is_ready: bool = False
    was_ready: bool = False

    @property
    def is_over(self) -> bool:
        return self.unit.once and self.was_ready


class Supervisor:
    """Owns the farm's children, and the signals of this process while it is open; a context manager."""

    def __init__(self, data: DataDir, screen: Screen) -> None:
        self._data = data
        self._screen = screen
        self._children: dict[str, _Child] = {}
        self._is_up = False
        self._signals: list[int] = []
        self._wakeup, self._wakeup_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def __enter__(self) -> "Supervisor":
        processes.adopt_orphans()
        signal.set_wakeup_fd(self._wakeup_in, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes the wait
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        signal.set_wakeup_fd(-1)
        for number in (*_SIGNALS, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.close(self._wakeup)
        os.close(self._wakeup_in)

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether a signal asked for the end."""
        return bool(self._signals)

    def add(self, unit: Unit) -> None:
        """Take a child on; it starts with the next turn of ``run``."""
        self._children[unit.name] = _Child(unit)

    def is_ready(self, name: str) -> bool:
        """Whether a unit is ready, or has ended well."""
        return self._children[name].is_ready

    def has_failed(self, name: str) -> bool:
        """Whether a step that the farm can do without has failed."""
        child = self._children[name]
        return child.deaths >= child.unit.tries and child.process is None and not child.is_ready

    def answer(self, name: str) -> dict[str, Any]:
        """What a step that ended well has printed."""
        return dict(json.loads(self._data.answer(name).read_bytes()))

    def cause(self, name: str) -> str:
        """Why a unit's last life ended, or what keeps it from being ready, in one line."""
        return logs.cause(self._data.log(name), self._children[name].log_from)

    def run(self, until: Callable[[], bool]) -> None:
        """Start, watch and restart children until the condition holds or a signal asks for the end.

        Raises:
            SetupError: a unit cannot start, and the farm was not up yet.
        """
        self._turn()
        while not self._signals and not until():
            self._wait()
            self._turn()

    def _turn(self) -> None:
        self._reap()
        self._start_due()
        self._ask_ready()

    def be_up(self) -> None:
        """From now on children that die are started again, whatever it takes."""
        self._is_up = True

    # -- one turn ---------------------------------------------------------------------------------------------------

    def _start_due(self) -> None:
        now, is_new = monotonic(), False
        for child in self._children.values():
            if child.process is None and not self._is_done(child) and now >= child.start_at and self._has_needs(child):
                self._start(child)
                is_new = True
        if is_new:
            self._data.remember_children(self._running())

    def _is_done(self, child: _Child) -> bool:
        return child.is_over or (child.unit.once and child.deaths >= child.unit.tries)

    def _has_needs(self, child: _Child) -> bool:
        """Only the first start waits for others: later lives find by themselves what has come back."""
        return child.was_ready or all(self._children[need].was_ready for need in child.unit.needs)

    def _start(self, child: _Child) -> None:
        unit, log = child.unit, self._data.log(child.unit.name)
        command = unit.command()
        logs.keep_small(log)
        child.log_from = log.stat().st_size if log.exists() else 0
        try:
            child.process = processes.spawn(
                command,
                environment=unit.environment,
                log=log,
                output=self._data.answer(unit.name) if unit.once else None,
            )
        except OSError as error:
            raise SetupError(f"{unit.name} cannot be started: {command[0]}: {error.strerror}") from error
        child.started_at = monotonic()
        if child.first_started_at is None:
            child.first_started_at, child.say_at = child.started_at, child.started_at + SAY_AFTER_S

    def _ask_ready(self) -> None:
        for child in self._children.values():
            if child.process is None or child.is_ready:
                continue
            if not child.unit.once and child.unit.is_ready(child.process.pid):
                self._now_ready(child)
            elif not child.was_ready and monotonic() > child.say_at:
                self._say_waiting(child)

    def _say_waiting(self, child: _Child) -> None:
        is_news, child.has_told = not child.has_told, True
        self._screen.doing(child.unit.doing if is_news else f"{child.unit.doing}: {self.cause(child.unit.name)}")
        child.say_at = monotonic() + SAY_AGAIN_S

    def _now_ready(self, child: _Child) -> None:
        child.is_ready = True
        if not child.was_ready:
            assert child.first_started_at is not None  # it runs
            child.was_ready = True
            seconds = monotonic() - child.first_started_at
            if seconds > SAY_AFTER_S:
                self._screen.done(child.unit.doing, seconds)
            child.unit.on_ready()

    def _reap(self) -> None:
        for child in self._children.values():
            if child.process is not None and child.process.poll() is not None:
                self._on_end(child, child.process.returncode)
        processes.bury_orphans(set(self._running()))

    def _on_end(self, child: _Child, status: int) -> None:
        assert child.process is not None
        pid, child.process = child.process.pid, None
        if child.unit.once and status == 0:
            self._now_ready(child)
            return
        processes.kill_group(pid)
        child.is_ready = False
        child.deaths += 1
        child.unit.on_death(pid)
        if child.unit.once:
            self._on_failed_step(child)
            return
        wait_s = child.backoff.next_wait_s(lived_s=monotonic() - child.started_at)
        child.start_at = monotonic() + wait_s
        if not self._is_up and child.deaths >= child.unit.tries and child.unit.is_vital:
            raise SetupError(f"{child.unit.name} {how_ended(status)}: {self.cause(child.unit.name)}")
        if self._is_up:
            self._screen.trouble(
                f"{child.unit.name} (pid {pid}) {how_ended(status)}; starting it again in {wait_s:g} s; "
                f"its log: {self._data.log(child.unit.name)}"
            )

    def _on_failed_step(self, child: _Child) -> None:
        if child.unit.is_vital and not self._is_up:
            raise SetupError(self.cause(child.unit.name))

    def _wait(self) -> None:
        now = monotonic()
        waits = [TICK_S]
        for child in self._children.values():
            if child.process is None and not self._is_done(child) and self._has_needs(child):
                waits.append(max(0.0, child.start_at - now))
            elif child.process is not None and not child.is_ready:
                waits.append(STARTING_TICK_S)
        self._sleep(min(waits))
        for name in self._children:
            logs.keep_small(self._data.log(name))

    def _sleep(self, wait_s: float) -> None:
        """Until a signal comes or a child ends, at most ``wait_s``."""
        if select.select([self._wakeup], [], [], wait_s)[0]:
            with suppress(BlockingIOError):
                os.read(self._wakeup, 4096)

    def _running(self) -> list[int]:
        return [child.process.pid for child in self._children.values() if child.process is not None]

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._signals.append(number)

    # -- the end ----------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        """End every child: what serves first, what stores last. A second signal ends all at once."""
        for stage, wait_s in ((Stage.SERVING, SERVING_STOP_S), (Stage.STORING, STORING_STOP_S)):
            self._end([child for child in self._children.values() if child.unit.stage is stage], wait_s)
        processes.kill_descendants(KILLED_S)
        self._data.remember_children(())

    def _end(self, children: list[_Child], wait_s: float) -> None:
        alive = [child for child in children if child.process is not None]
        for child in alive:
            self._send(child, child.unit.stop_signal if not child.unit.once else signal.SIGKILL)
        deadline, unserved_at = monotonic() + wait_s, None
        has_workers = any(child.unit.is_worker for child in alive)
        while alive := [child for child in alive if child.process is not None and child.process.poll() is None]:
            if monotonic() > deadline or len(self._signals) > 1:
                break
            if has_workers and not any(child.unit.is_worker for child in alive):
                has_workers, unserved_at = False, monotonic() + UNSERVED_S
            if unserved_at is not None and monotonic() > unserved_at:
                unserved_at = None
                for child in alive:
                    self._send(child, child.unit.hurry)
            self._sleep(STARTING_TICK_S)
        for child in children:
            if child.process is not None:
                processes.kill_group(child.process.pid)
                child.process.wait()
                child.process = None

    def _send(self, child: _Child, number: signal.Signals) -> None:
        if child.process is not None:
            child.process.send_signal(number)


def how_ended(status: int) -> str:
    """The end of a process in words."""
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"
