"""The stream to one host: frames out and in, on the worker's event loop, never blocking.

Owns the socket, what it has not taken yet, and what has come of a frame so far. Knows nothing of what frames mean.
"""

import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

from workers.host import frames

_READ_BYTES: Final = 1 << 18


class Link:
    """One end of a socket pair; the other is the host's. ``has_ended``: the host closed it, nothing more comes."""

    def __init__(self, stream: socket.socket) -> None:
        stream.setblocking(False)
        self._stream = stream
        self._hub: Any = None
        self._unframer = frames.Unframer()
        self._unsent: deque[memoryview] = deque()
        self._write_fd: int | None = None
        self.has_ended = False
        self.is_closed = False

    def register(self, hub: Any, on_readable: Callable[..., None], *args: Any) -> None:
        """Read and write on this hub from now on; called again after every ``hub.reset()``."""
        self._hub = hub
        if self.is_closed:
            return
        hub.remove_reader(self._stream.fileno())
        hub.add_reader(self._stream.fileno(), on_readable, *args)
        self._close_write_fd()
        self._flush()

    def write(self, message: frames.ToHost) -> None:
        """Send as much as the socket takes, the rest later; to a closed link, nothing."""
        if self.is_closed:
            return
        was_idle = not self._unsent
        self._unsent.append(memoryview(frames.frame(message)))
        if was_idle:
            self._flush()

    def receive(self) -> Iterator[frames.FromHost]:
        """What has come by now."""
        while not self.is_closed:
            try:
                data = self._stream.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.has_ended = True
                return
            for body in self._unframer.feed(data):
                yield frames.from_host.decode(body)

    def close(self) -> None:
        """For good; what was not sent is forgotten."""
        if self.is_closed:
            return
        self.is_closed = True
        if self._hub is not None:
            self._hub.remove_reader(self._stream.fileno())
        self._close_write_fd()
        self._unsent.clear()
        self._stream.close()

    def _flush(self) -> None:
        """Send what the socket takes; the rest waits for the loop to say that it takes more."""
        try:
            while self._unsent:
                sent = self._stream.send(self._unsent[0], socket.MSG_NOSIGNAL)
                if sent == len(self._unsent[0]):
                    self._unsent.popleft()
                else:
                    self._unsent[0] = self._unsent[0][sent:]
        except BlockingIOError:
            self._want_write()
            return
        except OSError:
            self._unsent.clear()  # the host died: the end of file is about to be read
        self._close_write_fd()

    def _want_write(self) -> None:
        # kombu's epoll poller ignores a second registration of one descriptor, so writing gets a duplicate of its own.
        if self._write_fd is None and self._hub is not None:
            self._write_fd = os.dup(self._stream.fileno())
            self._hub.add_writer(self._write_fd, self._flush)

    def _close_write_fd(self) -> None:
        if self._write_fd is not None:
            if self._hub is not None:
                self._hub.remove_writer(self._write_fd)
            os.close(self._write_fd)
            self._write_fd = None
