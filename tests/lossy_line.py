"""A line to Redis that loses one reply: what was asked for is executed, and who asked never hears of it.

Owned by the test that opens it. Its threads pass bytes on until they meet the one that is to be lost; then that
reply is held back, so that the test can look at the state, until the test has the connection break.
"""

import socket
import threading
from contextlib import suppress
from urllib.parse import urlsplit, urlunsplit

CHUNK = 1 << 16
WAIT_S = 10


class LossyLine:
    """Listens on 127.0.0.1 and passes on to the Redis of ``url``; a context manager."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.port is not None
        self._behind = (parts.hostname or "127.0.0.1", parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition(":")[0] + f":{port}"))
        self._lost: bytes | None = None
        self._sockets: list[socket.socket] = []
        self.has_caught = threading.Event()
        """The reply has come from Redis, and is not passed on."""
        self._may_break = threading.Event()

    def __enter__(self) -> "LossyLine":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._may_break.set()
        for one in (self._listener, *self._sockets):
            _end(one)

    def lose(self, part: str) -> None:
        """Lose the next reply that holds this."""
        self._lost = part.encode()

    def break_connection(self) -> None:
        """End the connection whose reply is held back; others, and later ones, are not touched."""
        self._may_break.set()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._behind)
                self._sockets += [near, far]
                threading.Thread(target=self._ask, args=(near, far), daemon=True).start()
                threading.Thread(target=self._answer, args=(far, near), daemon=True).start()

    def _ask(self, near: socket.socket, far: socket.socket) -> None:
        with suppress(OSError):
            while data := near.recv(CHUNK):
                far.sendall(data)
        _end(far)

    def _answer(self, far: socket.socket, near: socket.socket) -> None:
        with suppress(OSError):
            while data := far.recv(CHUNK):
                if self._lost is not None and self._lost in data:
                    self._lost = None
                    self.has_caught.set()
                    self._may_break.wait(WAIT_S)
                    break
                near.sendall(data)
        _end(near)
        _end(far)


def _end(one: socket.socket) -> None:
    with suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()
