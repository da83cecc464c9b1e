"""The public SIE SDK, unmodified and in an environment of its own, against a whole farm that asks for keys."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from sqlalchemy.orm import Session

from config_db import keys
from config_db.engine import open_engine
from config_db.spec import Limits
from tasks import names
from tests.fakes.family import PLACE, fake_score, fake_vector
from tests.live import LiveFarm, fake_spec
from tests.services import ROOT, PostgresServer, RedisServer, wait_until
from tests.web import start_web, stop_web

PYTHON = ROOT / "build" / "sdk" / "bin" / "python"


@pytest.fixture(scope="module", params=["sync", "async"])
def said(
    request: Any, redis_server: RedisServer, postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What each call of the SDK came back with."""
    if not PYTHON.exists():
        assert not os.environ.get("CI"), "`make test` installs the SDK"
        pytest.skip("the SDK is not installed: `make test` does that")
    with redis_server.client() as client:  # the worker of the former parameter is not to be known
        client.flushall()
    directory: Path = tmp_path_factory.mktemp("sdk")
    farm = LiveFarm(redis_server.url, postgres_server.fresh_database(), directory)
    ranks = msgspec.structs.replace(fake_spec("org/rank"), operations=("score",), outputs=("score",))
    slow = msgspec.structs.replace(fake_spec("org/slow", load_ms=1500), limits=Limits(timeout_s=0.5))
    farm.add_models(fake_spec("org/m"), ranks, slow)
    engine = open_engine(farm.database_url)
    with Session(engine) as session, session.begin():
        key = keys.create(session, tenant="default", scopes=("infer", "pools"), actor="test", reason="test")
    engine.dispose()
    farm.redis.hset(names.START_TIMES, names.pool_queue("default", "cpu"), "2")
    settings = {"DATABASE_URL": farm.database_url, "EXTRA_FAMILIES": f"fake={PLACE}", "AUTH": "keys"}
    web = start_web(redis_server.url, directory, (), **settings)
    command = [str(PYTHON), "tests/sdk/calls.py", request.param, f"http://127.0.0.1:{web.port}", key.key]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as sdk:
        wait_until(lambda: int(_asked(farm) or 0) == 2, 60, "the SDK to find no worker, and to wait for one")
        farm.start_worker(ready=False)
        out, err = sdk.communicate(timeout=100)
    stop_web(web)
    farm.close()
    assert sdk.returncode == 0, err[-2000:]
    found = json.loads(out)
    assert found["version"] == "0.10.1"
    answers: dict[str, Any] = found["answers"]
    return answers


def _asked(farm: LiveFarm) -> Any:
    return farm.redis.hget(names.demand(names.pool_queue("default", "cpu")), "asked")


def test_it_waits_through_a_scale_from_zero(said: dict[str, Any]) -> None:
    refused = said["encode without a worker"]["error"]
    assert refused["kind"] == "ProvisioningError"
    assert np.allclose(said["encode from zero"]["result"]["dense"], fake_vector("one"), atol=1e-6)
    nothing = said["capacity of nothing"]["result"]
    assert (nothing["status"], nothing["worker_count"], nothing["workers"]) == ("no_workers", 0, [])
    assert nothing["configured_gpu_types"] == ["cpu"]
    assert said["wait in vain"]["error"]["kind"] == "ProvisioningError"


def test_it_waits_for_a_model_that_loads(said: dict[str, Any]) -> None:
    """The model takes longer to load than a request may wait, so the SDK was told MODEL_LOADING and came back."""
    assert np.allclose(said["encode while it loads"]["result"]["dense"], fake_vector("one"), atol=1e-6)


