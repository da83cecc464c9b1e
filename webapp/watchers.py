"""The WebSockets of one web process: how many there are, what they cost, and how each ends.

A watcher is accepted -> told about once a second -> closed by itself, by a shutdown, or because it does not answer.
Each costs two greenlets and no work of its own: the text is made once for all. One that vanishes is found when it
leaves two pings unanswered, or when what is sent to it is not taken in time.
"""

import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from threading import Lock, Thread
from time import monotonic
from typing import Any, Final

from flask import Response
from simple_websocket import ConnectionClosed, Server
from simple_websocket import ConnectionError as HandshakeError
from wsproto.frame_protocol import CloseReason
from wsproto.utilities import RemoteProtocolError

from common.errors import CapacityError, RequestError
from common.logs import get_logger

log = get_logger("webapp")

EVERY_S: Final = 1.0
PING_S: Final = 20.0
SEND_S: Final = 10.0
"""A client that takes nothing for so long is gone."""
MOST_BYTES: Final = 4096
"""Nothing that a watcher says is read, so it need not be long."""
RETRY_AFTER_S: Final = 10.0
_SOCKET: Final = "gunicorn.socket"
_COMPRESSION: Final = "HTTP_SEC_WEBSOCKET_EXTENSIONS"


class Watchers:
    """Owns the open WebSockets; thread-safe.

    Args:
        most: how many there may be at once.
        ping_s: how long a watcher may be silent before it is asked, and again until it is dropped.
    """

    def __init__(self, most: int, *, ping_s: float = PING_S) -> None:
        self._most = most
        self._ping_s = ping_s
        self._lock = Lock()
        self._open: set[Server] = set()
        self._accepting = 0
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._open)

    def serve(self, environ: Mapping[str, Any], text: Callable[[], str]) -> Response:
        """Make a WebSocket of the current request and send it a text each second until it ends.

        Args:
            environ: of the request.
            text: the newest; a CapacityError skips one, a RequestError ends it: the caller may watch no longer.

        Raises:
            CapacityError: there are as many as there may be.
            RequestError: the handshake is not one.
        """
        watcher = self._accept(environ)
        try:
            while True:
                with suppress(CapacityError):
                    watcher.send(text())
                due = monotonic() + EVERY_S
                while (left_s := due - monotonic()) > 0:
                    watcher.receive(timeout=left_s)  # and drop it
        except (ConnectionClosed, OSError):
            pass
        except RequestError:
            _end(watcher, CloseReason.POLICY_VIOLATION)
        except Exception:  # an answer of HTTP has no place here any more
            log.exception("watcher_broken")
        finally:
            self._forget(watcher)
        return _Done()

    def close(self) -> None:
        """Say goodbye to all, and accept no more: this process ends."""
        with self._lock:
            self._is_closed = True
            leaving = list(self._open)
        for watcher in leaving:  # each aside: one that takes nothing holds up nobody's goodbye
            Thread(target=_end, args=(watcher, CloseReason.GOING_AWAY), daemon=True).start()

    def _accept(self, environ: Mapping[str, Any]) -> Server:
        if _SOCKET not in environ:
            raise RequestError("the server in front of this application makes no WebSockets")
        with self._lock:
            if self._is_closed or len(self._open) + self._accepting >= self._most:
                raise CapacityError(
                    f"this process serves {self._most} watchers and takes no more now", retry_after_s=RETRY_AFTER_S
                )
            self._accepting += 1
        watcher: Server | None = None
        try:
            watcher = Server.accept(
                _plain(environ),
                ping_interval=self._ping_s,
                max_message_size=MOST_BYTES,
                thread_class=partial(Thread, daemon=True),
            )
        except (RemoteProtocolError, HandshakeError, OSError) as error:
            raise RequestError(f"this is no WebSocket handshake: {error}") from error
        finally:
            with self._lock:  # in one step, so that it has its place all the while
                self._accepting -= 1
                if watcher is not None:
                    self._open.add(watcher)
        watcher.sock.bound()
        if self._is_closed:
            _end(watcher, CloseReason.GOING_AWAY)
        return watcher

    def _forget(self, watcher: Server) -> None:
        with self._lock:
            self._open.discard(watcher)
        _end(watcher, CloseReason.NORMAL_CLOSURE)


class _Socket:
    """What the library is given for a socket: ``send`` sends everything or fails, one call at a time.

    A plain ``send`` may send a part of a frame, which garbles all that follow.
    """

    def __init__(self, inner: socket.socket) -> None:
        self._inner = inner
        self._sending = Lock()

    def bound(self) -> None:
        """Wait for the client no longer than is said above; not before it watches, as others may use the connection."""
        self._inner.settimeout(SEND_S)

    def send(self, data: bytes) -> int:
        with self._sending:
            self._inner.sendall(data)
        return len(data)

    def recv(self, size: int) -> bytes:
        return self._inner.recv(size)

    def fileno(self) -> int:
        return self._inner.fileno()

    def close(self) -> None:
        """Wakes whoever reads, too."""
        with suppress(OSError):
            self._inner.shutdown(socket.SHUT_RDWR)


class _Done(Response):
    """The answer to a request that has become a WebSocket and is over: gunicorn closes the connection on this."""

    def __call__(self, *_: Any) -> Any:
        raise StopIteration


def _plain(environ: Mapping[str, Any]) -> dict[str, Any]:
    """The request without an offer to compress: that would cost memory and time for each watcher alone."""
    return {
        **{name: value for name, value in environ.items() if name != _COMPRESSION},
        _SOCKET: _Socket(environ[_SOCKET]),
    }


def _end(watcher: Server, reason: CloseReason) -> None:
    """Close it, if it is open, and wake who waits for it."""
    with suppress(ConnectionClosed, OSError):
        watcher.close(reason)
    watcher.event.set()
    watcher.sock.close()
