"""When Celery's task events leave the worker: many in one publish, at most ten times a second.

Celery publishes what it has buffered at the end of every turn of the loop and waits for Redis's reply. Under a load of
small requests that is hundreds of publishes a second, for which the loop stands still; whoever watches tasks, Flower or
``celery events``, does not see the difference, since each event tells its own time.
"""

from time import monotonic
from typing import Any, Final

from tasks.messages import Ticket

EVERY_S: Final = 0.1
"""An event waits so long for others. A worker that is killed takes these with it."""
LIMIT: Final = 1024
"""So many events are published at once without waiting for the time, so that the buffer is bounded."""


class EventFlush:
    """Owns when the event dispatcher of one connection is flushed."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._due = 0.0

    def start(self) -> None:
        """Take over from Celery's own flush at the end of every turn."""
        dispatcher = self._consumer.event_dispatcher
        if dispatcher is not None and self._consumer.hub is not None:
            dispatcher.buffer_limit = LIMIT
            dispatcher.on_send_buffered = self._on_buffered

    def flush(self) -> None:
        """Publish what waits; what cannot be published is kept by the dispatcher for the next connection."""
        if self._consumer.event_dispatcher is not None:
            self._consumer.event_dispatcher.flush()

    def _on_buffered(self) -> None:
        # a time, not a flag: a timer that is lost with a connection must not be waited for
        now = monotonic()
        if now >= self._due:
            self._due = now + EVERY_S
            self._consumer.hub.call_later(EVERY_S, self.flush)


def argument_text(ticket: Ticket) -> str:
    """What stands as a task's arguments where people look for tasks: its model, adapter and tenant."""
    adapter = f", adapter={ticket.adapter!r}" if ticket.adapter else ""
    return f"({ticket.model!r}{adapter}, tenant={ticket.tenant!r})"
