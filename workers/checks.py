"""What a worker asks of Redis before it serves; each refusal is one line."""

from contextlib import suppress
from time import monotonic
from typing import Any
from uuid import uuid4

import redis

from common.clock import FarmClock
from common.errors import SetupError
from common.logs import get_logger
from tasks import names, scripts
from tasks.transport import BELL_PREFIX

log = get_logger("workers")

OLDEST_REDIS = (6, 2)
PLACE = "redis.call('DEL', KEYS[1]) redis.call('SET', KEYS[1], '1', 'EX', 10) redis.call('LPUSH', KEYS[2], ARGV[1])"
"""Begins by removing, so that a full Redis accepts it: a worker must be able to come and empty it."""


def check_redis(client: "redis.Redis") -> None:
    """Refuse a Redis on which the farm's promises do not hold; warn where they hold only until a restart.

    Raises:
        SetupError: no answer, older than 6.2, or it evicts keys when full.
    """
    try:
        info: dict[str, Any] = client.info()
    except redis.RedisError as error:
        raise SetupError(f"Redis does not answer: {error}; is FARMHAND_REDIS_URL right?") from error
    version = str(info.get("redis_version", "0"))
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_REDIS:
        raise SetupError(f"Redis {version} is too old: the farm needs 6.2 or newer")
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise SetupError(
            f"Redis evicts keys when full (maxmemory-policy {policy}): set it to noeviction, or requests get lost"
        )
    if not int(info.get("aof_enabled", 0)):
        log.warning("redis_without_appendonly", hint="a Redis restart loses what is queued")


def self_test(client: "redis.Redis") -> None:
    """Send one message through the pop and outcome scripts and back.

    Raises:
        SetupError: the message did not come back as it was sent.
    """
    incarnation = f"self-test-{uuid4().hex}"
    queue = names.SELF_TEST_QUEUE.format(incarnation=incarnation)
    keys = [
        names.beat(incarnation),
        names.closing(incarnation),
        names.unacked(incarnation),
        names.LOST,
        names.CANCELLED,
    ]
    sent = b'{"self": "test"}'
    try:
        client.eval(PLACE, 2, names.beat(incarnation), queue, sent)
        popped: Any = client.eval(scripts.source("pop"), len(keys) + 1, *keys, queue, 1, 1, 1, 0, 0, BELL_PREFIX, 1)
        held = client.hlen(names.unacked(incarnation))
        moved = client.eval(
            scripts.source("give_back"), 3, names.unacked(incarnation), names.started(incarnation), names.DEAD_LETTERS,
            BELL_PREFIX, "queue", 1,
        )  # fmt: skip
        back = client.lrange(queue, 0, -1)
    except redis.RedisError as error:
        raise SetupError(f"the self-test through Redis failed: {error}") from error
    finally:
        with suppress(redis.RedisError):
            client.delete(names.beat(incarnation), names.unacked(incarnation), queue, names.bell(queue))
    if popped[6:7] != [sent] or held != 1 or moved != 1 or back != [sent]:
        raise SetupError("the self-test through Redis failed: the message did not come back as it was sent")


def sync_clock(client: "redis.Redis", clock: FarmClock) -> None:
    """Measure this process's offset to Redis TIME."""
    asked_at = monotonic()
    answer: Any = client.time()
    clock.sync(answer, asked_at=asked_at, answered_at=monotonic())
