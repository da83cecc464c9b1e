"""What a host sends: frames from any of its threads, in order, none of which waits for the worker to read them."""

import os
import socket
from queue import SimpleQueue
from threading import Lock, Thread

from workers.host import frames


class Outbox:
    """Sends frames from any thread, in order; what the socket does not take at once is left to a thread of its own.

    So the compute thread goes on with the next micro-batch while the worker is busy elsewhere.
    """

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._lock = Lock()
        self._left: SimpleQueue[memoryview] = SimpleQueue()
        self._queued = 0
        self._has_sender = False

    def send(self, message: frames.FromHost) -> None:
        """Send now what can be sent; ConnectionError when the worker has gone."""
        data = memoryview(frames.frame(message))
        with self._lock:
            if not self._queued:
                data = data[self._send_some(data) :]
            if not len(data):
                return
            self._queued += 1
            self._left.put(data)
            if not self._has_sender:
                self._has_sender = True
                Thread(target=self._send_left, name="sender", daemon=True).start()

    def _send_some(self, data: memoryview) -> int:
        try:
            return self._link.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0

    def _send_left(self) -> None:
        try:
            while True:
                self._link.sendall(self._left.get(), socket.MSG_NOSIGNAL)
                with self._lock:
                    self._queued -= 1
        except OSError:
            os._exit(0)
