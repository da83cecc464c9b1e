"""How the polling thread sleeps: until a new epoch is told over PostgreSQL's NOTIFY, somebody wakes it, or time is up.

The nudge is a favour: everything here may fail, hang or be swallowed by a connection pooler, and the poll comes all the
same when the time is up. So nothing in here blocks: connecting, too, goes on in steps between two looks at the clock.
"""

import random
import select
import socket
from collections.abc import Generator
from contextlib import suppress
from time import monotonic
from typing import Final, NamedTuple

from psycopg import Error, OperationalError
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import ExecStatus, PGconn, PollingStatus
from psycopg.pq.abc import PGconn as Connection

from common.logs import get_logger
from config_db.engine import CONNECT_TIMEOUT_S
from config_db.publish import CHANNEL

log = get_logger("config_db")

FIRST_RETRY_S: Final = 1.0
LAST_RETRY_S: Final = 30.0


class _Awaited(NamedTuple):
    """What a connection waits for: events on a descriptor. ``is_told``: look at the epoch first."""

    descriptor: int
    events: int
    is_listening: bool = False
    is_told: bool = False


class Listener:
    """Owns a connection that listens for epochs; made after any fork. One thread waits, any thread may wake it.

    States: absent -> connecting -> listening; whatever fails -> absent, until the next try is due.

    Args:
        conninfo: the config DB, as the driver reads it.
    """

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo.encode()
        self._line: Generator[_Awaited, None, None] | None = None
        self._awaited = _Awaited(-1, 0)
        self._try_at = 0.0
        self._give_up_at = 0.0
        self._retry_s = FIRST_RETRY_S
        self._ear, self._bell = socket.socketpair()
        self._ear.setblocking(False)
        self._bell.setblocking(False)

    @property
    def is_listening(self) -> bool:
        """Whether a new epoch would be heard."""
        return self._line is not None and self._awaited.is_listening

    def wait(self, timeout_s: float) -> None:
        """Sleep until a new epoch is told, ``wake`` is called, or the time is up."""
        until = monotonic() + timeout_s
        while (now := monotonic()) < until:
            if self._line is None and now >= self._try_at:
                self._connect(now)
            if self._sleep(until - now):
                return

    def wake(self) -> None:
        """End the present ``wait``, or the next."""
        with suppress(OSError):  # full: it is rung already; closed: nobody waits any more
            self._bell.send(b"\0")

    def close(self) -> None:
        """Drop the connection; by the thread that waits, after its last ``wait``."""
        self._hang_up()
        self._ear.close()
        self._bell.close()

    def _sleep(self, longest_s: float) -> bool:
        """Sleep until something comes, or a connection attempt is due to begin or end; whether to look at the epoch."""
        poll = select.poll()
        poll.register(self._ear, select.POLLIN)
        if self._line is None:
            due_at = self._try_at
        else:
            due_at = self._give_up_at
            poll.register(self._awaited.descriptor, self._awaited.events)
        longest_s = min(longest_s, max(0.0, due_at - monotonic()))
        ready = [descriptor for descriptor, _ in poll.poll(longest_s * 1000)]
        is_told = False
        if self._awaited.descriptor in ready:
            is_told = self._go_on()
        elif self._line is not None and monotonic() >= self._give_up_at:
            self._lose("it does not answer")
        return self._is_rung(ready) or is_told

    def _is_rung(self, ready: list[int]) -> bool:
        if self._ear.fileno() not in ready:
            return False
        with suppress(BlockingIOError):
            while self._ear.recv(4096):
                pass
        return True

    def _connect(self, now: float) -> None:
        self._give_up_at = now + CONNECT_TIMEOUT_S
        self._line = _listening(self._conninfo)
        self._go_on()

    def _go_on(self) -> bool:
        """Let the connection take its next step; whether it was told of an epoch."""
        assert self._line is not None
        was_listening = self._awaited.is_listening
        try:
            self._awaited = next(self._line)
        except Error as error:
            self._lose(" ".join(str(error).split()))
            return False
        if self._awaited.is_listening and not was_listening:
            log.info("epochs_heard")
            self._give_up_at, self._retry_s = float("inf"), FIRST_RETRY_S
        return self._awaited.is_told

    def _lose(self, why: str) -> None:
        if self.is_listening or self._retry_s == FIRST_RETRY_S:
            log.warning("epochs_not_heard", reason=why, instead="polling")
        self._hang_up()
        self._try_at = monotonic() + self._retry_s * random.uniform(0.5, 1)  # noqa: S311 - no secret
        self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)

    def _hang_up(self) -> None:
        line, self._line, self._awaited = self._line, None, _Awaited(-1, 0)
        if line is not None:
            line.close()


def _listening(conninfo: bytes) -> Generator[_Awaited, None, None]:
    """One connection's life, step by step; each step is taken when what the one before awaits has come.

    Raises:
        psycopg.Error: it could not be made, or was lost.
    """
    connection = PGconn.connect_start(_resolved(conninfo))
    try:
        while (status := connection.connect_poll()) != PollingStatus.OK:
            if status == PollingStatus.FAILED:
                raise OperationalError(connection.get_error_message())
            events = select.POLLIN if status == PollingStatus.READING else select.POLLOUT
            yield _Awaited(connection.socket, events)
        connection.nonblocking = 1
        connection.send_query(f"listen {CHANNEL}".encode())
        while connection.flush():
            yield _Awaited(connection.socket, select.POLLIN | select.POLLOUT)
        is_listening = is_told = False
        while True:
            yield _Awaited(connection.socket, select.POLLIN, is_listening, is_told)
            connection.consume_input()
            is_told = _has_answer(connection)  # it listens from now on: what was published before, nobody told
            is_listening |= is_told
            while connection.notifies() is not None:
                is_told = True
    finally:
        connection.finish()


def _resolved(conninfo: bytes) -> bytes:
    """The same with the host's address beside its name: libpq would look it up itself, and everyone would wait.

    Raises:
        psycopg.OperationalError: the name cannot be resolved.
    """
    parts = conninfo_to_dict(conninfo.decode())
    host = str(parts.get("host") or "")
    if not host or host.startswith(("/", "@")) or "," in host or parts.get("hostaddr"):
        return conninfo
    try:
        found = socket.getaddrinfo(host, int(parts.get("port") or 0), type=socket.SOCK_STREAM)
    except OSError as error:
        raise OperationalError(f"the host {host!r} cannot be resolved: {error}") from error
    return make_conninfo(conninfo.decode(), hostaddr=found[0][4][0]).encode()


def _has_answer(connection: Connection) -> bool:
    """Whether PostgreSQL has answered the one command; OperationalError if it has refused."""
    answered = False
    while not connection.is_busy() and (result := connection.get_result()) is not None:
        if result.status != ExecStatus.COMMAND_OK:
            raise OperationalError(connection.get_error_message())
        answered = True
    return answered
