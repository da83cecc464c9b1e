"""Admission and publishing: callers that arrive while a round trip is under way share the next one and its fate.

One thread (or greenlet) per process owns the write connection and sends everything that waits in one script call. A
caller learns of a failure through its entry; success needs no message of its own, since the reply says as much. A round
that timed out may have been published nevertheless: whoever was told otherwise drops the late reply.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

import redis

from common.errors import FarmError, QueueUnavailableError
from common.faults import fault
from common.logs import get_logger
from tasks import names, scripts
from tasks.bounds import UNBOUNDED, Bounds
from tasks.redis_line import ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S, RedisLine, is_out_of_memory, pack
from tasks.refusals import RETRY_AFTER_S, refusal

log = get_logger("tasks")

WAIT_S: Final = 2.5
"""The longest a caller waits for its publish to be confirmed."""
OPEN_GRACE_S: Final = 60
"""A task stands in ``farm:open`` with a score this much behind its deadline."""
ROUND_MESSAGES: Final = 128
ROUND_BYTES: Final = 8 * 2**20
SLOTS_KEPT_S: Final = 8 * 24 * 3600
"""Longer than any request may take: a set of open tasks that nobody touches for so long is forgotten."""
_LANES: Final = " ".join(names.LANES)
_TAKEN: Final = b"taken "


@dataclass(slots=True, eq=False)
class Entry:
    """One message on its way to Redis.

    ``on_failure`` or ``on_published`` is called in the publisher's thread, once. ``is_published`` is set when Redis has
    confirmed.
    ``timeout_s`` is what is left until the deadline.
    ``record_s`` is how long the task's record is kept; None for a synchronous task, which has none. ``body_object`` is
    the body's name in the object store, if it stands there. ``once`` is what ``publish.lua`` is told of an idempotency
    key; ``taken`` is what it found there, and then nothing was published.
    ``bounds`` and ``pace`` (``tasks.pace``) are what admission holds it to; ``request_s`` tells when to come back.
    """

    task_id: str
    queue: str
    raw: bytes
    deadline: float
    on_failure: Callable[[FarmError], None]
    on_published: Callable[[], None] | None = None
    body: bytes = b""
    timeout_s: float = 0.0
    record_s: int | None = None
    model: str = ""
    operation: str = ""
    tenant: str = ""
    body_object: str | None = None
    tokens: int = 0
    bounds: Bounds = UNBOUNDED
    pace: str = ""
    request_s: float | None = None
    once: str = ""
    taken: str = ""
    queued_at: float = field(default_factory=monotonic)
    is_published: bool = False


class Publisher:
    """Publishes entries in rounds; thread-safe. The thread starts with the first entry, after any fork.

    Args:
        url: Redis URL.
        queue_limit: messages a queue may hold.
    """

    def __init__(self, url: str, *, queue_limit: int) -> None:
        self._line = RedisLine(url, name="farmhand-publisher", script_names=("publish",))
        self._queue_limit = queue_limit
        self._waiting: deque[Entry] = deque()
        self._wake = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def put(self, entry: Entry) -> None:
        """Publish soon; the outcome of that comes through the entry."""
        self._waiting.append(entry)
        if self._thread is None:
            self._start()
        self._wake.set()

    def close(self) -> None:
        """End the thread; entries still waiting fail."""
        self._is_closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=WAIT_S)

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="farm-publisher", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while not self._is_closed:
            self._wake.wait()
            self._wake.clear()
            while self._waiting and not self._is_closed:
                self._serve(self._take())
        _fail(self._waiting, QueueUnavailableError("this process is shutting down", retry_after_s=RETRY_AFTER_S))
        self._line.close()

    def _take(self) -> list[Entry]:
        """What the next round carries: all that waits, up to its bounds."""
        entries: list[Entry] = []
        size = 0
        while self._waiting and len(entries) < ROUND_MESSAGES and size < ROUND_BYTES:
            entry = self._waiting.popleft()
            size += len(entry.raw) + len(entry.body)
            entries.append(entry)
        return entries

    def _serve(self, entries: list[Entry]) -> None:
        entries = self._in_time(entries)
        if not entries:
            return
        fault("web.before_publish")
        try:
            answers = self._round(entries)
            fault("web.published")
        except (redis.RedisError, OSError) as error:
            log.warning("publish_failed", error=str(error), requests=len(entries))
            _fail(entries, _unavailable(error))
            return
        except Exception as error:
            log.exception("publish_broken", requests=len(entries))
            _fail(entries, FarmError(f"the request could not be published: {error}"))
            return
        for entry, answer in zip(entries, answers, strict=True):
            if answer != b"ok" and not answer.startswith(_TAKEN):
                entry.on_failure(_refused(entry, answer))
                continue
            entry.taken = answer.removeprefix(_TAKEN).decode() if answer != b"ok" else ""
            entry.is_published = not entry.taken
            if entry.on_published is not None:
                entry.on_published()

    def _in_time(self, entries: list[Entry]) -> list[Entry]:
        """Fail at once those that waited so long that another round could exceed what callers are promised."""
        round_s = ANSWER_TIMEOUT_S + (0.0 if self._line.is_connected else CONNECT_TIMEOUT_S)
        latest = monotonic() - (WAIT_S - round_s)
        late = [entry for entry in entries if entry.queued_at < latest]
        if not late:
            return entries
        _fail(late, _unavailable(TimeoutError("the round trips before took too long")))
        return [entry for entry in entries if entry.queued_at >= latest]

    def _round(self, entries: list[Entry]) -> Sequence[Any]:
        bodies = [
            pack("SET", names.body_key(entry.task_id), entry.body, "EX", _body_s(entry))
            for entry in entries
            if entry.body
        ]
        call = self._pack_call(entries)
        reply = self._line.exchange(b"".join([*bodies, call]), len(bodies) + 1)[-1]
        if isinstance(reply, redis.exceptions.NoScriptError):
            self._line.close()  # somebody flushed the scripts: nothing has run, and connecting loads them again
            reply = self._line.exchange(b"".join([*bodies, call]), len(bodies) + 1)[-1]
        if isinstance(reply, redis.ResponseError) and is_out_of_memory(reply):
            return [b"memory"] * len(entries)
        if isinstance(reply, redis.ResponseError):
            raise reply
        answers: Sequence[Any] = reply
        return answers

    def _pack_call(self, entries: list[Entry]) -> bytes:
        keys, arguments = publish_call(entries, queue_limit=self._queue_limit)
        return pack("EVALSHA", scripts.sha("publish"), len(keys), *keys, *arguments)


def publish_call(entries: Iterable[Entry], *, queue_limit: int) -> tuple[list[str], list[Any]]:
    """Keys and arguments of ``publish.lua``."""
    keys = [names.OPEN]
    arguments: list[Any] = [
        queue_limit,
        names.bell(""),
        names.OPEN_BY_TENANT,
        names.OPEN_BY_QUEUE,
        names.TENANT_CLOCKS,
        _LANES,
        SLOTS_KEPT_S,
    ]
    for entry in entries:
        keys += (entry.queue, *names.slots(entry.model, entry.tenant, entry.queue))
        arguments += (
            entry.task_id,
            entry.deadline + OPEN_GRACE_S,
            entry.raw,
            names.body_key(entry.task_id) if entry.body else "",
            "" if entry.record_s is None else names.task_record(entry.task_id),
            entry.record_s or 0,
            entry.model,
            entry.operation,
            entry.deadline,
            entry.tenant,
            entry.bounds.text(entry.tokens),
            entry.pace,
            entry.once,
        )
    return keys, arguments


def _body_s(entry: Entry) -> int:
    """How long a body is kept: a little over the longest it may wait."""
    return max(1, int(entry.timeout_s)) + 2 * OPEN_GRACE_S


def _unavailable(error: Exception) -> QueueUnavailableError:
    reason = str(error) or type(error).__name__
    return QueueUnavailableError(f"the queue does not answer ({reason}); try again soon", retry_after_s=RETRY_AFTER_S)


def _refused(entry: Entry, answer: bytes) -> FarmError:
    return refusal(
        answer.decode(),
        queue=entry.queue,
        model=entry.model,
        tenant=entry.tenant,
        bounds=entry.bounds,
        timeout_s=entry.timeout_s,
        request_s=entry.request_s,
    )


def _fail(entries: Iterable[Entry], error: FarmError) -> None:
    for entry in entries:
        entry.on_failure(error)
