"""Whether the caller of a waiting request is still there, by a look at its connection that takes nothing from it.

The end of what a caller sends, or a reset, means that it has left. A caller that has closed its sending side alone
(``shutdown(SHUT_WR)``) cannot be told from one that has closed the connection, and other servers and proxies read it as
we do. Such a one is answered nevertheless: 409 ``CANCELLED``, or with its outcome if that was under way. Bytes that can
be read are the next request on the connection, sent ahead, and no sign of leaving; an end behind them is seen only once
they are read.
"""

import socket
import ssl
from collections.abc import Callable
from functools import partial

from flask import request


def watcher() -> Callable[[], bool] | None:
    """What tells whether the caller of the current request has left; None if its connection cannot be looked at."""
    connection = request.environ.get("gunicorn.socket")
    if connection is None or isinstance(connection, ssl.SSLSocket):  # of a TLS socket nothing can be peeked
        return None
    return partial(has_left, connection)


def has_left(connection: socket.socket) -> bool:
    """Whether nothing more will come over a connection on which nobody reads now. Does not block."""
    connection.settimeout(0)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(None)
