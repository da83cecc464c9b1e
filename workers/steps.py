"""The two places where the farm hooks into Celery's start and stop. Glue: the work is ``workers.farm``'s."""

from typing import Any

from celery import bootsteps
from celery.exceptions import WorkerShutdown
from celery.worker import state as celery_state

from common.collector import keep_for_good
from common.errors import SetupError
from common.logs import get_logger
from workers.events import EventFlush
from workers.farm import Farm

log = get_logger("workers")


class FarmStep(bootsteps.StartStopStep):
    """Builds the farm for the life of the process: a consumer step would be started again on every reconnect."""

    requires = ("celery.worker.components:Pool",)

    def create(self, worker: Any) -> "FarmStep":  # type: ignore[override]  # the stubs say None
        """Build everything; nothing is connected yet."""
        queues = list(worker.app.amqp.queues.consume_from)
        worker.farm = Farm(worker.app.farm_settings, nodename=worker.hostname, queues=queues)
        return worker.farm  # type: ignore[no-any-return]  # Celery calls its start() and stop()

    def start(self, worker: Any) -> None:
        """Check and start; a refusal is one line and the end of the process."""
        try:
            worker.farm.start()
            keep_for_good()
        except SetupError as error:
            log.critical("worker_refused", reason=error.message)
            raise WorkerShutdown(1) from None

    def terminate(self, worker: Any) -> None:
        """A cold shutdown ends the hosts the same way."""
        worker.farm.stop()


class IntakeStep(bootsteps.StartStopStep):
    """Attaches the intake to the broker channel of this connection, and leaves for good on shutdown."""

    requires = ("celery.worker.consumer.tasks:Tasks",)
    _events: EventFlush | None = None  # a connection may break before this step is started

    def start(self, consumer: Any) -> None:
        """A new connection: drain its channel."""
        consumer.controller.farm.attach(consumer)
        self._events = EventFlush(consumer)
        self._events.start()

    def register_with_event_loop(self, consumer: Any, hub: Any) -> None:
        """The hub has forgotten readers and timers."""
        consumer.controller.farm.register(hub)

    def stop(self, consumer: Any) -> None:
        """On a mere reconnect the intake keeps what it holds; on shutdown it is emptied."""
        if _is_shutting_down():
            farm = consumer.controller.farm
            wait_s = 0.0 if celery_state.should_terminate else farm.settings.drain_s
            farm.leave(_channel(consumer), wait_s=wait_s)
        self._flush_events()

    def terminate(self, consumer: Any) -> None:
        """A cold shutdown waits for nothing."""
        consumer.controller.farm.leave(_channel(consumer), wait_s=0.0)
        self._flush_events()

    def _flush_events(self) -> None:
        if self._events is not None:
            self._events.flush()

    def info(self, consumer: Any) -> dict[str, Any]:  # type: ignore[override]  # the stubs say None
        """What ``inspect stats`` shows of the farm."""
        farm = consumer.controller.farm
        return {
            "farm": {
                **farm.describe(),
                "incarnation": farm.heartbeat.incarnation,
                "held": len(farm.intake),
                "running": farm.dispatcher.running,
            }
        }


def _is_shutting_down() -> bool:
    asked = (celery_state.should_stop, celery_state.should_terminate)
    return any(flag is not None and flag is not False for flag in asked)  # an exit code of 0 asks, too


def _channel(consumer: Any) -> Any:
    return consumer.task_consumer.channel if consumer.task_consumer else None
