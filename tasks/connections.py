"""The connections of one process to the farm's Redis, its clock, and what it knows of the workers' pace.

Owns the publisher, the listeners, the watch over callers and one connection for plain commands; what is asked over
them is for ``submitting``, ``following``, ``settling`` and ``live_workers``. Foreign errors become
QueueUnavailableError here.
"""

import os
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any, Final
from uuid import uuid4

import redis

from common.clock import FarmClock
from common.errors import QueueUnavailableError
from common.logs import get_logger
from tasks import live_workers, scripts
from tasks.callers import Callers
from tasks.objects import ObjectStore
from tasks.pace import Paces
from tasks.publisher import Publisher
from tasks.redis_line import connection_options, is_out_of_memory
from tasks.refusals import RETRY_AFTER_S
from tasks.replies import ReplyListener
from tasks.results import ResultWatcher

log = get_logger("tasks")

CLOCK_SYNC_S: Final = 30.0
PACE_READ_S: Final = 0.5


class Connections:
    """What one process asks and tells Redis through; thread-safe, and of no use to a child after a fork.

    Args:
        url: the farm's one logical database.
        queue_limit: messages a queue may hold.
        result_ttl_s: how long asynchronous results are kept.
        clock: the farm's clock; ``tend`` measures it.
        objects: where large bodies and results travel; None: in Redis.
    """

    def __init__(
        self, url: str, *, queue_limit: int, result_ttl_s: int, clock: FarmClock, objects: ObjectStore | None
    ) -> None:
        self.pid = os.getpid()
        self.process = uuid4().hex
        self.clock = clock
        self.result_ttl_s = result_ttl_s
        self.objects = objects
        self.publisher = Publisher(url, queue_limit=queue_limit)
        self.replies = ReplyListener(url, process=self.process)
        self.results = ResultWatcher(url)
        self.paces = Paces()
        self._paces_read_at = 0.0
        self._paces_lock = threading.Lock()
        self._clock_lock = threading.Lock()
        self._clock_failed_at = 0.0
        self._redis = redis.Redis.from_url(url, **connection_options())
        self.callers = Callers(self.ask_many)

    def ask(self, *command: Any) -> Any:
        """One command; QueueUnavailableError if it is not answered."""
        return self.ask_many(command)[0]

    def ask_many(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Several commands in one packet; QueueUnavailableError if they are not answered."""
        pipeline: Any = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        answers: list[Any] = _answered(pipeline.execute)
        return answers

    def script(self, name: str, keys: list[str], arguments: list[Any]) -> Any:
        """Run one of the farm's Lua scripts; QueueUnavailableError if it is not answered."""
        return _answered(lambda: self._redis.eval(scripts.source(name), len(keys), *keys, *arguments))

    def tend(self) -> None:
        """Measure the clock before its first use; that and the pace again in their time, keeping nobody waiting."""
        now, synced_at = monotonic(), self.clock.synced_at
        if synced_at is None:
            self._sync_clock_first()
        elif now - synced_at > CLOCK_SYNC_S:
            self._aside(self._clock_lock, self._sync_clock, "farm-clock")
        if now - self._paces_read_at > PACE_READ_S:
            self._aside(self._paces_lock, self._read_paces, "farm-pace")

    def close(self) -> None:
        """Drop them all; who still waits learns of it."""
        self.callers.close()
        self.publisher.close()
        self.replies.close()
        self.results.close()
        with self._paces_lock, self._clock_lock:  # who asks aside has its answer, or has given up
            self._redis.close()

    def _sync_clock_first(self) -> None:
        """Measure the clock before anything is published; one caller asks, and all that wait share its fate."""
        came_at = monotonic()
        with self._clock_lock:
            if self.clock.synced_at is not None:
                return
            if self._clock_failed_at >= came_at:
                raise QueueUnavailableError("Redis does not answer; try again soon", retry_after_s=RETRY_AFTER_S)
            try:
                self._sync_clock()
            except QueueUnavailableError:
                self._clock_failed_at = monotonic()
                raise

    def _aside(self, lock: threading.Lock, ask: Callable[[], None], name: str) -> None:
        """Ask in a thread of its own, unless one does already; while Redis is away what is known serves."""
        if not lock.acquire(blocking=False):
            return

        def run() -> None:
            try:
                ask()
            except QueueUnavailableError as error:
                log.info("redis_not_asked", by=name, error=error.message)
            finally:
                lock.release()

        try:
            threading.Thread(target=run, name=name, daemon=True).start()
        except RuntimeError:  # no thread can be started
            lock.release()
            raise

    def _read_paces(self) -> None:
        self._paces_read_at = monotonic()
        self.paces.read(live_workers.live_workers(self))

    def _sync_clock(self) -> None:
        asked_at = monotonic()
        answer = self.ask("TIME")
        self.clock.sync(answer, asked_at=asked_at, answered_at=monotonic())


def _answered(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
        raise QueueUnavailableError(
            f"Redis does not answer ({error}); try again soon", retry_after_s=RETRY_AFTER_S
        ) from error
    except redis.ResponseError as error:
        if not is_out_of_memory(error):
            raise
        raise QueueUnavailableError("Redis has no memory left; try again soon", retry_after_s=RETRY_AFTER_S) from error
