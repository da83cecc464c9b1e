"""Pools as clients have them: a real web tier that asks for keys, a real config DB, three real workers."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from sqlalchemy.orm import Session

from config_db import keys, pools, tenants
from config_db.access import PoolSpec, TenantSpec
from config_db.engine import open_engine
from config_db.publish import live
from config_db.spec import ModelSpec, Placement
from tasks.names import LANES, Lane, queue_name
from tests.fakes.family import PLACE
from tests.live import LiveFarm, LiveWorker, fake_spec
from tests.services import PostgresServer, RedisServer, wait_until
from tests.web import Web, start_web, stop_web

WHO: Any = {"actor": "test", "reason": "test"}
MODEL, ELSEWHERE, BESIDE = "org/m", "org/elsewhere", "org/beside"
BODY = {"items": [{"text": "one"}]}
MOVES_S = 20
"""A heartbeat's life, the looks after it, and a loaded machine."""


@dataclass
class Client:
    """Somebody with a key."""

    http: httpx.Client
    key: str

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        sent = {
            "Authorization": f"Bearer {self.key}",
            **{name.replace("_", "-"): said for name, said in headers.items()},
        }
        return self.http.request(method, path, json=body, headers=sent)

    def create(self, name: str, **rest: Any) -> httpx.Response:
        return self.ask("POST", "/v1/pools", {"name": name, **rest})

    def get(self, name: str) -> httpx.Response:
        return self.ask("GET", f"/v1/pools/{name}")

    def delete(self, name: str) -> httpx.Response:
        return self.ask("DELETE", f"/v1/pools/{name}")

    def encode(self, model: str = MODEL, **headers: str) -> httpx.Response:
        return self.ask("POST", f"/v1/encode/{model}", BODY, **headers)

    def state(self, name: str) -> str:
        return str(self.get(name).json()["status"]["state"])

    def served_by(self, name: str) -> set[str]:
        return {worker["name"] for worker in self.get(name).json()["status"]["assigned_workers"]}


@dataclass
class Shop:
    """The farm, its API, and its clients: two of one tenant, of whom one may not make pools, and one of another."""

    farm: LiveFarm
    web: Web
    acme: Client
    reader: Client
    other: Client

    def reserved(self) -> list[LiveWorker]:
        """The live workers that consume no shared queue."""
        shared = queue_name("default", "cpu", Lane.INTERACTIVE)
        pids = [told["pid"] for told in self.told() if shared not in told["queues"]]
        return [worker for worker in self.farm.workers if worker.process.pid in pids]

    def told(self) -> list[dict[str, Any]]:
        return [told for told in self.farm.incarnations().values() if told["alive"]]


@pytest.fixture(scope="module")
def shop(
    redis_server: RedisServer, postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shop]:
    directory: Path = tmp_path_factory.mktemp("pools")
    farm = LiveFarm(redis_server.url, postgres_server.fresh_database(), directory)
    farm.add_models(
        fake_spec(MODEL),
        _placed(ELSEWHERE, "l4", "a100"),
        _placed(BESIDE, "l4", "cpu"),
    )
    made: dict[str, str] = {}
    engine = open_engine(farm.database_url)
    with Session(engine) as session, session.begin():
        for tenant in ("acme", "other"):
            tenants.put(session, tenant, TenantSpec(), **WHO)
        for name, tenant, scopes in (
            ("acme", "acme", ("infer", "pools")),
            ("reader", "acme", ("infer",)),
            ("other", "other", ("infer", "pools")),
        ):
            made[name] = keys.create(session, tenant=tenant, scopes=scopes, **WHO).key
        pools.create(session, "operators", PoolSpec(machine_profiles={"h100": 1}), **WHO)
    engine.dispose()
    for _ in range(3):
        farm.start_worker(ready=False)
    web = start_web(
        farm.redis_url, directory, (), DATABASE_URL=farm.database_url, EXTRA_FAMILIES=f"fake={PLACE}", AUTH="keys"
    )
    for worker in farm.workers:
        wait_until(worker.is_ready, 40, "a worker to be ready")
    yield Shop(farm, web, *(Client(web.http, made[name]) for name in ("acme", "reader", "other")))
    stop_web(web)
    farm.close()


