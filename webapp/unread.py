"""Bodies that nobody read: whether there is one on a connection, and how to end that without losing the answer.

A connection that is closed with bytes waiting on it is reset, and a reset may take the answer away from a client that
is still sending. So the answer is ended first, and what comes is thrown away for a while: so much, so long, at most.
"""

import socket
from contextlib import suppress
from typing import Any, Final

import gevent
from gunicorn.http.body import ChunkedReader

LINGER_S: Final = 5.0
LINGER_BYTES: Final = 64 << 20
"""More than the largest body that is taken by default, so that whoever is just above it hears of it."""
_AT_ONCE: Final = 1 << 16


def is_read(request: Any) -> bool:
    """Whether the next request on the connection begins where reading stands, or behind bytes that are here already."""
    body = request.body
    if body.failed:
        return False
    if isinstance(body.reader, ChunkedReader):
        return body.reader.parser is None
    left: int = body.reader.length
    return left == 0 or left <= request.unreader.buf.getbuffer().nbytes


def linger(connection: socket.socket) -> None:
    """End what we say, and throw away what still comes until the client ends, too, or has sent enough."""
    left = LINGER_BYTES
    with suppress(OSError), gevent.Timeout(LINGER_S, exception=False):
        connection.shutdown(socket.SHUT_WR)
        while left > 0 and (got := connection.recv(_AT_ONCE)):
            left -= len(got)
