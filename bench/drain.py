"""How fast a worker takes messages off a full queue: a real worker with the fake family of no cost, no web tier."""

import tempfile
from pathlib import Path
from shutil import rmtree
from time import monotonic

import psutil

from bench.farm import cpu_s
from bench.figures import Effort, Measured, shares
from tests.live import FAKE, LiveFarm, LiveWorker, fake_spec
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
            rate, used = _drain(redis, postgres, events=False)
            measured.samples.append(rate)
        measured.note(f"fake family; ms: {shares(used)}")
        rate, used = _drain(redis, postgres, events=True)
        measured.note(f"events on: {rate:.0f}/s; ms: {shares(used)}")
    finally:
        redis.remove()
        postgres.remove()
    return measured


def _drain(redis: RedisServer, postgres: PostgresServer, *, events: bool) -> tuple[float, dict[str, float]]:
    """Messages per second, and CPU milliseconds a message by role."""
    directory = Path(tempfile.mkdtemp(prefix="farmhand-bench-"))
    redis.client().flushall()
    farm = LiveFarm(redis.url, postgres.fresh_database(), directory)
    farm.add_models(fake_spec())
    try:
        farm.send_many((str(n) for n in range(MESSAGES)), model=FAKE, timeout_s=600)
        worker = farm.start_worker(ready=False, events=events)
        answered = _Answered(farm)
        wait_until(lambda: answered() >= SKIPPED, 60, "the worker to be under way")
        began_at, before, began = monotonic(), _cpu_s(worker, redis), answered()
        wait_until(lambda: answered() >= MESSAGES, 120, "the queue to be empty")
        taken_s, after, done = monotonic() - began_at, _cpu_s(worker, redis), MESSAGES - began
        return done / taken_s, {role: (after[role] - before[role]) * 1000 / done for role in after}
    finally:
        farm.close()
        rmtree(directory, ignore_errors=True)


def _cpu_s(worker: LiveWorker, redis: RedisServer) -> dict[str, float]:
    """CPU seconds used so far, by role."""
    return {
        "worker": cpu_s(psutil.Process(worker.process.pid)),
        "host": sum(map(cpu_s, worker.family())),
        "redis": cpu_s(psutil.Process(redis.pid)),
    }


class _Answered:
    """How many outcomes stand on the reply list."""

    def __init__(self, farm: LiveFarm) -> None:
        self._farm = farm

    def __call__(self) -> int:
        self._farm.redis.expire(self._farm.reply_to, 600)
        return int(self._farm.redis.llen(self._farm.reply_to))
