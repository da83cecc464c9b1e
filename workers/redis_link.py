"""The incarnation's own Redis connection, driven by the worker's event loop: calls never block and never get lost.

A call is written at once and answered by callback, in order. Calls marked ``repeat`` outlive the connection: they are
sent again over the next one until answered, so they must be harmless to repeat. Reconnects are tried every 0.5 s.
Owned by the event loop thread.
"""

import os
import socket
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

import hiredis
import redis
from redis.backoff import NoBackoff
from redis.connection import ConnectionPool
from redis.retry import Retry

from common.logs import get_logger
from tasks import scripts

log = get_logger("workers")

RECONNECT_S: Final = 0.5
CONNECT_TIMEOUT_S: Final = 1.0
SILENT_S: Final = 5.0
"""A call unanswered for longer means a half-open connection."""
_READ_BYTES: Final = 1 << 18
_NOT_YET: Final = ("LOADING ", "BUSY ", "MASTERDOWN ")
"""Redis will answer, but not now: as good as no connection."""


@dataclass(slots=True)
class _Call:
    packed: bytes
    then: Callable[[Any], None] | None
    repeat: bool
    sent_at: float | None = None
    """When its last byte was written."""


class LinkLostError(ConnectionError):
    """Given to a call's callback when its connection broke and the call is not repeated."""


