"""How a process submits requests to the farm and awaits their outcomes. The only door: web, CLI and tests use it.

Owns nothing but its connections. ``publisher`` admits and publishes, ``replies`` waits for synchronous outcomes,
``results`` tells when asynchronous ones are there; here they become submit, run, task and cancel.
"""

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Final
from uuid import uuid4

import msgspec
import redis

from common.clock import FarmClock
from common.errors import (
    CancelledError,
    DeadlineExceededError,
    FarmError,
    MessageError,
    QueueUnavailableError,
    TaskNotFoundError,
)
from common.logs import get_logger
from tasks import messages, names, scripts
from tasks.batching import batch_key
from tasks.messages import INLINE_BODY_BYTES, Outcome, Request, Ticket
from tasks.names import Lane, Operation, queue_name
from tasks.publisher import OPEN_GRACE_S, RETRY_AFTER_S, WAIT_S, Entry, Publisher
from tasks.redis_line import connection_options, is_out_of_memory
from tasks.replies import ReplyListener, Waiter
from tasks.results import ResultWatcher

log = get_logger("tasks")

CLOCK_SYNC_S: Final = 30.0
REPLY_GRACE_S: Final = 1.0
"""After its deadline a request is given this long to be answered by the worker that holds it."""
LATE_REPLY_S: Final = 0.5
"""A reply that was written while we gave up is given this long to arrive."""
OVERDUE_GRACE_S: Final = 5.0
"""A task this much past its deadline is settled by whoever asks for it."""
CANCELLED_S: Final = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request as its caller means it. ``spec`` is the digest of the model's spec; ``tokens`` is an estimate."""

    model: str
    spec: str
    operation: Operation
    request: Request
    items: int
    tokens: int
    lane: Lane
    pool: str
    machine_profile: str
    timeout_s: float
    epoch: int = 0
    tenant: str = "default"
    adapter: str | None = None
    trace: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskView:
    """What is known of an asynchronous task. ``state``: queued, running, succeeded, failed or cancelled."""

    task_id: str
    state: str
    model: str
    operation: Operation
    submitted: float
    deadline: float
    outcome: Outcome | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """What a live worker tells of itself. ``resident`` holds digests of the specs that some host of it holds."""

    incarnation: str
    node: str
    queues: frozenset[str]
    resident: frozenset[str]
    transport: str
    is_ready: bool


