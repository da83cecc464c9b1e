"""Submitting a request, and waiting for the outcome of a synchronous one.

``publisher`` admits and publishes, ``replies`` waits; here a call becomes a message and the waiting gets its bounds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Final
from uuid import uuid4

from common.errors import QueueUnavailableError
from tasks import messages, names
from tasks.batching import batch_key
from tasks.bounds import UNBOUNDED, Bounds
from tasks.connections import Connections
from tasks.large import drop_body, put_body, whole
from tasks.messages import INLINE_BODY_BYTES, Outcome, Request, Ticket
from tasks.names import Lane, Operation, queue_name
from tasks.publisher import OPEN_GRACE_S, WAIT_S, Entry
from tasks.refusals import RETRY_AFTER_S
from tasks.replies import Waiter
from tasks.settling import end_overdue_request, overdue_error

REPLY_GRACE_S: Final = 1.0
"""After its deadline a request is given this long to be answered by the worker that holds it."""
LATE_REPLY_S: Final = 0.5
"""A reply that was written while we gave up is given this long to arrive."""


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
    query_id: str | None = None
    images: int = 0
    bounds: Bounds = UNBOUNDED


def submit(connections: Connections, call: Call, *, asynchronous: bool) -> str:
    """Publish a request and return its task id once Redis has confirmed.

    Raises:
        QueueFullError, RateLimitError: refused; nothing was published.
        QueueUnavailableError: no confirmation within 2.5 s.
    """
    return publish(connections, call, asynchronous=asynchronous).task_id


def publish(
    connections: Connections, call: Call, *, asynchronous: bool = True, once: str = "", keep_s: int = 0
) -> Entry:
    """As ``submit``, but returns the entry, which may say that an idempotency key is taken.

    ``once`` is the key as ``publish.lua`` takes it, if there is one; ``keep_s`` as in a ticket.
    """
    waiter = Waiter()
    entry = _entry(connections, str(uuid4()), call, waiter, asynchronous=asynchronous, keep_s=keep_s)
    entry.once = once
    entry.on_published = waiter.confirm
    connections.publisher.put(entry)
    try:
        _await_publish(waiter, entry)
    finally:
        _tidy(connections, entry, waiter)
    return entry


def run(connections: Connections, call: Call, has_left: Callable[[], bool] | None = None) -> Outcome:
    """Submit a request and wait for its outcome, which may carry an error; ``has_left``: as for ``Callers``.

    Raises:
        QueueFullError, RateLimitError, QueueUnavailableError: as ``submit``.
        DeadlineExceededError: nobody answered in time, and now nobody will.
        CancelledError: the caller has gone, and nobody had started its request.
    """
    task_id = str(uuid4())
    started_at = monotonic()
    waiter = connections.replies.register(task_id)
    try:
        entry = _entry(connections, task_id, call, waiter, asynchronous=False)
        connections.publisher.put(entry)
        if has_left is not None:
            connections.callers.watch(entry, waiter, has_left)
        try:
            outcome = _await_reply(connections, entry, waiter, started_at + call.timeout_s + REPLY_GRACE_S)
        finally:
            _tidy(connections, entry, waiter)
    finally:
        connections.callers.forget(task_id)
        connections.replies.forget(task_id)
    return whole(connections, outcome)


def _entry(
    connections: Connections, task_id: str, call: Call, waiter: Waiter, *, asynchronous: bool, keep_s: int = 0
) -> Entry:
    body = messages.encode_body(call.model, call.request)
    is_large = len(body) > INLINE_BODY_BYTES
    body_object = put_body(connections, body, wanted_s=call.timeout_s + 2 * OPEN_GRACE_S) if is_large else None
    ticket = _ticket(
        call,
        now=connections.clock.now(),
        asynchronous=asynchronous,
        body_key=names.body_key(task_id) if is_large and body_object is None else None,
        body_object=body_object,
        keep_s=keep_s,
    )
    queue = queue_name(call.pool, call.machine_profile, call.lane)
    reply_to = None if asynchronous else connections.replies.list
    raw = messages.encode_message(
        task_id, ticket, b"" if is_large else body, queue=queue, reply_to=reply_to, origin=connections.process
    )
    return Entry(
        task_id=task_id,
        queue=queue,
        raw=raw,
        deadline=ticket.deadline,
        on_failure=waiter.fail,
        body=body if ticket.body_key is not None else b"",
        body_object=body_object,
        timeout_s=call.timeout_s,
        record_s=int(call.timeout_s) + OPEN_GRACE_S + (keep_s or connections.result_ttl_s) if asynchronous else None,
        model=call.model,
        operation=call.operation.value,
        tenant=call.tenant,
        tokens=call.tokens,
        bounds=call.bounds,
        pace=connections.paces.text(queue, weight=call.bounds.weight, timeout_s=call.timeout_s),
        request_s=connections.paces.request_s(queue),
    )


def _ticket(
    call: Call, *, now: float, asynchronous: bool, body_key: str | None, body_object: str | None, keep_s: int
) -> Ticket:
    return Ticket(
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
        body_key=body_key,
        trace=call.trace,
        query_id=call.query_id,
        images=call.images,
        keep_s=keep_s,
        body_object=body_object,
    )


def _tidy(connections: Connections, entry: Entry, waiter: Waiter) -> None:
    """Delete a body in the object store that nobody will look for; one that may have been published is swept later."""
    is_refused = waiter.error is not None and not isinstance(waiter.error, QueueUnavailableError)
    if entry.body_object is not None and (entry.taken or is_refused):
        drop_body(connections, entry.body_object)


def _await_publish(waiter: Waiter, entry: Entry) -> None:
    waiter.wait(entry.queued_at + WAIT_S - monotonic())
    if waiter.error is not None:
        raise waiter.error
    if not entry.is_published and not entry.taken:
        raise QueueUnavailableError("the queue did not confirm in time; try again soon", retry_after_s=RETRY_AFTER_S)


def _await_reply(connections: Connections, entry: Entry, waiter: Waiter, until: float) -> Outcome:
    if not waiter.wait(min(until, entry.queued_at + WAIT_S) - monotonic()) and not entry.is_published:
        _await_publish(waiter, entry)
    if not waiter.wait(until - monotonic()):
        if _has_given_up(connections, entry):
            raise overdue_error()
        waiter.wait(LATE_REPLY_S)
    if waiter.error is not None:
        if waiter.is_given_up:
            _has_given_up(connections, entry)
        raise waiter.error
    if waiter.outcome is None:
        raise overdue_error()
    return waiter.outcome


def _has_given_up(connections: Connections, entry: Entry) -> bool:
    """Whether nobody will answer the overdue request any more; false if somebody just has."""
    try:
        slots = names.slots(entry.model, entry.tenant, entry.queue)
        return end_overdue_request(connections, entry.task_id, slots)
    except QueueUnavailableError:
        return True  # nobody can answer while Redis is away, and the caller's time is up