@pytest.fixture(autouse=True)
def no_pools_left(shop: Shop) -> Iterator[None]:
    """Every worker is shared again after each test."""
    yield
    for client in (shop.acme, shop.other):
        for pool in client.ask("GET", "/v1/pools").json()["pools"]:
            if pool["status"]["expires_at"] is not None:
                client.delete(pool["name"])
    wait_until(lambda: not shop.reserved(), MOVES_S, "every worker to be shared")


def _placed(model: str, *machine_profiles: str) -> ModelSpec:
    return msgspec.structs.replace(fake_spec(model), placement=Placement(machine_profiles=machine_profiles))


def code(response: httpx.Response) -> tuple[int, str | None]:
    return response.status_code, response.json()["error"].get("param")


def test_a_pool_has_workers_of_its_own_while_its_lease_runs(shop: Shop) -> None:
    made = shop.acme.create("Eval", gpus={"CPU": 1}, gpu_caps={"cpu": 2}, bundle="default", minimum_worker_count=1)
    assert made.status_code == 201
    assert made.json()["name"] == "eval"
    assert made.json()["spec"]["gpus"] == {"cpu": 1}
    wait_until(lambda: shop.acme.state("eval") == "active", MOVES_S, "the pool to have its worker")
    (worker,) = shop.reserved()
    assert len(shop.acme.served_by("eval")) == 1
    (told,) = [told for told in shop.told() if told["pid"] == worker.process.pid]
    assert sorted(told["queues"]) == sorted(queue_name("eval", "cpu", lane) for lane in LANES)
    for headers in (
        {"X_SIE_Pool": "eval"},
        {"X_SIE_Pool": "EVAL", "X_SIE_MACHINE_PROFILE": "cpu"},
        {"X_SIE_MACHINE_PROFILE": "eval/cpu"},
        {"X_SIE_MACHINE_PROFILE": "eval/"},
        {},
    ):
        assert shop.acme.encode(**headers).status_code == 200
    status = shop.acme.get("eval").json()["status"]
    assert status["expires_at"] - status["last_renewed"] == pytest.approx(1200)
    assert shop.acme.delete("eval").json() == {"name": "eval", "deleted": True}
    assert shop.acme.get("eval").status_code == 404
    assert code(shop.acme.delete("eval")) == (404, "pool")


def test_asking_again_updates_and_keeps_whom_it_has(shop: Shop) -> None:
    assert shop.acme.create("p").status_code == 201
    wait_until(lambda: shop.acme.state("p") == "active", MOVES_S, "one worker")
    first = shop.acme.served_by("p")
    created_at = shop.acme.get("p").json()["status"]["created_at"]
    again = shop.acme.create("p", gpus={"cpu": 1})
    assert (again.status_code, again.json()["status"]["state"]) == (200, "active")
    assert shop.acme.create("p", gpus={"cpu": 2}).json()["status"]["state"] == "pending"
    wait_until(lambda: shop.acme.state("p") == "active", MOVES_S, "two workers")
    assert first < shop.acme.served_by("p")
    assert shop.acme.get("p").json()["status"]["created_at"] == created_at
    assert shop.acme.ask("POST", "/v1/pools/p/renew", Content_Type="application/msgpack").status_code == 200


