"""``/v1/tasks/<id>``: what has become of an asynchronous request; cancelling it."""

from typing import Final

from flask import Blueprint
from flask.typing import ResponseReturnValue

from common.errors import QueueUnavailableError, RequestError, TaskNotFoundError
from webapp.auth.principals import principal
from webapp.farm import farm
from webapp.openapi.declared import Answered, declared
from webapp.openapi.headers import WAIT
from webapp.wire import answers
from webapp.wire.headers import JSON, MSGPACK
from webapp.wire.queries import read_wait_s
from webapp.wire.results import Task

bp = Blueprint("tasks", __name__)

MAX_WAIT_S: Final = 60.0
MAX_ID_LENGTH: Final = 64
_TASK: Final = Answered(Task, "What is known of the task.", (JSON, MSGPACK))
_ERRORS: Final = (RequestError, TaskNotFoundError, QueueUnavailableError)


@bp.get("/v1/tasks/<path:task_id>")
@declared(_TASK, parameters=(WAIT,), errors=_ERRORS)
def show(task_id: str) -> ResponseReturnValue:
    """The task's state, and its result or error once it has ended; ``?wait=s`` waits for that."""
    return answers.task_answer(
        farm().client.task(_sane(task_id), tenant=principal().tenant, wait_s=read_wait_s(MAX_WAIT_S))
    )


@bp.delete("/v1/tasks/<path:task_id>")
@declared(_TASK, errors=_ERRORS)
def cancel(task_id: str) -> ResponseReturnValue:
    """Cancel the task; one that has ended stays as it is."""
    return answers.task_answer(farm().client.cancel(_sane(task_id), tenant=principal().tenant))


def _sane(task_id: str) -> str:
    if len(task_id) > MAX_ID_LENGTH or not task_id.isascii() or not task_id.isprintable():
        raise TaskNotFoundError("no task has such an id", param="task_id")
    return task_id
