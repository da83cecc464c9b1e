"""The worker's own connection to Redis: what it makes of slow, silent and broken ones. The peers are real sockets."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from kombu.asynchronous import Hub

import workers.redis_link
from tests.services import wait_until
from workers.redis_link import LinkLostError, RedisLink

SILENT_S = 0.5


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.redis_link, "SILENT_S", SILENT_S)
    monkeypatch.setattr(workers.redis_link, "RECONNECT_S", 0.05)


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()


class Peer:
    """Listens where Redis would, and treats the n-th connection as the n-th behaviour says, the last one ever after."""

    def __init__(self, *behaviours: Callable[[socket.socket], None]) -> None:
        self._behaviours = behaviours
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listening.getsockname()[1]}/0"
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                behaviour = self._behaviours[min(self.connections, len(self._behaviours) - 1)]
                self.connections += 1
                threading.Thread(target=self._treat, args=(behaviour, connection), daemon=True).start()

    def _treat(self, behaviour: Callable[[socket.socket], None], connection: socket.socket) -> None:
        with suppress(OSError), connection:
            behaviour(connection)

    def close(self) -> None:
        self._listening.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def start(*behaviours: Callable[[socket.socket], None]) -> Peer:
        peers.append(Peer(*behaviours))
        return peers[-1]

    yield start
    for peer in peers:
        peer.close()


def read_until(connection: socket.socket, what: bytes) -> bytes:
    """Read until ``what`` has come."""
    read = b""
    while what not in read:
        data = connection.recv(1 << 16)
        if not data:
            raise ConnectionError
        read += data
    return read


def run(hub: Hub, link: RedisLink, until: Callable[[], object], timeout_s: float = 10) -> None:
    """Turn the loop until something is true."""

    def turn() -> object:
        link.tend()
        hub.call_later(0.01, lambda: None)
        hub.run_once()
        return until()

    wait_until(turn, timeout_s, "the link")


def test_replies_of_a_lost_connection_answer_no_call_of_the_next(serve: Callable[..., Peer], hub: Hub) -> None:
    def dies_in_the_middle_of_a_reply(connection: socket.socket) -> None:
        read_until(connection, b"wanted")
        connection.sendall(b"$10\r\nhalf")

    def answers(connection: socket.socket) -> None:
        read_until(connection, b"wanted")
        connection.sendall(b"$5\r\nwhole\r\n")
        connection.recv(1)

    peer = serve(dies_in_the_middle_of_a_reply, answers)
    link = RedisLink(peer.url, on_connect=lambda: None, script_names=())
    link.register(hub)
    replies: list[Any] = []
    link.call("GET", "wanted", then=replies.append, repeat=True)
    run(hub, link, lambda: replies)
    assert replies == [b"whole"]
    assert peer.connections == 2
    link.close()


def test_a_redis_that_is_loading_is_asked_again(serve: Callable[..., Peer], hub: Hub) -> None:
    def loads(connection: socket.socket) -> None:
        read_until(connection, b"wanted")
        connection.sendall(b"-LOADING Redis is loading the dataset in memory\r\n")
        connection.recv(1)

    def answers(connection: socket.socket) -> None:
        read_until(connection, b"wanted")
        connection.sendall(b"$4\r\nbody\r\n")
        connection.recv(1)

    peer = serve(loads, loads, answers)
    link = RedisLink(peer.url, on_connect=lambda: None, script_names=())
    link.register(hub)
    replies: list[Any] = []
    link.call("GET", "wanted", then=replies.append, repeat=True)
    run(hub, link, lambda: replies)
    assert replies == [b"body"]
    assert peer.connections == 3
    link.close()


def test_a_connection_that_dies_while_it_is_made_is_made_again(serve: Callable[..., Peer], hub: Hub) -> None:
    def hangs_up(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def answers(connection: socket.socket) -> None:
        read_until(connection, b"wanted")
        connection.sendall(b"+first\r\n+second\r\n")
        connection.recv(1)

    peer = serve(hangs_up, hangs_up, answers)
    replies: list[Any] = []

    def on_connect() -> None:
        link.call("HELLO", then=lambda reply: None if isinstance(reply, LinkLostError) else replies.append(reply))

    link = RedisLink(peer.url, on_connect=on_connect, script_names=())
    link.call("GET", "wanted", then=replies.append, repeat=True)
    link.register(hub)
    run(hub, link, lambda: len(replies) == 2)
    assert replies == [b"first", b"second"]
    assert peer.connections == 3
    link.close()


def test_a_large_backlog_that_goes_out_slowly_is_not_silence(serve: Callable[..., Peer], hub: Hub) -> None:
    size = 24 << 20

    def reads_slowly(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        left, pause = size, threading.Event()
        while left > 0:
            left -= len(connection.recv(1 << 18))
            pause.wait(0.01)
        connection.sendall(b"+done\r\n")
        connection.recv(1)

    peer = serve(reads_slowly)
    link = RedisLink(peer.url, on_connect=lambda: None, script_names=())
    link.register(hub)
    replies: list[Any] = []
    link.call("SET", "k", b"x" * size, then=replies.append)
    run(hub, link, lambda: replies, 30)
    assert replies == [b"done"]
    link.close()


def test_a_peer_that_takes_everything_and_says_nothing_is_given_up(serve: Callable[..., Peer], hub: Hub) -> None:
    def swallows(connection: socket.socket) -> None:
        while connection.recv(1 << 16):
            pass

    peer = serve(swallows)
    link = RedisLink(peer.url, on_connect=lambda: None, script_names=())
    link.register(hub)
    replies: list[Any] = []
    link.call("GET", "first", then=replies.append)

    def keep_asking() -> object:
        link.call("GET", "more")
        return replies

    run(hub, link, keep_asking, 5 * SILENT_S + 5)
    assert isinstance(replies[0], LinkLostError)
    link.close()
