"""Following an asynchronous task by its id: what has become of it, waiting for its end, cancelling it.

``records`` reads the task, ``results`` tells when it may have ended, ``settling`` ends the overdue and cancelled.
"""

from time import monotonic
from typing import Final

from common.errors import CancelledError, TaskNotFoundError
from tasks import messages, names
from tasks.connections import Connections
from tasks.large import whole
from tasks.records import TaskView, view_of
from tasks.settling import end_task, lost_outcome, overdue_error

OVERDUE_GRACE_S: Final = 5.0
"""A task this much past its deadline is settled by whoever asks for it."""


def look(connections: Connections, task_id: str, *, tenant: str) -> TaskView:
    """What has become of the task; one that is overdue is settled by looking.

    Raises:
        TaskNotFoundError: never submitted by this tenant, or its result has expired.
    """
    record, meta = connections.ask_many(("HGETALL", names.task_record(task_id)), ("GET", names.celery_meta(task_id)))
    if not record:
        raise _unknown(task_id)
    view = view_of(task_id, record, meta)
    if view.tenant != tenant:
        raise _unknown(task_id)
    if view.outcome is None and view.state not in ("queued", "running"):
        raise TaskNotFoundError(f"the result of task {task_id!r} has expired", param="task_id")
    if view.outcome is None and connections.clock.now() > view.deadline + OVERDUE_GRACE_S:
        return end_task(connections, view, overdue_error()) or _ended_by_others(connections, view)
    return view


def _ended_by_others(connections: Connections, view: TaskView) -> TaskView:
    """An overdue task that somebody else has closed: with the outcome that stands there now, or none, if it is lost."""
    meta = connections.ask("GET", names.celery_meta(view.task_id))
    return view.ended(messages.decode_celery_meta(meta) if meta is not None else lost_outcome(view))


def follow(connections: Connections, task_id: str, *, tenant: str, wait_s: float) -> TaskView:
    """As ``look``, after waiting up to ``wait_s`` for the task to end.

    Raises:
        TaskNotFoundError: as ``look``.
        QueueUnavailableError: the connections were closed meanwhile.
    """
    view = look(connections, task_id, tenant=tenant)
    if view.outcome is not None or wait_s <= 0:
        return _whole(connections, view)
    until = monotonic() + wait_s
    with connections.results.watching(task_id) as watch:
        while (view := look(connections, task_id, tenant=tenant)).outcome is None:
            left_s = until - monotonic()
            if left_s <= 0:
                break
            watch.wait(min(left_s, max(0.1, view.deadline + OVERDUE_GRACE_S - connections.clock.now())))
    return _whole(connections, view)


def _whole(connections: Connections, view: TaskView) -> TaskView:
    """A task with its outcome itself, wherever that stands."""
    return view if view.outcome is None else view.ended(whole(connections, view.outcome, is_kept=True))


def cancel(connections: Connections, task_id: str, *, tenant: str) -> TaskView:
    """Cancel the task; one that has ended stays as it is.

    Raises:
        TaskNotFoundError: as ``look``.
    """
    view = look(connections, task_id, tenant=tenant)
    if view.outcome is None:
        end_task(connections, view, CancelledError("the task was cancelled by its caller"))
        view = look(connections, task_id, tenant=tenant)
    return _whole(connections, view)


def _unknown(task_id: str) -> TaskNotFoundError:
    """In the same words whether there never was such a task or it is another's."""
    return TaskNotFoundError(f"no task {task_id!r}: never submitted, or its result has expired", param="task_id")
