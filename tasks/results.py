"""Who waits for the end of an asynchronous task, and the one connection per process that hears of it.

The outcome script publishes on the channel named like the result's key. This is a hint only: waiters look at the result
itself, and look again every few seconds, so a hint that was lost with a connection costs time, never a result.
"""

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import sleep
from typing import Any, Final

import redis

from common.errors import QueueUnavailableError
from common.logs import get_logger
from tasks import names
from tasks.redis_line import connection_options
from tasks.refusals import RETRY_AFTER_S

log = get_logger("tasks")

LOOK_AGAIN_S: Final = 5.0
RECONNECT_S: Final = 0.5
QUIET_S: Final = 1.0


class Watch:
    """One caller's place to wait for one task."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._is_closed = False

    def wait(self, timeout_s: float) -> None:
        """Return when the task may have ended, and at the latest after ``timeout_s`` or a few seconds.

        Raises:
            QueueUnavailableError: the watcher was closed: nobody will hear of the end.
        """
        self._event.wait(min(timeout_s, LOOK_AGAIN_S))
        if self._is_closed:
            raise _closed()
        self._event.clear()

    def wake(self) -> None:
        """The task may have ended."""
        self._event.set()

    def close(self) -> None:
        """Nobody will hear of the task's end any more."""
        self._is_closed = True
        self._event.set()


class ResultWatcher:
    """Subscriptions of one process; thread-safe. Thread and connection exist while somebody watches."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._watches: dict[bytes, list[Watch]] = defaultdict(list)
        self._pubsub: Any = None
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @contextmanager
    def watching(self, task_id: str) -> Iterator[Watch]:
        """Be woken when the task ends, for the length of the block.

        Raises:
            QueueUnavailableError: the watcher is closed.
        """
        channel, watch = names.celery_meta(task_id).encode(), Watch()
        with self._lock:
            if self._is_closed:
                raise _closed()
            self._watches[channel].append(watch)
            self._subscribe(channel)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="farm-results", daemon=True)
                self._thread.start()
        try:
            yield watch
        finally:
            with self._lock:
                self._watches[channel].remove(watch)
                if not self._watches[channel]:
                    del self._watches[channel]
                    self._unsubscribe(channel)

    def close(self) -> None:
        """End every watch with an error, and refuse further ones; thread and connection go with the last watcher."""
        with self._lock:
            self._is_closed = True
            for of_task in self._watches.values():
                for watch in of_task:
                    watch.close()

    def _subscribe(self, channel: bytes) -> None:
        if self._pubsub is not None:
            try:
                self._pubsub.subscribe(channel)
            except (redis.RedisError, OSError) as error:
                log.info("subscribe_failed", error=str(error))

    def _unsubscribe(self, channel: bytes) -> None:
        if self._pubsub is not None:
            try:
                self._pubsub.unsubscribe(channel)
            except (redis.RedisError, OSError) as error:
                log.info("unsubscribe_failed", error=str(error))

    def _run(self) -> None:
        is_watched = True
        while is_watched:
            try:
                is_watched = self._listen()
            except (redis.RedisError, OSError) as error:
                log.warning("results_lost_connection", error=str(error))
                self._pubsub = None
                sleep(RECONNECT_S)

    def _listen(self) -> bool:
        """Subscribe to all that is watched and wake watchers, until nobody watches any more; returns false then."""
        client: Any = redis.Redis.from_url(self._url, **connection_options(), client_name="farmhand-results")
        with client.pubsub(ignore_subscribe_messages=False) as pubsub:
            with self._lock:
                if self._is_over():
                    return False
                pubsub.subscribe(*self._watches)
                self._pubsub = pubsub
            while True:
                message = pubsub.get_message(timeout=QUIET_S)
                if message is not None:
                    self._wake(message["channel"])
                with self._lock:
                    if message is None and self._is_over():
                        return False

    def _is_over(self) -> bool:
        """Nobody watches: forget connection and thread. Called with the lock held."""
        if self._watches:
            return False
        self._pubsub = self._thread = None
        return True

    def _wake(self, channel: bytes) -> None:
        """A subscription's own confirmation wakes, too: what was published before it is looked for now."""
        with self._lock:
            watches = list(self._watches.get(channel, ()))
        for watch in watches:
            watch.wake()


def _closed() -> QueueUnavailableError:
    return QueueUnavailableError("this process has dropped its connections; ask again", retry_after_s=RETRY_AFTER_S)
