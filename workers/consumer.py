"""Celery's consumer with the farm's habits: no gossip or mingle, and reconnects every half second."""

import warnings
from typing import Any, Final

from celery.exceptions import CPendingDeprecationWarning
from celery.worker.consumer import Consumer
from celery.worker.state import maybe_shutdown

from common.logs import get_logger
from workers.request import Receiver

log = get_logger("workers")

RECONNECT_S: Final = 0.5

# Celery announces with every lost connection that it could cancel what runs; the intake keeps it on purpose.
warnings.filterwarnings("ignore", category=CPendingDeprecationWarning, module="celery.worker.consumer.consumer")


class FarmConsumer(Consumer):
    """Consumer of a farm worker."""

    controller: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["without_gossip"] = kwargs["without_mingle"] = True
        super().__init__(*args, **kwargs)

    @property
    def receiver(self) -> Receiver:
        """Whom the intake strategy hands requests to."""
        receiver: Receiver = self.controller.farm.arrivals
        return receiver

    def ensure_connected(self, conn: Any) -> Any:
        """Try until the broker answers, every half second, whatever Celery's own back-off would be."""

        def refused(error: Exception, interval: float) -> None:  # noqa: ARG001 - kombu's signature
            log.warning("broker_refused", url=conn.as_uri(), error=str(error))

        connected = conn.ensure_connection(
            refused,
            None,
            interval_start=RECONNECT_S,
            interval_step=0,
            interval_max=RECONNECT_S,
            callback=maybe_shutdown,
        )
        self.first_connection_attempt = False
        return connected