class FarmClient:
    """One per process, for threads or greenlets; connects with its first use, so after any fork.

    Args:
        redis_url: the farm's one logical database.
        queue_limit: messages a queue may hold before QueueFullError.
        result_ttl_s: how long asynchronous results are kept.
        clock: the farm's clock; measured here, at first use and every 30 s.
    """

    def __init__(self, redis_url: str, *, queue_limit: int, result_ttl_s: int, clock: FarmClock | None = None) -> None:
        self.clock = clock or FarmClock()
        self._url = redis_url
        self._queue_limit = queue_limit
        self._result_ttl_s = result_ttl_s
        self._lock = threading.Lock()
        self._links: _Links | None = None

    def submit(self, call: Call, *, asynchronous: bool = True) -> str:
        """Publish a request and return its task id once Redis has confirmed.

        Raises:
            QueueFullError: refused; nothing was published.
            QueueUnavailableError: no confirmation within 2.5 s.
        """
        links = self._ready()
        task_id = str(uuid4())
        waiter = Waiter()
        entry = self._entry(links, task_id, call, waiter, asynchronous=asynchronous)
        entry.on_published = waiter.confirm
        links.publisher.put(entry)
        self._await_publish(waiter, entry)
        return task_id

    def run(self, call: Call) -> Outcome:
        """Submit a request and wait for its outcome, which may carry an error.

        Raises:
            QueueFullError, QueueUnavailableError: as ``submit``.
            DeadlineExceededError: nobody answered in time, and now nobody will.
        """
        links = self._ready()
        task_id = str(uuid4())
        started_at = monotonic()
        waiter = links.replies.register(task_id)
        try:
            entry = self._entry(links, task_id, call, waiter, asynchronous=False)
            links.publisher.put(entry)
            outcome = self._await_reply(links, task_id, entry, waiter, started_at + call.timeout_s + REPLY_GRACE_S)
        finally:
            links.replies.forget(task_id)
        return self._whole(links, outcome)

    def task(self, task_id: str, *, wait_s: float = 0.0) -> TaskView:
        """What has become of an asynchronous task; waits up to ``wait_s`` for it to end.

        Raises:
            TaskNotFoundError: never submitted, or its result has expired.
        """
        links = self._ready()
        view = self._look(links, task_id)
        if view.outcome is not None or wait_s <= 0:
            return view
        until = monotonic() + wait_s
        with links.results.watching(task_id) as watch:
            while (view := self._look(links, task_id)).outcome is None:
                left_s = until - monotonic()
                if left_s <= 0:
                    break
                watch.wait(min(left_s, max(0.1, view.deadline + OVERDUE_GRACE_S - self.clock.now())))
        return view

    def cancel(self, task_id: str) -> TaskView:
        """Cancel an asynchronous task; one that has ended stays as it is.

        Raises:
            TaskNotFoundError: never submitted, or its result has expired.
        """
        links = self._ready()
        view = self._look(links, task_id)
        if view.outcome is None:
            self._settle(links, view, CancelledError("the task was cancelled by its caller"))
            view = self._look(links, task_id)
        return view

    def workers(self) -> list[WorkerView]:
        """The workers whose heartbeat is there; QueueUnavailableError if Redis does not answer."""
        links = self._ready()
        told: dict[bytes, bytes] = links.ask("HGETALL", names.INCARNATIONS)
        views = [
            view for incarnation, text in told.items() if (view := _worker(incarnation.decode(), text)) is not None
        ]
        beats = links.ask_many(*(("EXISTS", names.beat(view.incarnation)) for view in views)) if views else []
        return [view for view, beat in zip(views, beats, strict=True) if beat]

    @property
    def waiting(self) -> int:
        """Callers of ``run`` that wait now."""
        return self._links.replies.waiting if self._links is not None else 0

    @property
    def dropped(self) -> int:
        """Replies that came when nobody waited any more."""
        return self._links.replies.dropped if self._links is not None else 0

    def close(self) -> None:
        """Drop all connections. The client may be used again and connects anew."""
        with self._lock:
            links, self._links = self._links, None
        if links is not None and links.pid == os.getpid():
            links.close()

    # -- submitting and waiting ---------------------------------------------------------------------------------

    def _ready(self) -> "_Links":
        """This process's connections, and a clock no older than 30 s."""
        links = self._links
        if links is None or links.pid != os.getpid():
            links = self._open()
        synced_at = self.clock.synced_at
        if synced_at is None:
            links.sync_clock_first(self.clock)
        elif monotonic() - synced_at > CLOCK_SYNC_S:
            links.sync_clock_aside(self.clock)
        return links

    def _open(self) -> "_Links":
        with self._lock:
            if self._links is None or self._links.pid != os.getpid():
                self._links = _Links(self._url, queue_limit=self._queue_limit)
            return self._links

    def _entry(self, links: "_Links", task_id: str, call: Call, waiter: Waiter, *, asynchronous: bool) -> Entry:
        body = messages.encode_body(call.model, call.request)
        is_large = len(body) > INLINE_BODY_BYTES
        now = self.clock.now()
        ticket = Ticket(
            model=call.model,
            spec=call.spec,
            operation=call.operation,
            key=batch_key(call.model, call.spec, call.operation, call.adapter, call.request.options),
            items=call.items,
            tokens=call.tokens,
            deadline=now + call.timeout_s,
            published=now,
            epoch=call.epoch,
            tenant=call.tenant,
            asynchronous=asynchronous,
            adapter=call.adapter,
            body_key=names.body_key(task_id) if is_large else None,
            trace=call.trace,
        )
        queue = queue_name(call.pool, call.machine_profile, call.lane)
        reply_to = None if asynchronous else links.replies.list
        raw = messages.encode_message(
            task_id, ticket, b"" if is_large else body, queue=queue, reply_to=reply_to, origin=links.process
        )
        return Entry(
            task_id=task_id,
            queue=queue,
            raw=raw,
            deadline=ticket.deadline,
            on_failure=waiter.fail,
            body=body if is_large else b"",
            timeout_s=call.timeout_s,
            record_s=int(call.timeout_s) + OPEN_GRACE_S + self._result_ttl_s if asynchronous else None,
            model=call.model,
            operation=call.operation.value,
        )

    def _await_publish(self, waiter: Waiter, entry: Entry) -> None:
        waiter.wait(entry.queued_at + WAIT_S - monotonic())
        if waiter.error is not None:
            raise waiter.error
        if not entry.is_published:
            raise QueueUnavailableError(
                "the queue did not confirm in time; try again soon", retry_after_s=RETRY_AFTER_S
            )

    def _await_reply(self, links: "_Links", task_id: str, entry: Entry, waiter: Waiter, until: float) -> Outcome:
        if not waiter.wait(min(until, entry.queued_at + WAIT_S) - monotonic()) and not entry.is_published:
            self._await_publish(waiter, entry)
        if not waiter.wait(until - monotonic()):
            if self._close_overdue(links, task_id):
                raise DeadlineExceededError("the deadline passed before the request was served")
            waiter.wait(LATE_REPLY_S)
        if waiter.error is not None:
            raise waiter.error
        if waiter.outcome is None:
            raise DeadlineExceededError("the deadline passed before the request was served")
        return waiter.outcome

    def _close_overdue(self, links: "_Links", task_id: str) -> bool:
        """Take the right to answer back from a worker that has not used it; false if it has."""
        try:
            return links.settle(task_id, state="failed", result=b"", result_s=self._result_ttl_s)
        except QueueUnavailableError:
            return True  # nobody can answer while Redis is away, and the caller's time is up

    def _whole(self, links: "_Links", outcome: Outcome) -> Outcome:
        """The outcome itself where only its key travelled."""
        if outcome.ref is None:
            return outcome
        raw = links.ask("GETDEL", outcome.ref)
        if raw is None:
            raise FarmError("the result has gone from Redis before it could be read")
        return messages.decode_outcome(raw)

    # -- asynchronous tasks -------------------------------------------------------------------------------------

    def _look(self, links: "_Links", task_id: str) -> TaskView:
        record, meta = links.ask_many(("HGETALL", names.task_record(task_id)), ("GET", names.celery_meta(task_id)))
        if not record:
            raise TaskNotFoundError(f"no task {task_id!r}: never submitted, or its result has expired", param="task_id")
        view = _view(task_id, record, meta)
        if view.outcome is None and view.state not in ("queued", "running"):
            raise TaskNotFoundError(f"the result of task {task_id!r} has expired", param="task_id")
        if view.outcome is None and self.clock.now() > view.deadline + OVERDUE_GRACE_S:
            overdue = DeadlineExceededError("the deadline passed before the request was served")
            return self._settle(links, view, overdue) or self._look(links, task_id)
        return view

    def _settle(self, links: "_Links", view: TaskView, error: FarmError) -> TaskView | None:
        """Give an open task its outcome; None if somebody else has."""
        outcome = messages.failed(view.task_id, error, model=view.model)
        result = messages.encode_celery_meta(outcome, view.operation, done_at=datetime.now(UTC).isoformat())
        if not links.settle(view.task_id, state=outcome.state, result=result, result_s=self._result_ttl_s):
            return None
        return _with_outcome(view, outcome)