def test_it_sees_the_farm(said: dict[str, Any]) -> None:
    for call in ("capacity", "capacity of cpu", "wait for capacity", "wait for a model"):
        found = said[call]["result"]
        assert (found["status"], found["worker_count"], found["live_gpu_types"]) == ("healthy", 1, ["cpu"]), call
        assert (found["workers"][0]["gpu"], found["workers"][0]["healthy"]) == ("cpu", True)
    assert said["capacity"]["result"]["workers"][0]["memory_used_bytes"] > 0
    assert "org/m" in said["capacity"]["result"]["workers"][0]["loaded_models"]
    assert said["capacity of l4"]["result"]["worker_count"] == 0
    for call in ("watch", "watch the cluster"):
        status = said[call]["result"]
        assert status["cluster"]["worker_count"] == 1
        told = {model["name"]: model for model in status["models"]}
        assert (told["org/m"]["state"], told["org/m"]["total_queue_depth"]) == ("loaded", 0)
    assert (
        said["watch one worker"]["error"]["kind"] == "RequestError"
    )  # the handshake is refused: there is no such route


ABSENT = (
    "generate",
    "chat",
    "respond",
    "stream generate",
    "stream chat",
    "estimate",
    "recommend",
    "make a job",
    "jobs",
    "job",
    "files",
    "file",
    "batches",
    "make a batch",
)


@pytest.mark.parametrize("call", ABSENT)
def test_what_is_not_there_says_so_at_once(said: dict[str, Any], call: str) -> None:
    error = said[call]["error"]
    assert (error["kind"], error["code"], error["status"]) == ("ServerError", "NOT_IMPLEMENTED", 501)


def test_its_vectors_are_the_models(said: dict[str, Any]) -> None:
    one = said["encode one"]["result"]
    assert one["id"] == "a"
    assert np.allclose(one["dense"], fake_vector("one"), atol=1e-6)
    assert one["request"]["usage"]["input_tokens"] > 0
    many = said["encode many"]["result"]
    assert np.allclose([item["dense"] for item in many], [fake_vector("one"), fake_vector("two")], atol=1e-6)
    assert said["encode as a query"]["result"]["dense"] == one["dense"]
    assert max(map(abs, said["encode in int8"]["result"]["dense"])) == 127


def test_its_scores_are_the_models(said: dict[str, Any]) -> None:
    expected = sorted([(fake_score("q", "one"), "x"), (fake_score("q", "two"), "item-1")], reverse=True)
    found = said["score"]["result"]["scores"]
    assert [(one["item_id"], one["rank"]) for one in found] == [(name, at) for at, (_, name) in enumerate(expected)]
    assert np.allclose([one["score"] for one in found], [score for score, _ in expected])


def test_it_reads_what_is_served(said: dict[str, Any]) -> None:
    assert {model["name"] for model in said["models"]["result"]} == {"org/m", "org/rank", "org/slow"}
    assert said["model"]["result"]["dims"] == {"dense": 4}


def test_it_reads_errors(said: dict[str, Any]) -> None:
    for call, code, status in (
        ("unknown model", "MODEL_NOT_FOUND", 404),
        ("wrong output", "INVALID_INPUT", 400),
        ("model that there is not", "MODEL_NOT_FOUND", 404),
    ):
        error = said[call]["error"]
        assert (error["kind"], error["code"], error["status"]) == ("RequestError", code, status)


def test_its_pools_have_workers_and_a_lease_that_it_renews(said: dict[str, Any]) -> None:
    assert "error" not in said["create a pool"]
    assert said["encode in the pool"]["result"]["dense"] == said["encode one"]["result"]["dense"]
    pool = said["pool"]["result"]
    assert (pool["name"], pool["spec"]["gpus"], pool["status"]["state"]) == ("eval", {"cpu": 1}, "active")
    assert [worker["gpu"] for worker in pool["status"]["assigned_workers"]] == ["cpu"]
    grown = said["pool that has grown"]["result"]
    assert (grown["spec"]["gpus"], grown["status"]["state"]) == ({"cpu": 2}, "pending")
    assert grown["status"]["created_at"] == pool["status"]["created_at"]
    assert any(line.startswith("Renewed lease") for line in said["lease"]["result"])
    assert not any("ailed" in line for line in said["lease"]["result"])
    assert (said["delete the pool"]["result"], said["delete it again"]["result"]) == (True, False)
    assert said["pool that there is not"]["result"] is None
    error = said["create a pool of nothing"]["error"]
    assert error["kind"] == "PoolError"
    assert "no machine here has the profile 'tpu'" in error["text"]
