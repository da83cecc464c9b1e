"""Requests under an idempotency key: however often one is sent within a day, it is computed once.

Such a request is a task with a record and a stored result, also when its caller waits. The key is taken by the script
that publishes the task (``publish.lua``), in the same step: a refused request takes none, and a key that is taken names
a task that was published. States of a key:

  free      nothing was published under it, or that is forgotten, or it ended in a way that a later try may mend
  taken     whoever comes with the same request waits for the same task; with another one it is refused
  answered  the task has ended for good; its outcome is given to whoever comes, for a day

Whoever comes with the same request is given what stands before anything is asked of the model: what was admitted once
is not admitted again, and a model that has changed, moved or gone since takes no outcome back. So it is with a tenant
that may not use the model any more: the outcome was computed for it, and is its own, as that of a task under its id.
Who asks, and for which tenant, the door has seen to before; whatever is to be computed anew passes all checks of today.

A task ends for good when it succeeds and when another try would fail as well. Everything else (no capacity, a deadline
that passed, cancelled, a model that could not be loaded) leaves the key to whoever comes next.

What dies and what happens here:
  the web process     before the publish, and the key is free; after it, and the task runs and is found by the key
  a worker            the task is computed again, as any
  Redis               before it has confirmed, and the next try finds out whether the key was taken
"""

from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from common.errors import (
    CancelledError,
    CapacityError,
    DeadlineExceededError,
    IdempotencyError,
    MessageError,
    ModelLoadError,
    QueueUnavailableError,
    TaskNotFoundError,
    error_from_dict,
)
from tasks import following, names
from tasks.connections import Connections
from tasks.messages import Outcome
from tasks.refusals import RETRY_AFTER_S
from tasks.submitting import Call, publish

KEPT_S: Final = 24 * 3600
TRIES: Final = 5
"""How often a key is taken anew; more often only if as many others take and lose it meanwhile."""
PASSING: Final = (CapacityError, DeadlineExceededError, CancelledError, ModelLoadError, MessageError)
"""What a later try may mend."""


@dataclass(frozen=True, slots=True)
class Once:
    """One use of a key: ``name`` is its place in Redis, ``fingerprint`` tells whether requests are the same."""

    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Submitted:
    """The task under a key; ``is_replayed``: an earlier request's."""

    task_id: str
    is_replayed: bool


def once(tenant: str, key: str, request: bytes) -> Once:
    """The use of a tenant's key for a request; ``request`` is all that must not differ."""
    return Once(names.once_key(tenant, sha256(key.encode()).hexdigest()), sha256(request).hexdigest())


def submit_once(connections: Connections, call: Call, use: Once) -> Submitted:
    """Publish a request unless that has been done; the id of its task.

    Raises:
        IdempotencyError: the key was used for another request.
        QueueFullError, QueueUnavailableError: as ``submitting.submit``; the key is as it was.
    """
    replaced = ""
    for _ in range(TRIES):
        sent = publish(connections, call, once=f"{use.name} {use.fingerprint} {replaced}", keep_s=KEPT_S)
        if not sent.taken:
            return Submitted(sent.task_id, is_replayed=False)
        task_id = _task_of(sent.taken, use)
        if _stands(connections, task_id, call.tenant):
            return Submitted(task_id, is_replayed=True)
        replaced = sent.taken
    raise QueueUnavailableError(
        "too many requests fail under this idempotency key at once; try again soon", retry_after_s=RETRY_AFTER_S
    )


def run_once(connections: Connections, call: Call, use: Once) -> tuple[Outcome, bool]:
    """As ``submit_once``, and wait for the outcome; also returns whether it is an earlier request's.

    Raises:
        DeadlineExceededError: this caller's time is up, while the first one's task goes on.
    """
    submitted = submit_once(connections, call, use)
    outcome = await_outcome(connections, submitted.task_id, tenant=call.tenant, timeout_s=call.timeout_s)
    return outcome, submitted.is_replayed


def find(connections: Connections, use: Once, *, tenant: str) -> str | None:
    """The task that an earlier request has left under the key and that stands; None if there is none.

    Raises:
        IdempotencyError: the key was used for another request.
    """
    taken = connections.ask("GET", use.name)
    if taken is None:
        return None
    task_id = _task_of(taken.decode(), use)
    return task_id if _stands(connections, task_id, tenant) else None


def await_outcome(connections: Connections, task_id: str, *, tenant: str, timeout_s: float) -> Outcome:
    """The outcome of a task under a key.

    Raises:
        DeadlineExceededError: this caller's time is up, while the task goes on.
    """
    wait_s = timeout_s + following.OVERDUE_GRACE_S + 1  # whoever waits settles what is overdue
    view = following.follow(connections, task_id, tenant=tenant, wait_s=wait_s)
    if view.outcome is None:
        raise DeadlineExceededError("the request goes on under its idempotency key: ask again with the same one")
    return view.outcome


def _task_of(taken: str, use: Once) -> str:
    """The task that a key names, by what stands there; IdempotencyError if that is another request's."""
    fingerprint, _, task_id = taken.partition(":")
    if fingerprint != use.fingerprint:
        raise IdempotencyError(
            "the idempotency key was used for another request: take a new one", param="Idempotency-Key"
        )
    return task_id


def _stands(connections: Connections, task_id: str, tenant: str) -> bool:
    """Whether a task is under way or has ended for good."""
    try:
        view = following.look(connections, task_id, tenant=tenant)
    except TaskNotFoundError:
        return False
    error = view.outcome.error if view.outcome is not None else None
    return error is None or not isinstance(error_from_dict(error), PASSING)
