"""The one door through which a process submits requests and awaits their outcomes: web, CLI and tests use it.

Owns when connections are made and dropped, and nothing else: what is asked over them stands in ``submitting``,
``following``, ``live_workers``, ``web_processes`` and ``demand``.
"""

import os
import threading
from collections.abc import Callable, Collection, Iterable
from typing import Final

from common.clock import FarmClock
from common.errors import QueueUnavailableError
from tasks import demand, following, names, once, submitting, web_processes
from tasks.connections import Connections
from tasks.demand import Demand, Wait
from tasks.live_workers import WorkerView, live_workers, open_requests, queue_lengths
from tasks.messages import Outcome
from tasks.objects import ObjectStore
from tasks.once import Once, Submitted
from tasks.records import DEFAULT_TENANT, TaskView
from tasks.submitting import Call
from tasks.web_processes import WebView

SHUTDOWN_S: Final = 5.0
"""When a farm that shuts down may be back, or another one have taken its place."""


class FarmClient:
    """One per process, for threads or greenlets; connects with its first use, so after any fork.

    Args:
        redis_url: the farm's one logical database.
        queue_limit: messages a queue may hold before QueueFullError.
        result_ttl_s: how long asynchronous results are kept.
        clock: the farm's clock; measured here, at first use and every 30 s.
        objects: where large bodies and results travel; None: in Redis.

    ``requests`` counts those that were submitted, or asked for under a key that had been used.
    """

    def __init__(
        self,
        redis_url: str,
        *,
        queue_limit: int,
        result_ttl_s: int,
        clock: FarmClock | None = None,
        objects: ObjectStore | None = None,
    ) -> None:
        self.clock = clock or FarmClock()
        self._objects = objects
        self.requests = 0
        self._url = redis_url
        self._queue_limit = queue_limit
        self._result_ttl_s = result_ttl_s
        self._lock = threading.Lock()
        self._connections: Connections | None = None

    def submit(self, call: Call, *, asynchronous: bool = True) -> str:
        """Publish a request and return its task id once Redis has confirmed.

        Raises:
            QueueFullError, RateLimitError: refused; nothing was published.
            QueueUnavailableError: no confirmation within 2.5 s.
        """
        self.requests += 1
        return submitting.submit(self._ready(), call, asynchronous=asynchronous)

    def run(self, call: Call, *, has_left: Callable[[], bool] | None = None) -> Outcome:
        """Submit a request and wait for its outcome, which may carry an error; ``has_left``: as for ``Callers``.

        Raises:
            QueueFullError, RateLimitError, QueueUnavailableError: as ``submit``.
            DeadlineExceededError: nobody answered in time, and now nobody will.
            CancelledError: the caller has gone, and nobody had started its request.
        """
        self.requests += 1
        return submitting.run(self._ready(), call, has_left)

    def submit_once(self, call: Call, use: Once) -> Submitted:
        """As ``submit``, under an idempotency key.

        Raises:
            IdempotencyError: the key was used for another request.
        """
        self.requests += 1
        return once.submit_once(self._ready(), call, use)

    def run_once(self, call: Call, use: Once) -> tuple[Outcome, bool]:
        """As ``run``, under an idempotency key; also returns whether the outcome is an earlier request's.

        Raises:
            IdempotencyError: the key was used for another request.
        """
        self.requests += 1
        return once.run_once(self._ready(), call, use)

    def find_once(self, use: Once, *, tenant: str) -> str | None:
        """The task that stands under an idempotency key; None if there is none.

        Raises:
            IdempotencyError: the key was used for another request.
            QueueUnavailableError: Redis does not answer.
        """
        task_id = once.find(self._ready(), use, tenant=tenant)
        self.requests += task_id is not None
        return task_id

    def await_once(self, task_id: str, *, tenant: str, timeout_s: float) -> Outcome:
        """The outcome of a task that ``find_once`` has found.

        Raises:
            DeadlineExceededError: this caller's time is up, while the task goes on.
            TaskNotFoundError: it has been forgotten just now.
        """
        return once.await_outcome(self._ready(), task_id, tenant=tenant, timeout_s=timeout_s)

    def task(self, task_id: str, *, tenant: str = DEFAULT_TENANT, wait_s: float = 0.0) -> TaskView:
        """What has become of an asynchronous task; waits up to ``wait_s`` for it to end.

        Raises:
            TaskNotFoundError: never submitted by this tenant, or its result has expired.
            QueueUnavailableError: Redis does not answer, or ``close`` was called meanwhile.
        """
        return following.follow(self._ready(), task_id, tenant=tenant, wait_s=wait_s)

    def cancel(self, task_id: str, *, tenant: str = DEFAULT_TENANT) -> TaskView:
        """Cancel an asynchronous task; one that has ended stays as it is.

        Raises:
            TaskNotFoundError: never submitted, or its result has expired.
        """
        return following.cancel(self._ready(), task_id, tenant=tenant)

    def workers(self) -> list[WorkerView]:
        """The workers whose heartbeat is there; QueueUnavailableError if Redis does not answer."""
        return live_workers(self._ready())

    def note_pool(self, name: str, machine_profiles: Iterable[str]) -> None:
        """Have the queues of a pool looked after when it is no more; QueueUnavailableError if Redis does not answer."""
        connections = self._ready()
        queues = [names.pool_queue(name, profile) for profile in machine_profiles]
        scored = [part for queue in queues for part in (self.clock.now(), queue)]
        connections.ask("ZADD", names.POOL_QUEUES, *scored)

    def queue_lengths(self, queues: Collection[str]) -> dict[str, int]:
        """Messages that wait in each of these; QueueUnavailableError if Redis does not answer."""
        return queue_lengths(self._ready(), queues)

    def open_requests(self, models: Collection[str]) -> dict[str, int]:
        """Requests of each model, its profiles' included, without an outcome; QueueUnavailableError as above."""
        return open_requests(self._ready(), models)

    def record_demand(self, *, pool: str, machine_profile: str, model: str, default_start_s: float) -> Wait:
        """Count a request that found no worker at this place; ``tasks.demand.record``.

        Raises:
            QueueUnavailableError: Redis does not answer.
        """
        return demand.record(
            self._ready(), pool=pool, machine_profile=machine_profile, model=model, default_start_s=default_start_s
        )

    def demands(self) -> list[Demand]:
        """What is asked for where no worker lives; QueueUnavailableError if Redis does not answer."""
        return demand.demands(self._ready())

    def tell(self, *, machine_profile: str, epoch: int, epoch_id: str, requests_per_s: float = 0.0) -> None:
        """Say which config this web process serves, and how much; QueueUnavailableError if Redis does not answer."""
        web_processes.tell(
            self._ready(),
            machine_profile=machine_profile,
            epoch=epoch,
            epoch_id=epoch_id,
            requests_per_s=requests_per_s,
        )

    def web_processes(self) -> list[WebView]:
        """The web processes that live; QueueUnavailableError if Redis does not answer."""
        return web_processes.live_web_processes(self._ready())

    @property
    def waiting(self) -> int:
        """Callers of ``run`` that wait now."""
        return self._connections.replies.waiting if self._connections is not None else 0

    @property
    def dropped(self) -> int:
        """Replies that came when nobody waited any more."""
        return self._connections.replies.dropped if self._connections is not None else 0

    def give_up(self) -> None:
        """The process ends: callers of ``run`` get QueueUnavailableError, and their requests are taken back."""
        if self._connections is not None:
            ends = QueueUnavailableError("this farm is shutting down; try again", retry_after_s=SHUTDOWN_S)
            self._connections.replies.give_up(ends)

    def close(self) -> None:
        """Drop all connections. The client may be used again and connects anew."""
        with self._lock:
            connections, self._connections = self._connections, None
        if connections is not None and connections.pid == os.getpid():
            connections.close()

    def _ready(self) -> Connections:
        """This process's connections, with a clock no older than 30 s, and what the workers told a second ago."""
        connections = self._connections
        if connections is None or connections.pid != os.getpid():
            connections = self._open()
        connections.tend()
        return connections

    def _open(self) -> Connections:
        with self._lock:
            if self._connections is None or self._connections.pid != os.getpid():
                self._connections = Connections(
                    self._url,
                    queue_limit=self._queue_limit,
                    result_ttl_s=self._result_ttl_s,
                    clock=self.clock,
                    objects=self._objects,
                )
            return self._connections
