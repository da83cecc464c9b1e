"""``farmhand up`` as its operator has it: real servers, a real worker, the real model."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import redis

from cli import local_farm
from cli.demo import demo_directory
from cli.servers import PostgresServer
from common.errors import SetupError
from tasks import names
from tests.e2e.farms import UpFarm, farmhand
from tests.services import free_port, wait_until

TEXTS = ["The farmhand carries the water.", "Ein zweiter Satz, auf Deutsch, mit etwas mehr Wörtern darin.", "x"]
LONG = "the farm carries water to the field and back " * 28
REFERENCE = """
import json, sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
json.dump(model.encode(json.loads(sys.argv[2]), normalize_embeddings=True).tolist(), sys.stdout)
"""
COSINE = 0.9995
"""What the farm promises of its default precision on a processor with bfloat16."""

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module", autouse=True)
def _needs_the_demo() -> None:
    try:
        demo_directory()
    except SetupError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(error.message)


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpFarm]:
    """One farm for all tests that leave it running."""
    up = UpFarm(tmp_path_factory.mktemp("farm"))
    try:
        yield up.wait_ready()
        up.stop()
    finally:
        up.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., UpFarm]]:
    """Farms of the test's own, all on one data directory."""
    started: list[UpFarm] = []

    def make(*words: str, port: int | None = None) -> UpFarm:
        started.append(UpFarm(tmp_path, *words, port=port))
        return started[-1]

    yield make
    for up in started:
        up.close()


def test_it_shows_a_real_answer_and_how_to_repeat_it(farm: UpFarm) -> None:
    said = farm.said()
    assert "(384 numbers)" in said
    assert f"http://127.0.0.1:{farm.flower_port}" in said
    (again,) = [line for line in said.splitlines() if line.startswith("again:")]
    shown = subprocess.run(["bash", "-c", again.removeprefix("again:")], capture_output=True, text=True, check=True)
    assert len(json.loads(shown.stdout)["items"][0]["dense"]["values"]) == 384


def test_its_vectors_are_those_of_sentence_transformers(farm: UpFarm) -> None:
    reference = subprocess.run(
        [sys.executable, "-c", REFERENCE, str(demo_directory()), json.dumps(TEXTS)],
        capture_output=True,
        text=True,
        check=True,
    )
    expected = np.array(json.loads(reference.stdout))
    status, answer = farm.encode(*TEXTS)
    assert status == 200
    found = np.array([item["dense"]["values"] for item in answer["items"]])
    assert found.shape == (3, 384)
    cosines = (found * expected).sum(axis=1) / np.linalg.norm(found, axis=1)
    assert cosines.min() >= COSINE
    assert np.abs(found - expected).max() < 0.01


def test_flower_comes_up_on_this_machine_only(farm: UpFarm) -> None:
    wait_until(lambda: _is_listening("127.0.0.1", farm.flower_port), 15, "Flower")
    listening = [
        one.laddr.ip for child in farm.family() for one in child.net_connections("inet") if one.status == "LISTEN"
    ]
    assert set(listening) == {"127.0.0.1"}


def test_a_second_farm_on_the_same_data_is_refused_in_one_line(farm: UpFarm) -> None:
    second = farmhand("up", "--data-dir", str(farm.data), "--port", str(free_port()), "--no-flower")
    assert second.returncode == 1
    assert second.stderr.count("\n") == 1
    assert f"pid {farm.process.pid}, http://127.0.0.1:{farm.port}" in second.stderr


def test_a_taken_port_is_refused_in_one_line(farm: UpFarm, tmp_path: Path) -> None:
    second = farmhand("up", "--data-dir", str(tmp_path / "other"), "--port", str(farm.port), "--no-flower")
    assert second.returncode == 1
    assert second.stderr == f"error: port {farm.port} of 127.0.0.1 is taken: choose another with --port\n"


@pytest.mark.parametrize("victim", ["worker", "redis", "postgres", "web"])
def test_a_child_that_is_killed_comes_back_and_the_farm_serves(farm: UpFarm, victim: str) -> None:
    child = _child(farm, victim)
    child.kill()
    wait_until(lambda: f"(pid {child.pid}) was ended by SIGKILL" in farm.said(), 20, "the line that says so")
    wait_until(lambda: _child_or_none(farm, victim) is not None, 10, f"another {victim}")
    assert _child(farm, victim).pid != child.pid
    wait_until(lambda: _answers(farm), 20, "an answer again")


