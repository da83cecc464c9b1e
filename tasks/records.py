"""The record of an asynchronous task and its result, read as one view.

Only reads. ``publish.lua`` writes the record; ``start.lua``, ``outcome.lua``, ``settle.lua`` and ``close_overdue.lua``
change its state.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from common.errors import MessageError
from tasks import messages
from tasks.messages import Outcome
from tasks.names import Operation

DEFAULT_TENANT: Final = "default"
"""Whose tasks are that say nothing of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskView:
    """What is known of an asynchronous task. ``state``: queued, running, succeeded, failed or cancelled."""

    task_id: str
    state: str
    model: str
    operation: Operation
    submitted: float
    deadline: float
    tenant: str = DEFAULT_TENANT
    queue: str = ""
    outcome: Outcome | None = None

    def ended(self, outcome: Outcome) -> "TaskView":
        """The same task with its outcome."""
        return replace(self, state=outcome.state, outcome=outcome)


def view_of(task_id: str, record: Mapping[bytes, bytes], meta: bytes | None) -> TaskView:
    """A task's record and result, as they stand in Redis, as one view.

    Raises:
        MessageError: the record, or the result, is not one of ours.
    """
    try:
        view = TaskView(
            task_id=task_id,
            state=record[b"state"].decode(),
            model=record[b"model"].decode(),
            operation=Operation(record[b"operation"].decode()),
            submitted=float(record[b"submitted"]),
            deadline=float(record[b"deadline"]),
            tenant=record.get(b"tenant", DEFAULT_TENANT.encode()).decode(),
            queue=record.get(b"queue", b"").decode(),
        )
    except (KeyError, ValueError) as error:
        raise MessageError(f"the record of task {task_id!r} is damaged: {error}") from error
    return view if meta is None else view.ended(messages.decode_celery_meta(meta))
