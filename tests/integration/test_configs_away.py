"""PostgreSQL is away, or frozen: what a snapshot can answer goes on, the rest is told within seconds."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import psutil
import psycopg
import pytest

from tests.services import PostgresServer, wait_until
from tests.web import Web, start_web, stop_web

MODELS = "/v1/configs/models"
MODEL = {"id": "org/m", "family": "dense", "source": {"hub": "org/m"}}
READS = (
    MODELS,
    f"{MODELS}/org/m",
    f"{MODELS}/org/m/status",
    "/v1/configs/epoch",
    "/v1/configs/export",
    "/v1/configs/status",
    "/v1/configs/bundles",
    "/v1/configs/schema",
    "/v1/models/org/m",
)
WITHIN_S = 5.0


@pytest.fixture
def web(redis_url: str, own_postgres: PostgresServer, tmp_path: Path) -> Iterator[Web]:
    web = start_web(redis_url, tmp_path, (), DATABASE_URL=own_postgres.fresh_database(), CONFIG_POLL_S="0.2")
    assert web.http.post(MODELS, json=MODEL).status_code == 201
    yield web
    stop_web(web)


def writes(web: Web) -> list[httpx.Response]:
    """Every route that needs the database."""
    asked: list[tuple[str, str, Any]] = [
        ("POST", MODELS, {**MODEL, "id": "org/new"}),
        ("PUT", f"{MODELS}/org/m", MODEL),
        ("PATCH", f"{MODELS}/org/m", {"max_length": 5}),
        ("DELETE", f"{MODELS}/org/m", None),
        ("POST", "/v1/configs/rollback", {"epoch": 1}),
        ("GET", "/v1/configs/history", None),
        ("GET", "/v1/configs/diff?from=1", None),
    ]
    answers: list[httpx.Response] = []

    def ask(method: str, path: str, body: Any) -> None:
        started = monotonic()
        answers.append(httpx.request(method, f"http://127.0.0.1:{web.port}{path}", json=body, timeout=30))
        assert monotonic() - started < WITHIN_S

    threads = [threading.Thread(target=ask, args=one) for one in asked]
    started = monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert monotonic() - started < WITHIN_S
    assert len(answers) == len(asked)
    return answers


def check_refused(answers: list[httpx.Response]) -> None:
    for answer in answers:
        assert answer.status_code == 503, answer.text
        assert answer.json()["error"]["code"] == answer.headers["X-SIE-Error-Code"] == "CONFIG_UNAVAILABLE"
        assert answer.json()["detail"]["error"] == "registry_unavailable"
        assert int(answer.headers["Retry-After"]) > 0


def check_tells_no_secret(answers: list[httpx.Response], server: PostgresServer) -> None:
    """Anybody may read an answer; the log has the rest."""
    for answer in answers:
        for secret in (str(server.port), "127.0.0.1", "psycopg", "connection"):
            assert secret not in answer.text


def check_reads(web: Web) -> float:
    """Seconds that the slowest takes."""
    worst = 0.0
    for method, path in (*(("GET", path) for path in READS), ("POST", "/v1/configs/resolve")):
        started = monotonic()
        answer = web.http.request(method, path, json={"model": "org/m"} if method == "POST" else None)
        worst = max(worst, monotonic() - started)
        assert answer.status_code == 200, path
    return worst


def test_postgres_is_down_and_comes_back(web: Web, own_postgres: PostgresServer) -> None:
    own_postgres.stop()
    refusals = writes(web)
    check_refused(refusals)
    check_tells_no_secret(refusals, own_postgres)
    check_reads(web)
    wait_until(lambda: config_db_is(web, "away"), 20, "the loss to be noticed")
    refused = web.http.post(MODELS, json={"id": "bad id"})
    assert refused.status_code == 400  # a bad document is told as such
    own_postgres.start()
    wait_until(lambda: web.http.patch(f"{MODELS}/org/m", json={"max_length": 9}).status_code == 200, 10, "a write")
    assert "max_length: 9" in web.http.get(f"{MODELS}/org/m").text


def test_a_frozen_postgres_holds_up_no_request_but_the_writes(web: Web, own_postgres: PostgresServer) -> None:
    """It takes connections and says nothing. Others are answered in the meantime, each at once."""
    pids = _processes(own_postgres)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        answers: list[httpx.Response] = []
        writing = threading.Thread(target=lambda: answers.extend(writes(web)))
        writing.start()
        worst = 0.0
        while writing.is_alive():
            worst = max(worst, check_reads(web))
        writing.join()
        check_refused(answers)
        assert worst < 0.5
        wait_until(lambda: config_db_is(web, "away"), 20, "the silence to be noticed")
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    wait_until(lambda: web.http.patch(f"{MODELS}/org/m", json={"max_length": 9}).status_code == 200, 10, "a write")
    wait_until(lambda: config_db_is(web, "connected"), 10, "the next poll")


def test_a_postgres_that_is_read_only_takes_no_write(
    redis_url: str, own_postgres: PostgresServer, tmp_path: Path
) -> None:
    """As a standby is, after a failover: what can be read is served, and writers come again later."""
    url = own_postgres.fresh_database()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f'alter database "{connection.info.dbname}" set default_transaction_read_only = on')
    web = start_web(redis_url, tmp_path, (), DATABASE_URL=url)
    answer = web.http.post(MODELS, json=MODEL)
    check_refused([answer])
    check_tells_no_secret([answer], own_postgres)
    assert web.http.get(MODELS).status_code == 200
    assert config_db_is(web, "connected")
    stop_web(web)


def config_db_is(web: Web, state: str) -> bool:
    return bool(web.http.get("/v1/configs/status").json()["config_db"] == state)


def _processes(server: PostgresServer) -> list[int]:

    postmaster = psutil.Process(server.pid)
    return [postmaster.pid, *(child.pid for child in postmaster.children(recursive=True))]
