"""Who runs which epoch, and what is told of models without asking the database: epoch, export, bundles, resolving."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import httpx
import pytest
import yaml

from tasks.client import FarmClient
from tests.services import wait_until
from tests.standin import StandIn
from tests.web import Web
from webapp.fleet import Fleet

MODELS = "/v1/configs/models"
DENSE = {"id": "org/m", "family": "dense", "source": {"hub": "org/m"}, "aliases": ["short"], "profiles": {"p": {}}}


@pytest.fixture(scope="module")
def web(config_web: Web) -> Web:
    assert config_web.http.post(MODELS, json=DENSE).status_code == 201
    return config_web


@pytest.fixture
def worker(redis_url: str) -> Iterator[StandIn]:
    standin = StandIn(redis_url)
    yield standin
    standin.redis.close()


def status(web: Web, **query: Any) -> Any:
    return web.http.get("/v1/configs/status", params=query).json()


def change(web: Web) -> dict[str, Any]:
    """Some new epoch."""
    length = yaml.safe_load(web.http.get(f"{MODELS}/org/m").text).get("max_length", 0) + 1
    changed: dict[str, Any] = web.http.patch(f"{MODELS}/org/m", json={"max_length": length}).json()
    return changed


def test_who_serves_which_epoch(web: Web, worker: StandIn) -> None:
    now = change(web)
    worker.tell(epoch=now["epoch"] - 1, epoch_id="some-earlier", machine_profile="cpu")
    seen = status(web, wait=0)
    assert (seen["epoch"], seen["epoch_id"]) == (now["epoch"], now["epoch_id"])
    assert not seen["converged"]
    assert seen["config_db"] == "connected"
    told = {process["name"]: process for process in seen["processes"] if process["kind"] == "worker"}
    assert told["stand-in"]["epoch"] == now["epoch"] - 1
    worker.tell(epoch=now["epoch"], epoch_id=now["epoch_id"], machine_profile="cpu")
    seen = status(web, wait=10)
    assert seen["converged"]
    assert {process["kind"] for process in seen["processes"]} == {"web", "worker"}
    assert {process["epoch_id"] for process in seen["processes"]} == {now["epoch_id"]}


def test_waiting_ends_when_all_have_converged_and_not_before(web: Web, worker: StandIn) -> None:
    now = change(web)
    worker.tell(epoch=now["epoch"] - 1, machine_profile="cpu")
    answered: list[Any] = []
    waiting = threading.Thread(target=lambda: answered.append(status(web, wait=30, epoch=now["epoch"])))
    waiting.start()
    waiting.join(0.5)
    assert not answered
    worker.tell(epoch=now["epoch"], machine_profile="cpu")
    waiting.join(10)
    assert answered[0]["converged"]
    assert not status(web, wait=1, epoch=now["epoch"] + 1)["converged"]


def test_however_many_wait_redis_is_asked_once_a_second(redis_url: str, worker: StandIn) -> None:
    worker.tell(epoch=1, machine_profile="cpu")
    client = FarmClient(redis_url, queue_limit=10, result_ttl_s=60)
    fleet, asked = Fleet(client), []
    try:
        with ThreadPoolExecutor(20) as pool:
            asked = list(pool.map(lambda _: fleet.epochs_lately(), range(100)))
        assert "stand-in" in {one.name for one in asked[0]}, (
            "beside the web process, which tells of itself when it likes"
        )
        assert all(one is asked[0] for one in asked), "one look, shared"
        worker.tell(epoch=2, machine_profile="cpu")
        wait_until(
            lambda: ("stand-in", 2) in {(one.name, one.epoch) for one in fleet.epochs_lately()}, 20, "the next look"
        )
    finally:
        client.close()


def test_the_status_of_a_model(web: Web, worker: StandIn) -> None:
    now = change(web)
    idle = web.http.get(f"{MODELS}/org/m/status").json()
    assert idle["bundles"][0]["total_eligible_workers"] == 0
    assert not idle["all_bundles_acked"]
    worker.tell(epoch=now["epoch"] - 1, machine_profile="cpu")
    late = web.http.get(f"{MODELS}/org/m/status").json()
    assert late["bundles"][0]["pending_workers"] == ["stand-in"]
    assert (late["model_id"], late["config_epoch"], late["source"]) == ("org/m", now["epoch"], "api")
    worker.tell(epoch=now["epoch"], machine_profile="cpu")
    acked = web.http.get(f"{MODELS}/org/m/status").json()
    bundle = acked["bundles"][0]
    assert (bundle["bundle_id"], bundle["acked_workers"], bundle["pending_workers"]) == ("default", ["stand-in"], [])
    assert acked["all_bundles_acked"]
    assert not acked["no_bundles"]
    assert web.http.get(f"{MODELS}/not/there/status").status_code == 404


def test_a_worker_that_may_not_run_the_model_need_not_have_read_it(web: Web, worker: StandIn) -> None:
    placed = {**DENSE, "id": "placed/m", "aliases": [], "placement": {"machine_profiles": ["l4"]}}
    now = web.http.put(f"{MODELS}/placed/m", json=placed).json()
    worker.tell(epoch=now["epoch"], machine_profile="cpu")
    assert web.http.get(f"{MODELS}/placed/m/status").json()["bundles"][0]["total_eligible_workers"] == 0


def test_the_epoch(web: Web) -> None:
    now = change(web)
    told = web.http.get("/v1/configs/epoch").json()
    assert (told["epoch"], told["epoch_id"]) == (now["epoch"], now["epoch_id"])
    assert int(told["bundles_hash"], 16)


def test_the_export_is_of_one_epoch_and_can_be_written_back(web: Web) -> None:
    export = web.http.get("/v1/configs/export").json()
    assert (export["snapshot_version"], export["epoch"]) == (1, web.http.get("/v1/configs/epoch").json()["epoch"])
    assert datetime.fromisoformat(export["generated_at"]).tzinfo is not None
    one = next(model for model in export["models"] if model["model_id"] == "org/m")
    assert one["affected_bundles"] == ["default"]
    assert yaml.safe_load(one["raw_yaml"]) == one["model_config"]
    for content in (one["raw_yaml"], one["model_config"]):
        body = {"content": content} if isinstance(content, str) else {"json": content}
        back = web.http.put(f"{MODELS}/org/m", **body)
        assert (back.status_code, back.json()["changed"]) == (200, False)


def test_bundles(web: Web) -> None:
    (bundle,) = web.http.get("/v1/configs/bundles").json()["bundles"]
    assert (bundle["bundle_id"], bundle["source"]) == ("default", "filesystem")
    shown = web.http.get("/v1/configs/bundles/default")
    assert shown.headers["content-type"] == "application/x-yaml"
    content = yaml.safe_load(shown.text)
    assert "dense" in content["adapters"]
    assert (content["name"], content["priority"]) == ("default", bundle["priority"])
    assert len(content["adapters"]) == bundle["adapter_count"]
    missing = web.http.get("/v1/configs/bundles/other")
    assert (missing.status_code, missing.json()["detail"]["error"]) == (404, "not_found")


@pytest.mark.parametrize("name", ["org/m", "short", "default:/org/m", "default:/short"])
def test_names_are_resolved(web: Web, name: str) -> None:
    found = web.http.post("/v1/configs/resolve", json={"model": name}).json()
    assert found["model"] == "org/m"
    assert (found["resolved_bundle"], found["compatible_bundles"]) == ("default", ["default"])
    assert found["profiles"] == ["default", "p"]


def resolve(web: Web, **body: Any) -> httpx.Response:
    return web.http.post("/v1/configs/resolve", json=body)


@pytest.mark.parametrize("key", ["model_id", "sie_id"])
def test_the_name_may_stand_where_an_id_does(web: Web, key: str) -> None:
    assert resolve(web, **{key: "short"}).json() == resolve(web, model="short").json()


def test_what_cannot_be_resolved(web: Web) -> None:
    missing = resolve(web, model="not/there").json()["detail"]
    assert (missing["error"], missing["model_id"]) == ("model_not_found", "not/there")
    for conflict in (resolve(web, model="org/m", bundle="other"), resolve(web, model="other:/org/m")):
        assert (conflict.status_code, conflict.json()["detail"]["compatible_bundles"]) == (409, ["default"])
        assert conflict.json()["detail"]["error"] == "bundle_conflict"
    assert resolve(web, model=3).json()["error"]["param"] == "model"
    refused = {"id": "refused/m", "family": "clip", "source": {"hub": "x"}, "unsupported": "needs code of its own"}
    web.http.post(MODELS, json=refused)
    answer = resolve(web, model="refused/m").json()
    assert (answer["resolved_bundle"], answer["compatible_bundles"]) == (None, [])
    assert "needs code" in answer["unsupported"]
