"""Callers that leave over real connections: what has not started is cancelled, what has is left alone."""

import json
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks import names
from tests.services import RedisServer, wait_until
from tests.standin import QUEUE, StandIn, Taken, vector_of
from tests.web import Web, start_web, stop_web

Leave = Callable[[socket.socket], None]


def asking(text: str, path: str = "/v1/encode/org/m", **body: Any) -> bytes:
    """One request as it goes over a connection."""
    raw = json.dumps(body or {"items": [{"text": text}]}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    return head.encode() + raw


def caller(web: Web, *texts: str) -> socket.socket:
    """A connection over which all of these have been asked."""
    connection = socket.create_connection(("127.0.0.1", web.port), timeout=15)
    connection.sendall(b"".join(map(asking, texts)))
    return connection


def answer_of(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """The next answer on a connection: status and body."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        got = connection.recv(1)
        assert got, raw
        raw += got
    head = raw.decode().split("\r\n")
    length = next(int(line.split(":")[1]) for line in head if line.lower().startswith("content-length"))
    body = b""
    while len(body) < length:
        body += connection.recv(length - len(body))
    return int(head[0].split()[1]), json.loads(body)


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def closed(standin: StandIn, *taken: Taken) -> bool:
    """Whether none of these is open any more."""
    return not any(standin.redis.zscore(names.OPEN, one.task_id) is not None for one in taken)


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["end", "reset"])
def test_who_leaves_frees_the_slot_and_is_not_computed(web: Web, standin: StandIn, leave: Leave) -> None:
    """One request is held by a worker, one stands in the queue, and one whose caller stays."""
    stays, leaves = caller(web, "stays"), caller(web, "held")
    held = sorted((standin.take(), standin.take()), key=lambda one: one.request.items[0]["text"])
    queued = caller(web, "queued")
    wait_until(lambda: standin.redis.llen(QUEUE) == 1, 10, "the third request")
    leave(leaves)
    leave(queued)
    wait_until(lambda: standin.redis.zcard(names.OPEN) == 1, 10, "both to be cancelled")
    assert not closed(standin, held[1])
    cancelled = standin.take()
    assert {one.decode() for one in standin.redis.zrange(names.CANCELLED, 0, -1)} == {
        held[0].task_id,
        cancelled.task_id,
    }
    assert standin.answer(*held, cancelled) == [0, 1, 0]
    assert answer_of(stays)[0] == 200
    stays.close()


def test_a_caller_that_closes_its_sending_side_is_told_that_it_is_cancelled(web: Web, standin: StandIn) -> None:
    with caller(web, "half") as connection:
        taken = standin.take()
        connection.shutdown(socket.SHUT_WR)
        status, body = answer_of(connection)
        assert (status, body["error"]["code"]) == (409, "CANCELLED")
        assert standin.answer(taken) == [0]
        assert connection.recv(1) == b""  # and the connection is closed, as there comes no further request


def test_what_is_running_is_left_alone_and_answered(web: Web, standin: StandIn) -> None:
    with caller(web, "running") as connection:
        taken, other = standin.take(), caller(web, "waiting")
        standin.begin(taken)
        waiting = standin.take()
        connection.shutdown(socket.SHUT_WR)
        other.close()
        wait_until(lambda: closed(standin, waiting), 10, "a look at both")
        assert not closed(standin, taken)
        assert standin.answer(taken) == [1]
        status, body = answer_of(connection)
        assert (status, body["items"][0]["dense"]["values"]) == (200, vector_of("running"))


def test_requests_sent_ahead_are_no_sign_of_leaving(web: Web, standin: StandIn) -> None:
    with caller(web, "first", "second") as connection:
        first, other = standin.take(), caller(web, "leaves")
        leaving = standin.take()
        other.close()
        wait_until(lambda: closed(standin, leaving), 10, "a look at both")
        assert standin.answer(first) == [1]
        assert answer_of(connection)[1]["items"][0]["dense"]["values"] == vector_of("first")
        assert standin.answer(standin.take()) == [1]
        assert answer_of(connection)[1]["items"][0]["dense"]["values"] == vector_of("second")


def test_a_connection_that_stays_serves_one_request_after_the_other(web: Web, standin: StandIn) -> None:
    standin.start()
    with socket.create_connection(("127.0.0.1", web.port), timeout=15) as connection:
        for at in range(50):
            connection.sendall(asking(f"text {at}"))
            status, body = answer_of(connection)
            assert (status, body["items"][0]["dense"]["values"]) == (200, vector_of(f"text {at}"))
    assert not standin.redis.exists(names.CANCELLED)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/score/org/rank", {"query": {"text": "q"}, "items": [{"text": "a"}]}),
        ("/v1/embeddings", {"model": "org/m", "input": "a"}),
        ("/v1/rerank", {"model": "org/rank", "query": "q", "documents": ["a"]}),
        (
            "/v2/models/org/m/infer",
            {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}]},
        ),
    ],
)
def test_every_route_watches_its_callers(web: Web, standin: StandIn, path: str, body: dict[str, Any]) -> None:
    with socket.create_connection(("127.0.0.1", web.port)) as connection:
        connection.sendall(asking("", path, **body))
        taken = standin.take()
    wait_until(lambda: closed(standin, taken), 10, "its caller to be seen leaving")
    assert standin.redis.zscore(names.CANCELLED, taken.task_id) is not None


def test_callers_that_leave_by_the_hundred_are_all_cancelled(web: Web, standin: StandIn) -> None:
    connections = [caller(web, f"{at}") for at in range(250)]
    wait_until(lambda: standin.redis.llen(QUEUE) == 250, 20, "all requests to be queued")
    for connection in connections:
        connection.close()
    wait_until(lambda: not standin.redis.exists(names.OPEN), 20, "all to be cancelled")
    assert standin.redis.zcard(names.CANCELLED) == 250


def test_who_leaves_while_redis_is_away_is_cancelled_when_it_is_back(own_redis: RedisServer, tmp_path: Path) -> None:
    web, standin = start_web(own_redis.url, tmp_path), StandIn(own_redis.url).tell()
    connection = caller(web, "leaves")
    taken = standin.take()
    own_redis.stop()
    connection.close()
    own_redis.start()
    wait_until(lambda: closed(standin, taken), 15, "the request to be cancelled")
    stop_web(web)