class RedisLink:
    """One pipelined connection on a kombu hub.

    Args:
        url: Redis URL; TLS and credentials are redis-py's business.
        on_connect: called after every (re)connect, before waiting calls are repeated.
        script_names: scripts loaded with every connect, so that a restarted Redis knows them.
    """

    def __init__(self, url: str, *, on_connect: Callable[[], None], script_names: tuple[str, ...]) -> None:
        self._pool = ConnectionPool.from_url(
            url,
            socket_connect_timeout=CONNECT_TIMEOUT_S,
            socket_timeout=CONNECT_TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            driver_info=None,
        )
        self._on_connect = on_connect
        self._script_names = script_names
        self._connection: Any = None
        self._socket: socket.socket | None = None
        self._reader = hiredis.Reader()
        self._pending: deque[_Call] = deque()
        self._unsent: deque[tuple[_Call, memoryview]] = deque()
        self._heard_at = self._moved_at = 0.0
        self._hub: Any = None
        self._write_fd: int | None = None
        self._next_try = 0.0

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection that has not been found broken."""
        return self._socket is not None

    def register(self, hub: Any) -> None:
        """Read on this hub from now on; called again after every ``hub.reset()``."""
        self._hub = hub
        self._close_write_fd()
        if self._socket is None:
            self.connect()
        else:
            hub.add_reader(self._socket.fileno(), self._on_readable)
            self._flush()

    def call(self, *command: Any, then: Callable[[Any], None] | None = None, repeat: bool = False) -> None:
        """Send one command. ``then`` gets the reply, a ``hiredis.ReplyError``, or a LinkLostError."""
        call = _Call(_pack(command), then, repeat)
        if self._socket is None and not repeat:
            if then is not None:
                then(LinkLostError("Redis is away"))
            return
        self._pending.append(call)
        if self._socket is not None:
            self._write(call)

    def script(
        self,
        name: str,
        keys: list[str],
        arguments: list[Any],
        *,
        then: Callable[[Any], None] | None = None,
        repeat: bool = False,
    ) -> None:
        """Run one of the farm's Lua scripts."""
        self.call("EVALSHA", scripts.sha(name), len(keys), *keys, *arguments, then=then, repeat=repeat)

    def connect(self) -> bool:
        """Connect now if there is no connection; true if there is one afterwards."""
        if self._socket is not None:
            return True
        self._next_try = monotonic() + RECONNECT_S
        connection: Any = self._pool.make_connection()
        try:
            connection.connect()
        except (redis.RedisError, OSError) as error:
            connection.disconnect()
            log.warning("redis_link_refused", error=str(error))
            return False
        self._connection, self._socket = connection, connection._sock  # noqa: SLF001 - its own socket, read by the loop
        assert self._socket is not None  # connect() has returned
        self._socket.setblocking(False)
        self._reader = hiredis.Reader()
        self._heard_at = self._moved_at = monotonic()
        waiting, self._pending = self._pending, deque()
        self._unsent.clear()
        if self._hub is not None:
            self._hub.add_reader(self._socket.fileno(), self._on_readable)
        for name in self._script_names:
            self.call("SCRIPT", "LOAD", scripts.source(name))
        self._on_connect()
        self._pending.extend(waiting)
        for call in waiting:
            if self._socket is not None:  # else it broke again, and the next connection sends them
                self._write(call)
        return self._socket is not None

    def tend(self) -> None:
        """Reconnect when it is time to, and drop a connection that has fallen silent; called by a timer."""
        now = monotonic()
        if self._socket is None:
            if now >= self._next_try:
                self.connect()
        elif self._pending and now - self._silent_since(self._pending[0]) > SILENT_S:
            self._lose("no answer")

    def close(self) -> None:
        """Drop the connection; waiting calls are forgotten."""
        self._pending.clear()
        if self._socket is not None:
            self._disconnect()

    def wait_answered(self, timeout_s: float) -> bool:
        """Block until every call is answered, without the hub: for shutdown. False if time ran out or Redis left."""
        deadline = monotonic() + timeout_s
        while self._pending and self._socket is not None:
            remaining_s = deadline - monotonic()
            if remaining_s <= 0:
                return False
            self._socket.settimeout(min(0.05, remaining_s))
            try:
                self._send_all()
                self._take(self._socket.recv(_READ_BYTES))
            except TimeoutError:
                continue
            except OSError as error:
                self._lose(str(error))
        return not self._pending

    def _write(self, call: _Call) -> None:
        call.sent_at = None
        was_idle = not self._unsent
        self._unsent.append((call, memoryview(call.packed)))
        if was_idle:
            self._flush()

    def _flush(self) -> None:
        """Send what the socket takes; the rest waits for the loop to say that it takes more."""
        try:
            self._send_all()
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError, TimeoutError):
            self._want_write()
            return
        except OSError as error:
            self._lose(str(error))
            return
        self._close_write_fd()

    def _send_all(self) -> None:
        assert self._socket is not None  # callers have checked
        while self._unsent:
            call, left = self._unsent[0]
            sent = self._socket.send(left)
            self._moved_at = monotonic()
            if sent == len(left):
                call.sent_at = self._moved_at
                self._unsent.popleft()
            else:
                self._unsent[0] = call, left[sent:]

    def _silent_since(self, first: _Call) -> float:
        """Since when nothing has come back, or, while a large backlog goes out, nothing has been taken."""
        return max(self._heard_at, self._moved_at if first.sent_at is None else first.sent_at)

    def _want_write(self) -> None:
        # kombu's epoll poller ignores a second registration of one descriptor, so writing gets a duplicate of its own.
        if self._write_fd is None and self._hub is not None and self._socket is not None:
            self._write_fd = os.dup(self._socket.fileno())
            self._hub.add_writer(self._write_fd, self._flush)

    def _close_write_fd(self) -> None:
        if self._write_fd is not None:
            if self._hub is not None:
                self._hub.remove_writer(self._write_fd)
            os.close(self._write_fd)
            self._write_fd = None

    def _on_readable(self) -> None:
        """Read all there is: with TLS the kernel's readiness says nothing of what is already decrypted."""
        while self._socket is not None:
            try:
                data = self._socket.recv(_READ_BYTES)
            except (BlockingIOError, ssl.SSLWantReadError):
                return
            except OSError as error:
                self._lose(str(error))
                return
            self._take(data)
            if len(data) < _READ_BYTES:
                return

    def _take(self, data: bytes) -> None:
        if not data:
            self._lose("closed by Redis")
            return
        self._heard_at = monotonic()
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            call = self._pending.popleft()
            if isinstance(reply, hiredis.ReplyError) and call.repeat and str(reply).startswith(_NOT_YET):
                self._pending.appendleft(call)
                self._lose(str(reply))
                return
            if isinstance(reply, hiredis.ReplyError) and call.repeat and str(reply).startswith("NOSCRIPT"):
                self._load_and_repeat(call)
            elif call.then is not None:
                call.then(reply)

    def _load_and_repeat(self, call: _Call) -> None:
        """Somebody flushed the scripts: load them and send the call again."""
        for name in self._script_names:
            self.call("SCRIPT", "LOAD", scripts.source(name))
        self._pending.append(call)
        if self._socket is not None:
            self._write(call)

    def _lose(self, reason: str) -> None:
        """Give up the connection; repeatable calls wait for the next one, the others learn that theirs was lost."""
        log.warning("redis_link_lost", reason=reason, unanswered=len(self._pending))
        self._disconnect()
        lost = [call for call in self._pending if not call.repeat]
        self._pending = deque(call for call in self._pending if call.repeat)
        for call in lost:
            if call.then is not None:
                call.then(LinkLostError(f"the connection to Redis was lost: {reason}"))

    def _disconnect(self) -> None:
        if self._hub is not None and self._socket is not None:
            self._hub.remove_reader(self._socket.fileno())
        self._close_write_fd()
        self._connection.disconnect()
        self._connection = self._socket = None
        self._reader = hiredis.Reader()  # replies of the lost connection must not answer calls of the next
        self._unsent.clear()


def _pack(command: tuple[Any, ...]) -> bytes:
    packed: bytes = hiredis.pack_command(command)
    return packed
