"""Work asked of a place, a pool's machine profile, where no worker lives: recorded for whoever starts workers.

A demand begins with the first request that finds nobody. It ends when a worker is ready there (``meet_demand.lua``,
called by the worker), or when nobody has asked for ``LIFE_S``. Nobody holds it, so no process takes it along when it
dies. The length of a queue says what waits there; a demand, which an autoscaler adds to that, is what was sent away.

How long the last start took stands beside it, and callers are told to come back when the next one may be done.
"""

from dataclasses import dataclass
from typing import Final

from tasks import names
from tasks.connections import Connections

LIFE_S: Final = 300
"""A demand is over when nobody has asked for so long; longer than anybody is told to wait."""
OVERDUE_S: Final = 5.0
"""When to look again for a worker that takes longer to start than the last one did."""
LONGEST_RETRY_S: Final = 60.0
"""Nobody is sent away for longer: the next start may be quicker than the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What nobody serves. Instants are on the farm clock; ``model`` is the last one asked for."""

    pool: str
    machine_profile: str
    since: float
    last: float
    asked: int
    model: str


@dataclass(frozen=True, slots=True)
class Wait:
    """For how long a worker is likely not there yet, and when to ask again, in seconds."""

    expected_s: float

    @property
    def retry_after_s(self) -> float:
        """At most a minute."""
        return min(self.expected_s, LONGEST_RETRY_S)


def record(connections: Connections, *, pool: str, machine_profile: str, model: str, default_start_s: float) -> Wait:
    """Count one more request that found no worker; returns how long one takes to come, as last measured.

    Args:
        connections: over which to tell.
        pool: where a worker is missing.
        machine_profile: likewise.
        model: what was asked for.
        default_start_s: how long a start takes where none was measured.

    Raises:
        QueueUnavailableError: Redis does not answer.
    """
    place = names.pool_queue(pool, machine_profile)
    keys = [names.DEMANDS, names.demand(place), names.START_TIMES]
    waited, took = connections.script("record_demand", keys, [place, LIFE_S, pool, machine_profile, model])
    left_s = (float(took) if took else default_start_s) - float(waited)
    return Wait(left_s if left_s > 0 else OVERDUE_S)


def demands(connections: Connections) -> list[Demand]:
    """What nobody serves now, the longest wanted first; QueueUnavailableError if Redis does not answer."""
    oldest = connections.clock.now() - LIFE_S
    places = connections.ask("ZRANGEBYSCORE", names.DEMANDS, oldest, "+inf")
    found = connections.ask_many(*(("HGETALL", names.demand(place.decode())) for place in places)) if places else []
    return sorted((_demand(told) for told in found if told), key=lambda one: one.since)


def _demand(told: dict[bytes, bytes]) -> Demand:
    return Demand(
        pool=told[b"pool"].decode(),
        machine_profile=told[b"machine_profile"].decode(),
        since=float(told[b"since"]),
        last=float(told[b"last"]),
        asked=int(told[b"asked"]),
        model=told[b"model"].decode(),
    )
