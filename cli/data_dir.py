"""The directory in which one farm of one machine keeps everything: who has it, its ports, logs and former children.

Layout: ``lock`` (who has it), ``ports.json``, ``children.json``, ``logs/``, ``redis/``, ``postgres/``, ``state/`` (what
web and worker keep), ``run/`` (answers of steps with an end).
"""

import errno
import fcntl
import json
import os
import re
import socket
from collections.abc import Iterable
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Any, Final

from cli import processes
from cli.servers import HOST
from common.errors import SetupError

ORPHANS_WAIT_S: Final = 10.0
_FOLDERS: Final = ("logs", "run", "state")
_PID: Final = re.compile("[1-9][0-9]{0,8}")


class DataDir:
    """Owns the lock on the directory while it is open; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._lock: IO[str] | None = None

    def __enter__(self) -> "DataDir":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def take(self, *, url: str) -> None:
        """Make the directory this process's own until it ends, and say where the farm will be found.

        Raises:
            SetupError: another farm has it, or it cannot be written.
        """
        try:
            for folder in _FOLDERS:
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("a+")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock.seek(0)
            self._lock.truncate()
            self._lock.write(json.dumps({"pid": os.getpid(), "url": url}))
            self._lock.flush()
        except BlockingIOError:
            raise SetupError(
                f"a farm already runs on {self.path}{self._holder()}: stop it, or choose another with --data-dir"
            ) from None
        except OSError as error:
            raise SetupError(
                f"the data directory {self.path} cannot be written ({error.strerror}): choose another with --data-dir"
            ) from error

    def log(self, name: str) -> Path:
        """The log of a child."""
        return self.path / "logs" / f"{name}.log"

    def answer(self, name: str) -> Path:
        """Where a step with an end leaves what it prints."""
        return self.path / "run" / f"{name}.json"

    def port(self, name: str) -> int:
        """A port of 127.0.0.1 for a server of the farm's own: the one it had, if that is free."""
        ports = self._read("ports.json", {})
        kept = ports.get(name)
        if not isinstance(kept, int) or why_not_free(HOST, kept) is not None:
            ports[name] = kept = _free_port()
            self._write("ports.json", ports)
        return kept

    def remember_children(self, pids: Iterable[int]) -> None:
        """Note who must be gone before the next farm starts here."""
        self._write("children.json", {str(pid): processes.born_at(pid) for pid in pids})

    def await_orphans(self) -> None:
        """Wait until no child of a former farm is left: killed supervisors take theirs along, but not in no time.

        Raises:
            SetupError: some outlive even SIGKILL.
        """
        noted = self._read("children.json", {}).items()
        former = {int(pid): born for pid, born in noted if _PID.fullmatch(pid) and isinstance(born, float)}
        kill_at = monotonic() + ORPHANS_WAIT_S
        while left := processes.left_of(former):
            if monotonic() > kill_at + ORPHANS_WAIT_S:
                raise SetupError(f"processes of a former farm do not end: {', '.join(map(str, left))}")
            if monotonic() > kill_at:
                processes.kill(left)
            sleep(0.02)

    def _holder(self) -> str:
        holder = self._read("lock", {})
        return f" (pid {holder['pid']}, {holder['url']})" if {"pid", "url"} <= set(holder) else ""

    def _read(self, name: str, otherwise: dict[str, Any]) -> dict[str, Any]:
        """What stands in a file of ours; ``otherwise`` if it is missing or was cut off by a crash."""
        try:
            content = json.loads((self.path / name).read_text())
        except (FileNotFoundError, ValueError):
            return otherwise
        return content if isinstance(content, dict) else otherwise

    def _write(self, name: str, content: dict[str, Any]) -> None:
        fresh = self.path / f"{name}.new"
        fresh.write_text(json.dumps(content))
        fresh.replace(self.path / name)


def check_port(host: str, port: int, *, flag: str) -> None:
    """SetupError if nobody could listen there; names the flag that changes it."""
    reason = why_not_free(host, port)
    if reason is not None:
        raise SetupError(f"port {port} of {host} {reason}: choose another with {flag}")


def why_not_free(host: str, port: int) -> str | None:
    """None if one could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "is taken"
            return f"cannot be listened on ({error.strerror})"
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