def test_async_results_outlive_a_stop_and_a_killed_supervisor(start: Callable[..., UpFarm]) -> None:
    first = start("--no-flower").wait_ready()
    status, accepted = first.encode("keep this", Prefer="respond-async")
    assert status == 202
    status, kept = first.call("GET", f"/v1/tasks/{accepted['task_id']}?wait=20")
    assert kept["state"] == "succeeded"
    first.stop(signal.SIGINT)

    second = start("--no-flower").wait_ready()
    assert second.call("GET", f"/v1/tasks/{accepted['task_id']}")[1]["result"] == kept["result"]
    family = second.family()
    second.process.kill()
    third = start("--no-flower", port=second.port).wait_ready()  # at once: it waits for what is left of the second
    _, alive = psutil.wait_procs(family, timeout=2)
    assert not alive, f"outlived the killed supervisor: {alive}"
    assert third.call("GET", f"/v1/tasks/{accepted['task_id']}")[1]["result"] == kept["result"]
    third.stop()


def test_sigterm_under_load_leaves_no_caller_without_an_answer(start: Callable[..., UpFarm]) -> None:
    """What runs is answered, what waits is told to try again, and nothing of it is left in the queues."""
    farm = start("--no-flower", "--hosts", "1").wait_ready()
    with redis.Redis.from_url(local_farm.redis_url(farm.data)) as client, ThreadPoolExecutor(24) as pool:
        waiting = [pool.submit(farm.encode, *[LONG] * 64) for _ in range(24)]
        wait_until(lambda: client.zcard(names.OPEN) == len(waiting), 10, "all requests to be under way")
        assert not any(one.done() for one in waiting), "the requests are too small: nothing waits"
        farm.stop()
        answers = [one.result(10) for one in waiting]
    assert {status for status, _ in answers} <= {200, 503}
    refused = [answer for status, answer in answers if status == 503]
    assert refused, "everything was answered: the test proves nothing"
    assert {answer["error"]["code"] for answer in refused} == {"QUEUE_UNAVAILABLE"}


def test_a_signal_during_the_start_leaves_nothing(start: Callable[..., UpFarm]) -> None:
    up = start("--no-flower")
    wait_until(lambda: (up.data / "children.json").exists() and len(up.family()) > 2, 10, "the first children")
    up.stop(signal.SIGINT)


def test_postgres_data_of_another_release_are_one_line(start: Callable[..., UpFarm], tmp_path: Path) -> None:
    server = PostgresServer(tmp_path / "farm" / "postgres", free_port())
    server.prepare()
    (server.directory / "data" / "PG_VERSION").write_text("9\n")
    up = start("--no-flower")
    assert up.process.wait(20) == 1
    assert len(up.said().splitlines()) == 1
    assert "error: postgres ended with status" in up.said()
    assert "incompatible" in up.said()


@pytest.mark.parametrize(
    ("setting", "url", "name"),
    [
        ("FARMHAND_DATABASE_URL", "postgresql://nobody@127.0.0.1:{port}/none", "PostgreSQL"),
        ("FARMHAND_REDIS_URL", "redis://127.0.0.1:{port}/0", "Redis"),
    ],
)
def test_a_server_of_ones_own_that_does_not_answer_is_one_line(
    tmp_path: Path, setting: str, url: str, name: str
) -> None:
    up = UpFarm(tmp_path, "--no-flower", **{setting: url.format(port=free_port())})
    try:
        assert up.process.wait(20) == 1
        (refusal,) = [line for line in up.said().splitlines() if not line.startswith("  ...")]
        assert refusal.startswith(f"error: {name} does not answer")
        assert setting in refusal
    finally:
        up.close()


def test_a_misspelt_setting_is_one_line(tmp_path: Path) -> None:
    refused = farmhand("up", "--data-dir", str(tmp_path / "farm"), FARMHAND_REDIS_ULR="redis://x")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "FARMHAND_REDIS_ULR" in refused.stderr


def _child(farm: UpFarm, name: str) -> psutil.Process:
    found = _child_or_none(farm, name)
    assert found is not None, f"there is no {name}"
    return found


def _child_or_none(farm: UpFarm, name: str) -> psutil.Process | None:
    word = {"worker": "workers.app", "redis": "redis-server", "postgres": "postgres", "web": "gunicorn"}[name]
    for child in psutil.Process(farm.process.pid).children():
        with suppress(psutil.Error):  # it may end while it is looked at
            words = child.cmdline()
            if any(word in (one, Path(one.split(" ")[0]).name) for one in words):
                return child
    return None


def _answers(farm: UpFarm) -> bool:
    try:
        status, _ = farm.encode("again")
    except OSError:
        return False
    return status == 200


def _is_listening(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0
