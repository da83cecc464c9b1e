"""Fixtures every test may ask for. Servers are real; a missing one skips on a laptop and fails in CI."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in a host, and before torch is imported: threads change the rounding

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from common.errors import SetupError
from tests.services import PostgresServer, RedisServer, end_what_is_left

Server = TypeVar("Server", RedisServer, PostgresServer)
MARKED_BY_FOLDER = {"integration": "integration", "e2e": "integration", "chaos": "chaos"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = Path(item.path).parent.name
        if folder in MARKED_BY_FOLDER:
            item.add_marker(getattr(pytest.mark, MARKED_BY_FOLDER[folder]))


def _serve(kind: Callable[[], Server]) -> Iterator[Server]:
    try:
        server = kind()
    except SetupError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(error.message)
    yield server
    server.remove()


@pytest.fixture(scope="module", autouse=True)
def nothing_outlives_its_file() -> Iterator[None]:
    """What a fixture had started when it failed would serve the next file's requests with a config of its own."""
    yield
    end_what_is_left()


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[RedisServer]:
    """One Redis for all tests that do not stop it."""
    yield from _serve(RedisServer)


@pytest.fixture(scope="module")
def redis_server(shared_redis: RedisServer) -> RedisServer:
    """The shared Redis, emptied for a file whose tests share a farm."""
    _empty(shared_redis)
    return shared_redis


def _empty(server: RedisServer) -> None:
    with server.client() as client:
        client.flushall()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The shared Redis, emptied."""
    _empty(redis_server)
    return redis_server.url


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A Redis that the test may stop, fill and kill."""
    yield from _serve(RedisServer)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One Postgres for all tests that do not stop it."""
    yield from _serve(PostgresServer)


@pytest.fixture
def database_url(postgres_server: PostgresServer) -> str:
    """A database of the test's own, at the newest migration."""
    return postgres_server.fresh_database()


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A Postgres that the test may stop."""
    yield from _serve(PostgresServer)
