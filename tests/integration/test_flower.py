"""Flower and Celery's own tools, given plain ``redis://``, see the workers and the tasks of a farm."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from celery import Celery

from cli.farm import FLOWER_CONFIG
from tests.live import FAKE, LiveFarm, LiveWorker
from tests.services import ROOT, free_port, wait_until


@pytest.fixture
def worker(live: LiveFarm) -> LiveWorker:
    """Named before `flower`, which warns of each question that nobody has answered."""
    return live.start_worker()


@pytest.fixture
def flower(live: LiveFarm) -> Iterator[httpx.Client]:
    port = free_port()
    command = [sys.executable, "-m", "celery", f"--broker={live.redis_url}", "flower", "--address=127.0.0.1"]
    command.append(f"--conf={FLOWER_CONFIG}")
    with (live.directory / "flower.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--port={port}"], cwd=ROOT, stdout=log, stderr=log)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:

        def is_up() -> bool:
            with suppress(httpx.TransportError):
                return client.get("/healthcheck").status_code == 200
            return False

        wait_until(is_up, 20, "Flower to answer")
        yield client
    process.terminate()
    process.wait(10)


def searched(flower: httpx.Client, what: str) -> list[dict[str, Any]]:
    """The tasks that Flower's own page would show for this search."""
    asked = {"search[value]": what, "order[0][column]": 0, "columns[0][data]": "name", "order[0][dir]": "asc"}
    answer = flower.get("/tasks/datatable", params={"draw": 1, "start": 0, "length": 10, **asked})
    found: list[dict[str, Any]] = answer.raise_for_status().json()["data"]
    return found


def test_flower_shows_the_worker_and_the_life_of_a_task(
    live: LiveFarm, worker: LiveWorker, flower: httpx.Client
) -> None:
    def shown() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = flower.get("/workers", params={"json": 1}).json()["data"]
        return [one for one in found if one["hostname"].startswith(worker.name) and one["status"]]

    wait_until(shown, 20, "Flower to show the worker")
    good, bad = live.send("x"), live.send("!raise")
    live.wait_outcomes([good, bad])
    for task, state in ((good, "SUCCESS"), (bad, "FAILURE")):
        wait_until(lambda task=task, state=state: state in flower.get(f"/task/{task}").text, 15, f"the task as {state}")
    wait_until(lambda: shown()[0].get("task-succeeded") == 1, 15, "the worker's count")
    assert {one["uuid"] for one in searched(flower, f"args:{FAKE}")} == {good, bad}
    assert not searched(flower, "args:fake/other")
    assert 'data-column="args"' in flower.get("/tasks").text
    about = [one["hostname"] for one in shown()]
    wait_until(lambda: flower.get(f"/worker/{about[0]}").status_code == 200, 15, "the worker's own page")
    assert "Inspect method" not in (live.directory / "flower.log").read_text()


def test_whoever_has_the_broker_alone_may_ask_the_workers(live: LiveFarm, worker: LiveWorker) -> None:
    done = live.send("x")
    live.wait_outcomes([done])
    with Celery(broker=live.redis_url, set_as_current=False) as stranger:
        ask = stranger.control.inspect(timeout=5, limit=1)
        (name,) = ask.ping()
        assert name.startswith(worker.name)
        for method in ("stats", "active", "reserved", "registered", "conf", "active_queues"):
            answer = getattr(ask, method)()
            assert set(answer) == {name}, method
            assert "error" not in answer[name], (method, answer)
    said = subprocess.run(
        [sys.executable, "-m", "celery", "-b", live.redis_url, "inspect", "ping", "--timeout=5"],
        cwd=live.directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (said.returncode, "pong" in said.stdout) == (0, True), said.stderr
