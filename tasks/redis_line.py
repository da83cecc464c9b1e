"""One blocking Redis connection that carries packets of our own: several commands written at once, read in order.

redis-py makes the connection (URL, TLS, credentials); there is no pool and no retry, so a time-out is final and nothing
is sent twice. Under gevent the socket is cooperative. A line has one owner at a time.
"""

from collections.abc import Sequence
from time import monotonic
from typing import Any, Final

import hiredis
import redis
from redis.backoff import NoBackoff
from redis.connection import ConnectionPool
from redis.retry import Retry

from tasks import scripts

CONNECT_TIMEOUT_S: Final = 1.0
ANSWER_TIMEOUT_S: Final = 1.2
IDLE_CHECK_S: Final = 1.0
"""A connection unused for longer is looked at before use: Redis may have been restarted meanwhile."""


def connection_options() -> dict[str, Any]:
    """What every connection of a client of the farm uses: short time-outs, no retries."""
    return {
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": ANSWER_TIMEOUT_S,
        "socket_keepalive": True,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        "driver_info": None,
    }


class RedisLine:
    """A connection made on demand.

    Args:
        url: Redis URL.
        script_names: scripts that Redis is taught at every connect.
        answer_timeout_s: the longest wait for any one answer.
        name: how CLIENT LIST shows the connection.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        script_names: Sequence[str] = (),
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> None:
        options = {**connection_options(), "socket_timeout": answer_timeout_s, "client_name": name}
        self._pool = ConnectionPool.from_url(url, **options)
        self._script_names = tuple(script_names)
        self._connection: Any = None
        self._used_at = 0.0

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection that has not been found broken."""
        return self._connection is not None

    def exchange(self, packet: bytes, answers: int) -> list[Any]:
        """Send a packet of ``answers`` commands and read as many replies; an error reply stands as an exception.

        Raises:
            redis.RedisError, OSError: connecting, sending or reading failed; the connection is closed.
        """
        self.connect()
        try:
            self._connection.send_packed_command([packet], check_health=False)
            replies = [self._read() for _ in range(answers)]
        except BaseException:  # a greenlet may be killed here, and replies must never be read by the next caller
            self.close()
            raise
        self._used_at = monotonic()
        return replies

    def connect(self) -> None:
        """Connect if there is no connection, or if the idle one has been closed by Redis."""
        if self._connection is not None and monotonic() - self._used_at > IDLE_CHECK_S and self._is_stale():
            self.close()
        if self._connection is not None:
            return
        connection: Any = self._pool.make_connection()
        try:
            connection.connect()
            for name in self._script_names:
                connection.send_command("SCRIPT", "LOAD", scripts.source(name))
                connection.read_response()
        except BaseException:
            connection.disconnect()
            raise
        self._connection, self._used_at = connection, monotonic()

    def close(self) -> None:
        """Drop the connection; the next use makes another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()

    def _is_stale(self) -> bool:
        try:
            return bool(self._connection.can_read(timeout=0))
        except (redis.RedisError, OSError):
            return True

    def _read(self) -> Any:
        try:
            return self._connection.read_response(disconnect_on_error=False)
        except redis.ResponseError as error:
            return error


def is_out_of_memory(error: Exception) -> bool:
    """Whether Redis refused a write for lack of memory; out of a script the error keeps only its text."""
    return isinstance(error, redis.exceptions.OutOfMemoryError) or "OOM command not allowed" in str(error)


def pack(*command: Any) -> bytes:
    """One command as Redis reads it."""
    packed: bytes = hiredis.pack_command(command)
    return packed
