"""From decision to confirmed outcome: each held request is settled once, and told to kombu and Celery when Redis has.

Owns which requests are being settled; ``outcomes`` owns the writing. Owned by the event loop thread.
"""

from collections.abc import Callable
from time import monotonic
from typing import Any

from celery.worker import state as celery_state

from common.errors import FarmError
from common.logs import get_logger
from tasks import messages
from tasks.messages import Outcome
from workers.intake import Held, Intake
from workers.outcomes import OutcomeWriter, dead_letter

log = get_logger("workers")


class Settler:
    """Hands outcomes over to be written, a turn of the loop's at once.

    Args:
        intake: what the worker holds.
        outcomes: who writes them.
        forget: drops what is left of a request's work; its results, if any come, are dropped, too.
    """

    def __init__(self, intake: Intake, outcomes: OutcomeWriter, *, forget: Callable[[Held], None]) -> None:
        self._intake = intake
        self._outcomes = outcomes
        self._forget = forget
        self._hub: Any = None
        self._flush_due = False

    def register(self, hub: Any) -> None:
        """Use this hub from now on."""
        self._hub = hub
        self._flush_due = False

    def settle(self, held: Held, outcome: Outcome, *, dead: str = "") -> None:
        """Answer a request; only the first answer counts. ``dead`` is a dead letter to keep with it."""
        if held.is_settling:
            return
        held.is_settling = True
        self._forget(held)
        try:
            self._outcomes.add(held, outcome, dead=dead)
        except Exception as error:
            log.exception("outcome_unwritable", task=held.id)
            broken = FarmError(f"the outcome cannot be written: {error}")
            self._outcomes.add(held, messages.failed(held.id, broken), dead=dead_letter(held, broken.code))
        if self._hub is not None and not self._flush_due:
            self._flush_due = True
            self._hub.call_soon(self.flush)

    def fail(self, held: Held, error: FarmError, *, dead: str = "") -> None:
        """Answer a request with an error."""
        ticket = held.ticket
        self.settle(held, messages.failed(held.id, error, model=ticket.model, spec=ticket.spec), dead=dead)

    def flush(self) -> None:
        """Write what is buffered."""
        self._flush_due = False
        self._outcomes.flush()

    def on_settled(self, held: Held, outcome: Outcome, answered: bool) -> None:
        """Redis has confirmed: tell kombu and Celery, and make room."""
        self._intake.remove(held)
        request = held.request
        request.acknowledged = True
        qos = request.message.channel.qos if request.message.channel else None
        if qos is not None and isinstance(held.tag, str):
            qos._dirty.add(held.tag)  # noqa: SLF001 - kombu's set of acknowledged tags; the record itself is gone
        celery_state.task_ready(request)
        if answered:
            _send_final_event(held, outcome)


def _send_final_event(held: Held, outcome: Outcome) -> None:
    """Tell Flower and other event readers; results are named, never carried."""
    request = held.request
    if outcome.error is None:
        runtime = monotonic() - held.started_at if held.started_at is not None else 0.0
        request.send_event("task-succeeded", result=f"{held.ticket.items} items", runtime=runtime)
    elif outcome.state == "cancelled":
        request.send_event("task-revoked", terminated=False, signum=None, expired=False)
    else:
        request.send_event(
            "task-failed", exception=f"{outcome.error['code']}: {outcome.error['message']}", traceback=""
        )