def test_a_tenant_sees_and_touches_its_own_pools_only(shop: Shop) -> None:
    assert shop.acme.create("mine").status_code == 201
    assert [pool["name"] for pool in shop.acme.ask("GET", "/v1/pools").json()["pools"]] == ["mine", "operators"]
    assert [pool["name"] for pool in shop.other.ask("GET", "/v1/pools").json()["pools"]] == ["operators"]
    for refused in (
        shop.other.get("mine"),
        shop.other.delete("mine"),
        shop.other.ask("POST", "/v1/pools/mine/renew"),
        shop.other.encode(X_SIE_Pool="mine"),
        shop.reader.encode(X_SIE_Pool="nothing"),
    ):
        assert refused.status_code == 404
    taken = shop.other.create("mine")
    assert taken.status_code == 409
    assert taken.json()["detail"]["message"]
    for refused in (
        shop.reader.create("of-reader"),
        shop.reader.delete("mine"),
        shop.acme.delete("operators"),
        shop.acme.create("operators"),
        shop.acme.create("default"),
        shop.acme.delete("default"),
    ):
        assert refused.status_code == 403
    assert shop.reader.get("mine").status_code == 200


def test_a_request_that_names_a_new_pool_makes_it_for_who_may(shop: Shop) -> None:
    assert shop.reader.encode(X_SIE_Pool="lazy").status_code == 404
    wait_until(lambda: shop.acme.encode(X_SIE_Pool="lazy").status_code == 200, MOVES_S, "the new pool to serve")
    assert shop.acme.get("lazy").json()["spec"]["gpus"] == {"cpu": 1}
    assert shop.reader.encode(X_SIE_Pool="lazy").status_code == 200


def test_a_lease_that_nobody_renews_ends_and_is_swept(shop: Shop) -> None:
    assert shop.acme.create("short", ttl_seconds=4).status_code == 201
    wait_until(lambda: bool(shop.reserved()), MOVES_S, "the worker to be reserved")
    wait_until(lambda: shop.acme.get("short").status_code == 404, MOVES_S, "the lease to end")
    assert shop.reader.encode(X_SIE_Pool="short").status_code == 404
    wait_until(lambda: not shop.reserved(), MOVES_S, "the worker to be shared again")
    engine = open_engine(shop.farm.database_url)
    with Session(engine) as session:
        wait_until(lambda: "short" not in _rows(session), 30, "the row to be swept")
    engine.dispose()


def _rows(session: Session) -> dict[str, Any]:
    session.rollback()
    return live(session, "pool")


def test_what_waits_for_a_pool_that_goes_is_served_by_the_shared_workers(shop: Shop) -> None:
    assert shop.acme.create("all", gpus={"cpu": 3}).status_code == 201
    wait_until(lambda: shop.acme.state("all") == "active", MOVES_S, "the first pool to have everyone")
    assert shop.acme.create("late").status_code == 201
    queued = shop.acme.encode(X_SIE_Pool="late", Prefer="respond-async")
    assert queued.status_code == 202
    task = f"/v1/tasks/{queued.json()['task_id']}"
    assert shop.acme.state("late") == "pending"
    assert shop.farm.redis.llen(queue_name("late", "cpu", Lane.STANDARD)) == 1
    for name in ("late", "all"):
        assert shop.acme.delete(name).status_code == 200
    told = shop.acme.ask("GET", f"{task}?wait=30").json()
    assert told["state"] == "succeeded"
    assert not shop.farm.redis.llen(queue_name("late", "cpu", Lane.STANDARD))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": "../../etc"}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "a.b"}, "name"),
        ({"name": "a\r\nX-Evil: 1"}, "name"),
        ({"name": "a\n"}, "name"),
        ({"name": "x" * 65}, "name"),
        ({"name": ""}, "name"),
        ({"name": "p", "gpus": {}}, "gpus"),
        ({"name": "p", "gpus": {"cpu": 0}}, "gpus"),
        ({"name": "p", "gpus": {"cpu": 10**30}}, "gpus"),
        ({"name": "p", "gpus": {"c/u": 1}}, "gpus"),
        ({"name": "p", "gpus": {"cpu": 2}, "gpu_caps": {"cpu": 1}}, "gpu_caps"),
        ({"name": "p", "gpus": {"cpu": 1}, "minimum_worker_count": 2}, "minimum_worker_count"),
        ({"name": "p", "bundle": "other"}, "bundle"),
        ({"name": "p", "queue_pool": "other"}, "queue_pool"),
        ({"name": "p", "pinned_models": ["org/m"]}, "pinned_models"),
        ({"name": "p", "ttl_seconds": 1e300}, "ttl_seconds"),
    ],
)
def test_a_pool_that_cannot_be_is_refused_with_the_field(shop: Shop, body: dict[str, Any], param: str) -> None:
    status, said = code(shop.acme.ask("POST", "/v1/pools", body))
    assert (status, str(said).partition(".")[0]) == (400, param)


