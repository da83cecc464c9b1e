"""gunicorn's gevent worker, ending promptly: idle keep-alive connections do not hold up its shutdown.

Stock gunicorn waits for every open connection until ``graceful_timeout``, also for those on which no request is under
way. Here these are closed when the worker is told to stop, and so are WebSockets; requests under way are answered as
before. Told to hurry, it cuts the connections of those who still wait; here they are first told to try again, and their
requests taken back.

A connection on which a body was not read to its end is closed, and the answer says so: stock gunicorn would read on,
however much came. What cannot be read as a request at all is answered in the shape of every other error.
"""

import os
import socket
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Final

import gevent
from gevent import monkey
from gunicorn.workers.ggevent import GeventWorker

from webapp import unread, unreadable
from webapp.farm import farm_of

GIVE_UP_S: Final = 1.0
"""How long callers who are sent away may take to go."""
_PLAIN_SOCKET = monkey.get_original("socket", "socket")


class FarmWebWorker(GeventWorker):  # type: ignore[misc]  # gunicorn is untyped
    """Owns which connections wait for a next request; the greenlet of each enters and leaves itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clients: dict[gevent.Greenlet, socket.socket] = {}
        self._idle: set[gevent.Greenlet] = set()

    def handle(self, listener: Any, client: Any, addr: Any) -> None:
        """Serve one connection."""
        greenlet = gevent.getcurrent()
        self._clients[greenlet] = client
        try:
            super().handle(listener, client, addr)
        finally:
            del self._clients[greenlet]

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        """Answer one request; the connection goes on only if its body was read."""
        asked_to_close = req.should_close
        req.should_close = lambda: asked_to_close() or not unread.is_read(req)
        try:
            super().handle_request(listener_name, req, sock, addr)
        except StopIteration:
            if not unread.is_read(req):
                unread.linger(sock)
            raise
        finally:
            del req.should_close  # it refers back to the request: both would wait for a search for cycles

    def handle_error(self, _req: Any, client: Any, _addr: Any, exc: BaseException) -> None:
        """Answer what is no request, or broke outside of the application; the connection is closed after this."""
        with suppress(OSError):
            client.sendall(unreadable.answer(exc))
            unread.linger(client)

    def timeout_ctx(self) -> "_Idle":
        """What gunicorn holds while it waits for the head of a request."""
        if not self.alive:
            self._close(gevent.getcurrent())
        return _Idle(self._idle, self.cfg.keepalive)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Told to stop: no further requests, and no waiting for any."""
        super().handle_exit(sig, frame)
        gevent.spawn(self._close_idle)

    def handle_quit(self, sig: int, frame: FrameType | None) -> None:
        """Told to hurry: nobody is left who could answer."""
        gevent.spawn(self._quit, sig, frame)

    def _quit(self, sig: int, frame: FrameType | None) -> None:
        self.alive = False
        self._close_idle()
        farm_of(self.wsgi).client.give_up()
        with gevent.Timeout(GIVE_UP_S, exception=False):
            gevent.joinall([one for one in self._clients if one not in self._idle])
        super().handle_quit(sig, frame)

    def _close_idle(self) -> None:
        farm_of(self.wsgi).watchers.close()
        for greenlet in list(self._idle):
            self._close(greenlet)

    def _close(self, greenlet: gevent.Greenlet) -> None:
        """End a connection as if its client had."""
        # through a descriptor that gevent does not watch: its own shutdown would wake the reader with an error
        with suppress(OSError), _PLAIN_SOCKET(fileno=os.dup(self._clients[greenlet].fileno())) as plain:
            plain.shutdown(socket.SHUT_RD)


class _Idle:
    """The current greenlet waits for a request, up to ``keepalive_s``."""

    def __init__(self, idle: "set[gevent.Greenlet]", keepalive_s: float) -> None:
        self._idle = idle
        self._greenlet = gevent.getcurrent()
        self._timeout = gevent.Timeout(keepalive_s, exception=False)

    def __enter__(self) -> None:
        self._idle.add(self._greenlet)
        self._timeout.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._idle.discard(self._greenlet)
        self._timeout.close()
        return error is self._timeout
