"""Telling the farm at once that workers of this machine are dead, so that nobody waits for their heartbeats to end."""

import json
import socket
from typing import Final

import redis

from tasks import names

TIMEOUT_S: Final = 1.0


def forget(redis_url: str, *, pid: int | None = None) -> int:
    """Delete the heartbeats of this host's worker of that process id, which has ended; of all of them if None.

    What they held returns to its queues with the next looks of another worker's janitor. Returns how many there were.
    Without an answer from Redis nothing is done: the heartbeats end by themselves some seconds later.
    """
    try:
        with redis.Redis.from_url(redis_url, socket_connect_timeout=TIMEOUT_S, socket_timeout=TIMEOUT_S) as client:
            known: dict[bytes, bytes] = client.hgetall(names.INCARNATIONS)
            keys = [names.beat(one.decode()) for one, told in known.items() if _is_of(told, pid)]
            return int(client.delete(*keys)) if keys else 0
    except redis.RedisError:
        return 0


def _is_of(told: bytes, pid: int | None) -> bool:
    try:
        worker = json.loads(told)
    except ValueError:
        return False
    return worker.get("hostname") == socket.gethostname() and pid in (None, worker.get("pid"))
