"""How fast a worker takes messages off a full queue: a real worker with the fake family of no cost, no web tier."""

import tempfile
from pathlib import Path
from shutil import rmtree
from time import monotonic

from bench.figures import Effort, Measured
from tests.live import FAKE, LiveFarm, fake_spec
from tests.services import PostgresServer, RedisServer, wait_until

MESSAGES = 30_000
SKIPPED = 2_000
"""The first answers fall into the start of the worker and are not counted."""


def drain_msgs_per_s(effort: Effort) -> Measured:
    """Messages per second off a full queue, events off; with events beside it."""
    measured = Measured()
    redis, postgres = RedisServer(), PostgresServer()
    try:
        for _ in range(effort.rounds):
            measured.samples.append(_rate(redis, postgres, events=False))
        measured.note(f"fake family; events on {_rate(redis, postgres, events=True):.0f}/s")
    finally:
        redis.remove()
        postgres.remove()
    return measured


def _rate(redis: RedisServer, postgres: PostgresServer, *, events: bool) -> float:
    directory = Path(tempfile.mkdtemp(prefix="farmhand-bench-"))
    redis.client().flushall()
    farm = LiveFarm(redis.url, postgres.fresh_database(), directory)
    farm.add_models(fake_spec())
    try:
        farm.send_many((str(n) for n in range(MESSAGES)), model=FAKE, timeout_s=600)
        farm.start_worker(ready=False, events=events)
        answered = _Answered(farm)
        wait_until(lambda: answered() >= SKIPPED, 60, "the worker to be under way")
        began_at, began = monotonic(), answered()
        wait_until(lambda: answered() >= MESSAGES, 120, "the queue to be empty")
        return (MESSAGES - began) / (monotonic() - began_at)
    finally:
        farm.close()
        rmtree(directory, ignore_errors=True)


class _Answered:
    """How many outcomes stand on the reply list."""

    def __init__(self, farm: LiveFarm) -> None:
        self._farm = farm

    def __call__(self) -> int:
        self._farm.redis.expire(self._farm.reply_to, 600)
        return int(self._farm.redis.llen(self._farm.reply_to))
