"""Settling a task from outside the worker that may hold it: cancelled by its caller, or overdue.

Whoever removes a task from the open ones settles it, so there is one outcome however many try. Workers settle what they
hold through ``outcome.lua``; who may ask for that here is ``submitting``, ``following`` and the workers' janitor.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import msgspec

from common.errors import DeadlineExceededError, FarmError
from tasks import messages, names
from tasks.connections import Connections
from tasks.messages import Outcome
from tasks.names import Operation
from tasks.records import TaskView

CANCELLED_S: Final = 3600
"""How long the id of a task settled here is kept for the worker that may still find its message."""
UNCLAIMED_S: Final = 60
"""An open task is closed, though nobody has asked for it, when its score lies this far back."""
CLOSED_AT_ONCE: Final = 100

Answer = TypeVar("Answer")


def overdue_error() -> DeadlineExceededError:
    """What a task ends with that nobody served in time."""
    return DeadlineExceededError("the deadline passed before the request was served")


def end_task(connections: Connections, view: TaskView, error: FarmError) -> TaskView | None:
    """Give an open asynchronous task its outcome; None if somebody else has."""
    outcome = messages.failed(view.task_id, error, model=view.model)
    result = _result(outcome, view.operation)
    slots = names.slots(view.model, view.tenant, view.queue)
    return view.ended(outcome) if _settle(connections, view.task_id, outcome.state, result, slots) else None


def lost_outcome(view: TaskView) -> Outcome:
    """What is told of a task that was closed and whose outcome is nowhere."""
    return messages.failed(view.task_id, overdue_error(), model=view.model)


def end_overdue_request(connections: Connections, task_id: str, slots: Sequence[str]) -> bool:
    """Take a synchronous request's right to answer back from a worker; false if it has been used.

    ``slots``: as ``names.slots`` gives them.
    """
    return _settle(connections, task_id, "failed", b"", slots)


def close_overdue(script: Callable[[str, list[str], list[Any]], Answer], *, result_ttl_s: int) -> Answer:
    """Close up to 100 open tasks whose deadline is long past; the workers' janitor calls it.

    Such are the tasks whose message was lost with its queue or went unread to the dead letters, and for which nobody
    asks. An asynchronous one ends as it would have for who asks: failed, with DEADLINE_EXCEEDED as its result. Harmless
    from any number of processes at once. The message of such a task, should there be one, is answered uncomputed.

    Args:
        script: runs a Lua script by name, keys and arguments: ``Connections.script``, or ``RedisLink.script`` with
            its callback.
        result_ttl_s: how long the results are kept.

    Returns:
        What ``script`` returns; the script's own answer is how many tasks were closed.
    """
    state, parts = _overdue_result_parts()
    arguments = [CLOSED_AT_ONCE, UNCLAIMED_S, names.task_record(""), names.celery_meta(""), state, result_ttl_s, *parts]
    return script("close_overdue", [names.OPEN], arguments)


def _settle(connections: Connections, task_id: str, state: str, result: bytes, slots: Sequence[str]) -> bool:
    """Close an open task; false if somebody else has. ``result`` is empty if nobody will read one."""
    keys = [*names.settled_keys(task_id), *slots]
    answer: int = connections.script("settle", keys, [task_id, state, result, connections.result_ttl_s, CANCELLED_S])
    return answer == 1


def _result(outcome: Outcome, operation: Operation) -> bytes:
    return messages.encode_celery_meta(outcome, operation, done_at=datetime.now(UTC).isoformat())


def _overdue_result_parts() -> tuple[str, list[bytes]]:
    """State and result of any overdue task; the result is cut where the task's id and its model stand.

    Only the script knows which tasks it closes, so it packs those two itself.
    """
    id_here, model_here = "\0task id", "\0model"
    outcome = messages.failed(id_here, overdue_error(), model=model_here)
    result = _result(outcome, Operation.ENCODE)  # an error reads the same for every operation
    head, rest = result.split(msgspec.msgpack.encode(id_here))
    middle, tail = rest.split(msgspec.msgpack.encode(model_here))
    return outcome.state, [head, middle, tail]