def test_a_machine_profile_that_is_nowhere_is_refused_with_those_that_are(shop: Shop) -> None:
    known = ["a100", "cpu", "h100", "l4"]
    refused = shop.acme.create("p", gpus={"tpu": 1})
    assert code(refused) == (400, "gpus")
    assert refused.json()["error"]["machine_profiles"] == known
    refused = shop.acme.encode(X_SIE_MACHINE_PROFILE="tpu")
    assert code(refused) == (400, "X-SIE-MACHINE-PROFILE")
    assert refused.json()["error"]["machine_profiles"] == known
    assert shop.acme.encode(X_SIE_MACHINE_PROFILE="CPU").status_code == 200


@pytest.mark.parametrize("asked", ["../../etc", "a" * 5000, "a.b", "-a", "a b", "a\tb", "\xe4"])
def test_what_can_be_no_pool_is_refused_in_the_header(shop: Shop, asked: str) -> None:
    response = shop.web.http.post(
        f"/v1/encode/{MODEL}",
        json=BODY,
        headers=[(b"Authorization", f"Bearer {shop.acme.key}".encode()), (b"X-SIE-Pool", asked.encode("latin-1"))],
    )
    assert code(response) == (400, "X-SIE-Pool")


def test_a_model_runs_where_its_placement_says(shop: Shop) -> None:
    timeout = {"X_Farmhand_Timeout": "0.2", "Prefer": "respond-async"}
    assert shop.acme.encode(ELSEWHERE, **timeout).status_code == 202
    assert shop.farm.redis.llen(queue_name("default", "l4", Lane.STANDARD)) == 1
    assert code(shop.acme.encode(ELSEWHERE, X_SIE_MACHINE_PROFILE="cpu")) == (400, "X-SIE-MACHINE-PROFILE")
    assert shop.acme.encode(BESIDE).status_code == 200
    assert code(shop.acme.encode(ELSEWHERE, X_SIE_Pool="operators")) == (400, "X-SIE-Pool")
    assert code(shop.acme.encode(X_SIE_Pool="operators", X_SIE_MACHINE_PROFILE="cpu")) == (400, "X-SIE-MACHINE-PROFILE")


def test_a_killed_worker_is_replaced_and_then_the_pool_is_pending(shop: Shop) -> None:
    """The last of this file: it leaves one worker."""
    assert shop.acme.create("p", gpus={"cpu": 2}).status_code == 201
    wait_until(lambda: shop.acme.state("p") == "active", MOVES_S, "two workers")
    ends: tuple[Callable[[LiveWorker], object], ...] = (lambda worker: worker.signal(signal.SIGKILL), LiveWorker.stop)
    for end, state in zip(ends, ("active", "pending"), strict=True):
        before, ended = shop.acme.served_by("p"), shop.reserved()[0]
        name = next(told["node"] for told in shop.told() if told["pid"] == ended.process.pid)
        end(ended)
        wait_until(partial(_is_without, shop, name), MOVES_S, "the dead worker to be missed")
        wait_until(partial(_is, shop, state), MOVES_S, f"the pool to be {state}")
        assert before - {name} <= shop.acme.served_by("p")
        assert shop.acme.encode(X_SIE_Pool="p").status_code == 200


def _is(shop: Shop, state: str) -> bool:
    return shop.acme.state("p") == state


def _is_without(shop: Shop, name: str) -> bool:
    return name not in shop.acme.served_by("p")
