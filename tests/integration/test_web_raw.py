"""What a client may do to a connection itself, over a raw socket: broken chunks, bodies nobody reads, bad heads."""

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from time import monotonic
from typing import Any

import pytest

from tests.services import RedisServer
from tests.web import Web, start_web, stop_web

PLACES = ["/v1/encode/org/m", "/v1/embeddings", "/v2/models/org/m/infer", "/v1/configs/models"]
BODY_TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def web(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    web = start_web(redis_server.url, tmp_path_factory.mktemp("web"), BODY_TIMEOUT_S=str(BODY_TIMEOUT_S))
    yield web
    stop_web(web)


def connect(web: Web) -> socket.socket:
    return socket.create_connection(("127.0.0.1", web.port), timeout=20)


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """One answer: status, headers by lower-case name, and its body as JSON."""
    with connection.makefile("rb") as stream:
        status = int(stream.readline().split()[1])
        headers = {}
        while line := stream.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        assert headers["content-type"] == "application/json"
        return status, headers, json.loads(stream.read(int(headers["content-length"])))


def is_closed(connection: socket.socket) -> bool:
    """Whether the server ends the connection, without another answer."""
    return connection.recv(1) == b""


def head(path: str, *lines: str) -> bytes:
    return "\r\n".join((f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *lines, "", "")).encode()


def chunked(path: str) -> bytes:
    return head(path, "Transfer-Encoding: chunked")


BROKEN = {
    "no number": b"ZZ\r\n{}\r\n0\r\n\r\n",
    "negative": b"-5\r\n{}\r\n0\r\n\r\n",
    "beyond all sizes": b"FFFFFFFFFFFFFFFFFF\r\n{}",
    "no terminator": b"2\r\n{}XX0\r\n\r\n",
    "early end": b"64\r\n{}",
    "no last chunk": b"2\r\n{}\r\n",
    "no end of the last chunk": b"2\r\n{}\r\n0\r\n",
}


@pytest.mark.parametrize("path", PLACES)
@pytest.mark.parametrize("body", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_chunked_body_is_the_callers_fault(web: Web, path: str, body: bytes) -> None:
    with connect(web) as connection:
        connection.sendall(chunked(path) + body)
        connection.shutdown(socket.SHUT_WR)
        status, headers, said = read_answer(connection)
        assert (status, headers["x-sie-error-code"], headers["connection"]) == (400, "INVALID_INPUT", "close")
        assert said["error"]
        assert is_closed(connection)


def test_a_body_over_the_limit_ends_the_connection_and_is_not_read_on(web: Web) -> None:
    sent = 0
    with connect(web) as connection:
        connection.sendall(head(PLACES[0], f"Content-Length: {10 << 30}"))
        status, headers, said = read_answer(connection)
        assert (status, headers["connection"], said["error"]["code"]) == (413, "close", "INPUT_TOO_LONG")
        with suppress(OSError):
            for _ in range(1024):
                connection.sendall(bytes(1 << 20))
                sent += 1
    assert sent < 200


@pytest.mark.parametrize("how", ["Content-Length: 100000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize(("path", "code"), [("/nowhere", "NOT_FOUND"), ("/v1/encode/org/none", "MODEL_NOT_FOUND")])
def test_a_body_that_nobody_read_ends_the_connection(web: Web, how: str, path: str, code: str) -> None:
    with connect(web) as connection:
        connection.sendall(head(path, how))
        status, headers, said = read_answer(connection)
        assert (status, headers["connection"], said["error"]["code"]) == (404, "close", code)
        assert is_closed(connection)


def test_a_small_body_that_is_there_already_costs_no_connection(web: Web) -> None:
    with connect(web) as connection:
        for path in ("/nowhere", PLACES[0], "/nowhere"):
            connection.sendall(head(path, "Content-Length: 2") + b"[]")
            _, headers, _ = read_answer(connection)
            assert headers["connection"] == "keep-alive"
        connection.sendall(chunked(PLACES[0]) + b"2\r\n[]\r\n0\r\n\r\n")
        assert read_answer(connection)[1]["connection"] == "keep-alive"


UNREADABLE = [
    (b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, "INPUT_TOO_LONG"),
    (b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 20_000 + b"\r\n\r\n", 431, "INPUT_TOO_LONG"),
    (b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: a\r\n" % at for at in range(200)) + b"\r\n", 431, "INPUT_TOO_LONG"),
    (b"nonsense\r\n\r\n", 400, "INVALID_INPUT"),
    (b"GET / HTTP/1.1\r\nb\x01d: x\r\n\r\n", 400, "INVALID_INPUT"),
    (head(PLACES[0], "Content-Length: many"), 400, "INVALID_INPUT"),
    (head(PLACES[0], "Content-Length: -1"), 400, "INVALID_INPUT"),
    (head(PLACES[0], "Content-Length: 2", "Content-Length: 3"), 400, "INVALID_INPUT"),
    (head(PLACES[0], "Transfer-Encoding: zip"), 501, "NOT_IMPLEMENTED"),
]


@pytest.mark.parametrize(("sent", "status", "code"), UNREADABLE)
def test_what_cannot_be_read_as_a_request_has_a_code_all_the_same(
    web: Web, sent: bytes, status: int, code: str
) -> None:
    with connect(web) as connection:
        connection.sendall(sent)
        got, headers, said = read_answer(connection)
        assert (got, headers["x-sie-error-code"], said["error"]["code"]) == (status, code, code)
        assert said["error"]["message"]
        assert headers["connection"] == "close"
        assert is_closed(connection)


def test_a_body_that_drips_is_cut_off(web: Web) -> None:
    with connect(web) as connection:
        connection.sendall(head(PLACES[0], "Content-Length: 1000"))
        connection.settimeout(0.2)
        started_at = monotonic()
        while monotonic() - started_at < 20:
            connection.sendall(b" ")
            try:
                connection.recv(1, socket.MSG_PEEK)
                break
            except TimeoutError:
                continue
        connection.settimeout(20)
        status, headers, said = read_answer(connection)
        assert (status, headers["connection"], said["error"]["code"]) == (408, "close", "REQUEST_TIMEOUT")
        assert monotonic() - started_at >= BODY_TIMEOUT_S / 2
