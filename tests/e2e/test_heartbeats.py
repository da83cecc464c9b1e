"""What the supervisor does for a worker that it has seen die."""

import json
import socket

from cli import heartbeats
from tasks import names
from tests.services import RedisServer, free_port


def test_only_the_dead_workers_heartbeat_is_forgotten(redis_url: str, redis_server: RedisServer) -> None:
    here = socket.gethostname()
    told = {"dead": (here, 7), "alive": (here, 8), "elsewhere": ("another-host", 7)}
    with redis_server.client() as client:
        for incarnation, (host, pid) in told.items():
            client.hset(names.INCARNATIONS, incarnation, json.dumps({"hostname": host, "pid": pid}))
            client.set(names.beat(incarnation), "1")
        client.hset(names.INCARNATIONS, "odd", b"\xff")
        assert heartbeats.forget(redis_url, pid=7) == 1
        assert {one for one in told if client.exists(names.beat(one))} == {"alive", "elsewhere"}
        assert heartbeats.forget(redis_url) == 1
        assert {one for one in told if client.exists(names.beat(one))} == {"elsewhere"}


def test_without_redis_nothing_is_forgotten() -> None:
    assert heartbeats.forget(f"redis://127.0.0.1:{free_port()}/0", pid=7) == 0