class _Links:
    """The connections of one process."""

    def __init__(self, url: str, *, queue_limit: int) -> None:
        self.pid = os.getpid()
        self.process = uuid4().hex
        self._clock_lock = threading.Lock()
        self._clock_failed_at = 0.0
        self.publisher = Publisher(url, queue_limit=queue_limit)
        self.replies = ReplyListener(url, process=self.process)
        self.results = ResultWatcher(url)
        self._redis = redis.Redis.from_url(url, **connection_options())

    def ask(self, *command: Any) -> Any:
        """One command; QueueUnavailableError if it is not answered."""
        return self.ask_many(command)[0]

    def ask_many(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Several commands in one packet; QueueUnavailableError if they are not answered."""
        pipeline: Any = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        answers: list[Any] = self._answered(pipeline.execute)
        return answers

    def sync_clock_first(self, clock: FarmClock) -> None:
        """Measure the clock before anything is published; one caller asks, and all that wait share its fate."""
        came_at = monotonic()
        with self._clock_lock:
            if clock.synced_at is not None:
                return
            if self._clock_failed_at >= came_at:
                raise QueueUnavailableError("Redis does not answer; try again soon", retry_after_s=RETRY_AFTER_S)
            try:
                self._sync_clock(clock)
            except QueueUnavailableError:
                self._clock_failed_at = monotonic()
                raise

    def sync_clock_aside(self, clock: FarmClock) -> None:
        """Measure the clock again without keeping anybody waiting; while Redis is away the old offset serves."""
        if not self._clock_lock.acquire(blocking=False):
            return

        def sync() -> None:
            try:
                self._sync_clock(clock)
            except QueueUnavailableError as error:
                log.info("clock_not_synced", error=error.message)
            finally:
                self._clock_lock.release()

        threading.Thread(target=sync, name="farm-clock", daemon=True).start()

    def _sync_clock(self, clock: FarmClock) -> None:
        asked_at = monotonic()
        answer = self.ask("TIME")
        clock.sync(answer, asked_at=asked_at, answered_at=monotonic())

    def settle(self, task_id: str, *, state: str, result: bytes, result_s: int) -> bool:
        """Close an open task; false if somebody else has closed it. ``result`` is empty if nobody will read one."""
        keys = [
            names.OPEN,
            names.CANCELLED,
            names.task_record(task_id),
            names.celery_meta(task_id),
            names.body_key(task_id),
        ]
        arguments: list[Any] = [task_id, state, result, result_s, CANCELLED_S]
        answer: int = self._answered(lambda: self._redis.eval(scripts.source("settle"), len(keys), *keys, *arguments))
        return answer == 1

    def close(self) -> None:
        self.publisher.close()
        self.replies.close()
        self.results.close()
        self._redis.close()

    def _answered(self, ask: Any) -> Any:
        try:
            return ask()
        except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
            raise QueueUnavailableError(
                f"Redis does not answer ({error}); try again soon", retry_after_s=RETRY_AFTER_S
            ) from error
        except redis.ResponseError as error:
            if not is_out_of_memory(error):
                raise
            raise QueueUnavailableError(
                "Redis has no memory left; try again soon", retry_after_s=RETRY_AFTER_S
            ) from error


def _view(task_id: str, record: Mapping[bytes, bytes], meta: bytes | None) -> TaskView:
    """The task's record and result as one view; MessageError if the record is not one of ours."""
    try:
        view = TaskView(
            task_id=task_id,
            state=record[b"state"].decode(),
            model=record[b"model"].decode(),
            operation=Operation(record[b"operation"].decode()),
            submitted=float(record[b"submitted"]),
            deadline=float(record[b"deadline"]),
        )
    except (KeyError, ValueError) as error:
        raise MessageError(f"the record of task {task_id!r} is damaged: {error}") from error
    return view if meta is None else _with_outcome(view, messages.decode_celery_meta(meta))


def _with_outcome(view: TaskView, outcome: Outcome) -> TaskView:
    return replace(view, state=outcome.state, outcome=outcome)


def _worker(incarnation: str, text: bytes) -> WorkerView | None:
    """A worker's description; None for one that cannot be read, as a newer release's may be."""
    try:
        told = msgspec.json.decode(text, type=_Told)
    except msgspec.DecodeError:
        return None
    return WorkerView(
        incarnation=incarnation,
        node=told.node,
        queues=told.queues,
        resident=told.resident,
        transport=told.transport,
        is_ready=told.ready,
    )


class _Told(msgspec.Struct):
    node: str = ""
    queues: frozenset[str] = frozenset()
    resident: frozenset[str] = frozenset()
    transport: str = "farm"
    ready: bool = False
