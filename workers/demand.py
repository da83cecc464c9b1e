"""Says, once a worker is ready, that the demand for it is met, and how long its start took (``tasks.demand``)."""

from collections.abc import Iterable
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

import hiredis
import psutil

from common.logs import get_logger
from tasks import names
from workers.redis_link import LinkLostError, RedisLink

log = get_logger("workers")

SCRIPT: Final = "meet_demand"


class DemandMet:
    """Tells of each place once in the life of the process; owned by the event loop's thread.

    Args:
        link: the incarnation's own connection.
    """

    def __init__(self, link: RedisLink) -> None:
        self._link = link
        self._took_s: float | None = None
        self._told: set[str] = set()

    def tell(self, queues: Iterable[str]) -> None:
        """This worker is ready and consumes these queues; called again and again, and heard of where it is news."""
        if self._took_s is None:
            self._took_s = _since_process_start_s()
            log.info("worker_ready", start_s=round(self._took_s, 1))
        places = {place for queue in queues if (place := names.place_of(queue)) is not None}
        for place in places - self._told:
            self._told.add(place)
            keys = [names.DEMANDS, names.demand(place), names.START_TIMES]
            self._link.script(SCRIPT, keys, [place, f"{self._took_s:.3f}"], then=partial(self._on_told, place))

    def _on_told(self, place: str, reply: Any) -> None:
        if isinstance(reply, (hiredis.ReplyError, LinkLostError)):
            self._told.discard(place)
        elif reply == 1:
            log.info("demand_met", place=place)


def _since_process_start_s() -> float:
    return max(0.0, datetime.now(UTC).timestamp() - psutil.Process().create_time())
