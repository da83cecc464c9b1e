"""Flower, given plain ``redis://``, shows the workers and the tasks of a farm."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from tests.live import ROOT, LiveFarm
from tests.services import free_port, wait_until


@pytest.fixture
def flower(live: LiveFarm) -> Iterator[httpx.Client]:
    port = free_port()
    command = [sys.executable, "-m", "celery", f"--broker={live.redis_url}", "flower", "--address=127.0.0.1"]
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


def test_flower_shows_the_worker_and_the_life_of_a_task(live: LiveFarm, flower: httpx.Client) -> None:
    worker = live.start_worker()

    def shown() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = flower.get("/workers", params={"json": 1}).json()["data"]
        return [one for one in found if one["hostname"].startswith(worker.name) and one["status"]]

    wait_until(shown, 20, "Flower to show the worker")
    good, bad = live.send("x"), live.send("!raise")
    live.wait_outcomes([good, bad])
    for task, state in ((good, "SUCCESS"), (bad, "FAILURE")):
        wait_until(lambda task=task, state=state: state in flower.get(f"/task/{task}").text, 15, f"the task as {state}")
    wait_until(lambda: shown()[0].get("task-succeeded") == 1, 15, "the worker's count")
