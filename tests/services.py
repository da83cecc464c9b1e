"""Real servers and processes for tests: each on 127.0.0.1 and a free port, stopped by its own process id."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from time import monotonic

import redis

from cli import servers

STOP_S = 15
DYING_WITH_US = (
    sys.executable,
    "-c",
    "import os, sys; from workers.host.orphans import die_with_parent; "
    "die_with_parent(int(sys.argv[1])); os.execvp(sys.argv[2], sys.argv[2:])",
    str(os.getpid()),
)
"""Becomes the command given after it, and leaves no server behind when the tests are killed."""
ROOT = Path(__file__).resolve().parent.parent
_spawned: "list[subprocess.Popen[bytes]]" = []


def wait_until(predicate: Callable[[], object], timeout_s: float = 30, what: str = "the condition") -> None:
    """Look every 10 ms until the predicate is true; AssertionError names what was waited for."""
    deadline = monotonic() + timeout_s
    pause = threading.Event()
    while not predicate():
        if monotonic() > deadline:
            raise AssertionError(f"after {timeout_s} s still waiting for {what}")
        pause.wait(0.01)


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((servers.HOST, 0))
        return int(probe.getsockname()[1])


def spawn(command: list[str], log: Path, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Start a process of the farm, which dies with the tests and, at the latest, with the file that started it."""
    with log.open("wb") as output:
        process = subprocess.Popen([*DYING_WITH_US, *command], cwd=ROOT, env=environment, stdout=output, stderr=output)
    _spawned.append(process)
    return process


def end_what_is_left() -> None:
    """End what ``spawn`` has started and nobody has ended."""
    for process in _spawned:
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait(STOP_S)
    _spawned.clear()


class _Server:
    """One server process and its directory."""

    name = ""
    stop_signal = signal.SIGTERM

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"farmhand-{self.name}-"))
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def _start(self, command: list[str], is_ready: Callable[[], bool]) -> None:
        with (self.directory / "server.log").open("ab") as log:
            self.process = subprocess.Popen([*DYING_WITH_US, *command], stdout=log, stderr=log)
        wait_until(is_ready, 20, f"{self.name} to answer; see {self.directory / 'server.log'}")

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def stop(self) -> None:
        """End it as an operator would; the data stays."""
        self._end(self.stop_signal)

    def kill(self) -> None:
        """End it as a power cut would."""
        self._end(signal.SIGKILL)

    def _end(self, number: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
            self.process.wait(STOP_S)
            self.process = None

    def remove(self) -> None:
        """End it and forget its data."""
        self.kill()
        rmtree(self.directory)


class RedisServer(_Server):
    """A redis-server as the farm wants it: appendonly, noeviction."""

    name = "redis"

    def __init__(self) -> None:
        super().__init__()
        self._server = servers.RedisServer(self.directory, self.port)
        self._server.prepare()
        self.url = self._server.url
        self.start()

    def start(self) -> None:
        """Start, or start again on the same port and data."""
        self._start(self._server.command(), self._server.is_ready)

    def client(self) -> "redis.Redis":
        """A client of its own connection."""
        return redis.Redis.from_url(self.url, socket_timeout=10)


class PostgresServer(_Server):
    """A PostgreSQL, and in it a migrated template that tests clone. ``settings`` are further ``name=value``."""

    name = "postgres"
    stop_signal = signal.SIGINT
    """Postgres' fast shutdown: it does not wait for clients."""

    def __init__(self, *settings: str) -> None:
        super().__init__()
        # as fast as a throw-away database may be
        self._server = servers.PostgresServer(
            self.directory, self.port, ("fsync=off", "synchronous_commit=off", "full_page_writes=off", *settings)
        )
        self._server.prepare()
        self.start()

    def start(self) -> None:
        """Start, or start again on the same port and data."""
        self._start(self._server.command(), self._server.is_ready)

    def url(self, database: str) -> str:
        return self._server.url(database)

    def empty_database(self) -> str:
        """The URL of a new database without tables."""
        name = f"test_{secrets.token_hex(6)}"
        self._server.ensure_database(name)
        return self.url(name)

    def fresh_database(self) -> str:
        """The URL of a new database at the newest migration, cloned from a template that is migrated once."""
        from config_db.migrate import migrate

        template = self.directory / "template"
        if not template.exists():
            self._server.ensure_database("migrated")
            migrate(self.url("migrated"))
            template.touch()
        name = f"test_{secrets.token_hex(6)}"
        self._server.ensure_database(name, template="migrated")
        return self.url(name)
