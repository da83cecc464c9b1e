"""``farmhand config apply --wait`` beside a real web process that lags."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from config_db.epochs import epoch_now
from config_db.publish import Put
from tasks.client import FarmClient
from tests.config_writes import Backup, write
from tests.e2e.farms import farmhand
from tests.live import LiveFarm, fake_spec
from tests.services import wait_until
from tests.web import Web, start_web, stop_web


@pytest.fixture
def servers(redis_url: str, database_url: str) -> dict[str, str]:
    return {"FARMHAND_REDIS_URL": redis_url, "FARMHAND_DATABASE_URL": database_url}


@pytest.fixture
def start(redis_url: str, database_url: str, tmp_path: Path, client: FarmClient) -> Iterator[Callable[[], Web]]:
    """Starts a real API, and returns it when it has told which epoch it serves."""
    started: list[Web] = []

    def make() -> Web:
        started.append(start_web(redis_url, tmp_path, (), DATABASE_URL=database_url))
        wait_until(client.web_processes, 20, "the web process to tell of itself")
        return started[-1]

    yield make
    for one in started:
        stop_web(one)


@pytest.fixture
def web(start: Callable[[], Web]) -> Web:
    return start()


@pytest.fixture
def catalogue(tmp_path: Path) -> str:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.yaml").write_text("id: a/b\nfamily: dense\nsource: {hub: a/b}\n")
    return str(tmp_path / "models")


def test_it_returns_when_the_last_process_serves_the_epoch(
    web: Web, client: FarmClient, catalogue: str, servers: dict[str, str]
) -> None:
    (told,) = client.web_processes()
    frozen = psutil.Process(int(told.name.rpartition(":")[2]))
    frozen.send_signal(signal.SIGSTOP)
    try:
        late = farmhand("config", "apply", catalogue, "--wait", "--timeout", "0.5", **servers)
    finally:
        frozen.send_signal(signal.SIGCONT)
    assert late.returncode == 1
    assert f"web {told.name} at 1" in late.stderr
    assert "1 of 1 processes" in late.stderr
    assert "epoch 2: 1 added" in late.stdout, "it is published all the same"
    done = farmhand("config", "apply", catalogue, "--wait", **servers)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("epoch 2 is served by 1 live process\n")
    assert web.http.get("/v1/models/a/b").status_code == 200


@pytest.mark.parametrize("further", [0, 3], ids=["of a lower number", "written on past the old one"])
def test_after_a_restored_backup_all_read_it_whole_and_converge(
    live: LiveFarm, start: Callable[[], Web], engine: Engine, catalogue: str, servers: dict[str, str], further: int
) -> None:
    """The processes have never seen what the backup brings back, and hold what it never had."""
    live.replace_models(fake_spec("fake/kept", dim=4), fake_spec("fake/changed", dim=5))
    then = [live.specs[name] for name in ("fake/kept", "fake/changed")]
    backup = Backup(engine)
    live.replace_models(fake_spec("fake/changed", dim=9), fake_spec("fake/lost", dim=6))
    live.add_models(fake_spec("fake/lost", dim=7))
    live.start_worker()
    web = start()
    live.wait_outcomes([live.send("x", model=name) for name in ("fake/changed", "fake/lost")])
    backup.restore()
    for number in range(further):
        write(engine, Put("setting", f"further-{number}", {}))
    done = farmhand("config", "apply", catalogue, "--wait", **servers)
    assert (done.returncode, done.stderr) == (0, "")
    with Session(engine) as session:
        live.epoch, _ = epoch_now(session)
    assert done.stdout.endswith(f"epoch {live.epoch} is served by 2 live processes\n")
    status = web.http.get("/v1/configs/status").json()
    assert (status["converged"], {one["epoch"] for one in status["processes"]}) == (True, {live.epoch})
    served = {one["name"] for one in web.http.get("/v1/models").json()["models"]}
    assert served == {"fake/kept", "fake/changed", "a/b"}
    live.specs |= {spec.id: spec for spec in then}
    outcomes = live.wait_outcomes([live.send("x", model=spec.id) for spec in then])
    assert [outcome.error for outcome in outcomes] == [None, None]


def test_without_processes_there_is_nobody_to_wait_for(catalogue: str, servers: dict[str, str]) -> None:
    done = farmhand("config", "apply", catalogue, "--wait", **servers)
    assert done.stdout.endswith("epoch 2 is served by 0 live processes\n")


def test_without_redis_the_epoch_is_told_and_the_waiting_fails(catalogue: str, database_url: str) -> None:
    away = {"FARMHAND_DATABASE_URL": database_url, "FARMHAND_REDIS_URL": "redis://127.0.0.1:1/0"}
    done = farmhand("config", "apply", catalogue, "--wait", **away)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "Redis does not answer" in done.stderr
    assert "epoch 2: 1 added" in done.stdout
