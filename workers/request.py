"""How a queue message becomes a held request: Celery's Request, our ticket, and the plain producers' messages.

``InferenceTask.Strategy`` is Celery's own hook: called with every received message, it hands it to the dispatcher
instead of to a pool.
"""

from collections.abc import Callable
from typing import Any, Protocol

from celery import Task as CeleryTask
from celery.app.base import Celery
from celery.exceptions import InvalidTaskError
from celery.worker.request import Request as CeleryRequest

from common.errors import FarmError, MessageError
from tasks import messages
from tasks.messages import Ticket
from tasks.names import TASK_NAMES, Operation
from workers.events import argument_text

_OPERATIONS = {name: operation for operation, name in TASK_NAMES.items()}
_NO_BODY: tuple[tuple[()], dict[str, Any], dict[str, Any]] = ((), {}, {})


class Receiver(Protocol):
    """The dispatcher, as the strategy sees it."""

    def on_request(self, request: "FarmRequest", ticket: Ticket | None) -> None:
        """A message has arrived; ``ticket`` is None for a plain Celery producer's."""

    def on_revoked(self, request: "FarmRequest", *, expired: bool) -> None:
        """Celery found the request revoked or expired."""


class FarmRequest(CeleryRequest):
    """Celery's view of a held message. Revocation is answered through our outcome call, not by a silent ack."""

    receiver: Receiver | None = None
    time_start: float | None = None

    def _announce_revoked(self, reason: str, terminated: bool, signum: int | None, expired: bool) -> None:  # noqa: ARG002
        """Instead of Celery's silent acknowledgement: the request gets its one outcome."""
        self._already_revoked = True
        if self.receiver is not None:
            self.receiver.on_revoked(self, expired=expired)

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """A cold shutdown asks this of what runs: ``Farm.leave`` gives the message back instead."""

    def terminate(self, pool: Any, signal: Any = None) -> None:  # noqa: ARG002 - Celery's signature
        """``revoke(terminate=True)``: answered at once; a micro-batch that runs goes on for its other requests."""
        self._announce_revoked("terminated", terminated=True, signum=None, expired=False)

    @property
    def tag(self) -> Any:
        """What names the message until it is acknowledged."""
        return self.message.delivery_tag

    @property
    def operation(self) -> Operation:
        """What is asked of the model."""
        return _OPERATIONS[self.type]

    @property
    def queue(self) -> str:
        """The queue the message came from."""
        return str(self.delivery_info["routing_key"] or "")


Task: Any = CeleryTask  # celery-types has it generic and Strategy a string


class InferenceTask(Task):
    """One operation as a Celery task. Its body never runs in the worker: hosts run it, in micro-batches."""

    abstract = True
    acks_late = True
    typing = False

    def Strategy(self, task: Any, app: Celery, consumer: Any) -> Callable[..., None]:  # noqa: N802 - Celery's hook
        """Celery asks once per (re)connect how to handle messages of this task."""
        return intake_strategy(task, app, consumer)

    def run(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Celery calls this only when told to run eagerly, in the caller's process, where there is no model."""
        raise FarmError(
            f"{self.name} runs in a worker's model process; send it to a queue instead of running it eagerly"
        )


def intake_strategy(task: Any, app: Celery, consumer: Any) -> Callable[..., None]:
    """The handler of received messages: build the request, announce it, hand it to the dispatcher."""
    receiver: Receiver = consumer.receiver
    hostname, connection_errors = consumer.hostname, consumer.connection_errors
    eventer = consumer.event_dispatcher
    sends_events = bool(eventer and eventer.enabled and task.send_events)
    revoked = consumer.controller.state.revoked

    def handle(message: Any, payload: Any, ack: Any, reject: Any, callbacks: Any) -> None:  # noqa: ARG001
        try:
            ticket = messages.read_ticket(message.headers)
        except MessageError as error:
            raise InvalidTaskError(str(error)) from error
        if not _is_text(message.headers.get("id")) or not _is_text(message.properties.get("reply_to") or ""):
            raise InvalidTaskError("a message's id, and the list its reply goes to, are text")
        request = FarmRequest(
            message,
            on_ack=ack,
            on_reject=reject,
            app=app,
            hostname=hostname,
            eventer=eventer,
            task=task,
            connection_errors=connection_errors,
            body=_NO_BODY,
            headers=message.headers,
            decoded=True,
        )
        request.receiver = receiver
        if sends_events:
            request.send_event(
                "task-received",
                name=request.name,
                args=request.argsrepr if ticket is None else argument_text(ticket),
                kwargs=request.kwargsrepr if ticket is None else None,
                root_id=request.root_id,
                parent_id=request.parent_id,
                retries=request.request_dict.get("retries", 0),
                eta=request.eta and request.eta.isoformat(),
                expires=request.expires and request.expires.isoformat(),
            )
        receiver.on_request(request, ticket)
        if request.expires or request.id in revoked:
            request.revoked()

    return handle


def _is_text(value: Any) -> bool:
    """Whether this is text that can be written: JSON can name half a character, which UTF-8 cannot."""
    return isinstance(value, str) and value.encode("utf-8", "ignore").decode() == value
