"""No worker lives where a request goes: what each kind of caller is told, what is recorded, and how it ends."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from tasks import names
from tasks.client import FarmClient
from tasks.demand import LIFE_S
from tests.live import LiveFarm, fake_spec
from tests.services import RedisServer, wait_until
from tests.standin import ASYNC_QUEUE, QUEUE, StandIn, vector_of
from tests.web import Web, start_web, stop_web

PLACE = "default.cpu"
NEWER = {"X-SIE-SDK-Version": "0.10.1"}


@pytest.fixture(scope="module")
def web(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    """A web tier that forgets its workers at once."""
    web = start_web(redis_server.url, tmp_path_factory.mktemp("web"), WORKER_GRACE_S="0", WORKER_START_S="40")
    yield web
    stop_web(web)


@pytest.fixture
def store(redis_url: str) -> Iterator["redis.Redis"]:
    with redis.Redis.from_url(redis_url) as store:
        yield store


def refused(web: Web) -> httpx.Response:
    """The first refusal after the web tier has forgotten the worker of the test before."""
    found: list[httpx.Response] = []

    def is_refused() -> bool:
        found.append(web.encode("x", headers={**NEWER, "X-Farmhand-Timeout": "0.05"}))
        return found[-1].status_code == 503

    wait_until(is_refused, 10, "no worker to be known")
    return found[-1]


def test_a_newer_sdk_is_refused_with_a_code(web: Web, client: FarmClient, store: Any) -> None:
    answer = refused(web)
    error = answer.json()["error"]
    assert (answer.headers["X-SIE-Error-Code"], error["code"]) == ("PROVISIONING", "PROVISIONING")
    assert answer.headers["Retry-After"] == "40"
    assert (error["machine_profile"], error["pool"], error["estimated_wait_s"]) == ("cpu", "default", 40)
    assert not store.exists(names.OPEN, QUEUE)
    (found,) = client.demands()
    assert (found.pool, found.machine_profile, found.model, found.asked) == ("default", "cpu", "org/m", 1)
    assert found.since == pytest.approx(found.last, abs=0.001)


@pytest.mark.parametrize(
    ("version", "status"),
    [
        (None, 202),
        ("0.3.1", 202),
        ("0.9.12", 202),
        ("0.10.0", 503),
        ("0.11.0.dev1", 503),
        ("1.0.0", 503),
        ("main", 503),
    ],
)
def test_each_generation_of_clients_gets_what_it_knows(
    web: Web, client: FarmClient, version: str | None, status: int
) -> None:
    refused(web)
    headers = {} if version is None else {"X-SIE-SDK-Version": version}
    answer = web.encode("x", headers=headers)
    assert answer.status_code == status
    assert 30 <= int(answer.headers["Retry-After"]) <= 40
    if status == 202:
        body = answer.json()
        assert (body["status"], body["gpu"], body["bundle"]) == ("provisioning", "cpu", "default")
        assert body["estimated_wait_s"] == pytest.approx(int(answer.headers["Retry-After"]), abs=1)
        assert "pool 'default'" in body["message"]
    assert client.demands()[0].asked == 2


def test_other_routes_say_it_in_their_own_words(web: Web, client: FarmClient) -> None:
    refused(web)
    http = web.http
    ranked = http.post("/v1/score/org/rank", json={"query": {"text": "q"}, "items": [{"text": "a"}]})
    assert (ranked.status_code, ranked.json()["status"]) == (202, "provisioning")
    openai = http.post("/v1/embeddings", json={"model": "org/m", "input": "x"})
    error = openai.json()["error"]
    assert (openai.status_code, error["code"], error["type"]) == (503, "PROVISIONING", "overloaded_error")
    rerank = http.post("/v1/rerank", json={"model": "org/rank", "query": "q", "documents": ["a"]})
    assert (rerank.status_code, rerank.json()["error"]["code"]) == (503, "PROVISIONING")
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["x"]}
    v2 = http.post("/v2/models/org/m/infer", json={"inputs": [tensor]})
    assert (v2.status_code, type(v2.json()["error"])) == (503, str)
    assert all(int(one.headers["Retry-After"]) >= 1 for one in (ranked, openai, rerank, v2))
    (found,) = client.demands()
    assert (found.asked, found.model) == (5, "org/m")


def test_an_asynchronous_request_is_queued_and_served_when_a_worker_comes(
    web: Web, client: FarmClient, redis_url: str, store: Any
) -> None:
    refused(web)
    accepted = web.encode("later", headers={"Prefer": "respond-async"})
    assert (accepted.status_code, accepted.json()["state"]) == (202, "queued")
    assert 30 <= int(accepted.headers["Retry-After"]) <= 40
    assert store.llen(ASYNC_QUEUE) == 1
    assert client.demands()[0].asked == 2
    standin = StandIn(redis_url).start()
    shown = web.http.get(accepted.headers["Location"], params={"wait": 10}).json()
    assert shown["result"]["items"][0]["dense"]["values"] == vector_of("later")
    assert "Retry-After" not in web.encode("x", headers={"Prefer": "respond-async"}).headers
    standin.stop()
    standin.redis.close()


def test_the_retry_is_as_the_last_start_was(web: Web, store: Any) -> None:
    store.hset(names.START_TIMES, PLACE, "7.2")
    assert refused(web).headers["Retry-After"] == "8"
    began = float(store.hget(names.demand(PLACE), "since"))
    store.hset(names.demand(PLACE), "since", began - 2)
    assert web.encode("x", headers=NEWER).headers["Retry-After"] in ("5", "6")
    store.hset(names.demand(PLACE), "since", began - 100)
    assert web.encode("x", headers=NEWER).headers["Retry-After"] == "5"
    store.hset(names.START_TIMES, PLACE, "600")
    answer = web.encode("x")
    assert answer.headers["Retry-After"] == "60"
    assert 480 < answer.json()["estimated_wait_s"] < 501


def test_a_demand_ends_when_nobody_asks_any_more(web: Web, client: FarmClient, store: Any) -> None:
    refused(web)
    assert 0 < store.ttl(names.demand(PLACE)) <= LIFE_S
    store.zadd(names.DEMANDS, {PLACE: client.demands()[0].last - LIFE_S - 1})
    assert client.demands() == []


def test_a_worker_that_fell_silent_is_waited_for(redis_url: str, tmp_path: Path) -> None:
    """A restart is a delay: nobody is sent away in the time that it takes."""
    web, standin = start_web(redis_url, tmp_path), StandIn(redis_url).tell()
    assert web.encode("x", headers={"X-Farmhand-Timeout": "0.05"}).status_code == 504
    standin.fall_silent()
    wait_until(lambda: web.http.get("/readyz").status_code == 503, 5, "the farm to be without workers")
    standin.redis.delete(QUEUE)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(web.encode, "meanwhile")
        wait_until(lambda: standin.redis.llen(QUEUE) == 1, 5, "the request to be queued")
        standin.answer(standin.take())
        assert waiting.result(10).status_code == 200
    assert standin.redis.exists(names.DEMANDS) == 0
    stop_web(web)
    standin.redis.close()


def test_redis_away_is_no_missing_worker(own_redis: RedisServer, tmp_path: Path) -> None:
    web = start_web(own_redis.url, tmp_path)
    assert refused(web).json()["error"]["code"] == "PROVISIONING"
    own_redis.kill()
    answer = web.encode("x")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "QUEUE_UNAVAILABLE")
    stop_web(web)


def test_a_worker_that_is_ready_has_met_the_demand(
    redis_url: str, database_url: str, tmp_path: Path, client: FarmClient, store: Any
) -> None:
    farm = LiveFarm(redis_url, database_url, tmp_path)
    farm.add_models(fake_spec("org/m"))
    for _ in range(2):
        client.record_demand(pool="default", machine_profile="cpu", model="org/m", default_start_s=1)
    client.record_demand(pool="default", machine_profile="l4", model="org/m", default_start_s=1)
    since = {one.machine_profile: one.since for one in client.demands()}
    began = since["cpu"] - 100
    store.hset(names.demand(PLACE), "since", began)
    farm.start_worker()
    wait_until(lambda: len(client.demands()) == 1, 10, "the demand to be met")
    assert client.demands()[0].machine_profile == "l4"
    assert not store.exists(names.demand(PLACE)), "the next demand would seem to have begun with this one"
    took = float(store.hget(names.START_TIMES, PLACE))
    assert 100 < took < 200
    farm.close()


def test_a_start_without_demand_is_measured_once(redis_url: str, database_url: str, tmp_path: Path, store: Any) -> None:
    farm = LiveFarm(redis_url, database_url, tmp_path)
    farm.start_worker()
    wait_until(lambda: store.hexists(names.START_TIMES, PLACE), 10, "the start to be measured")
    assert 0 < float(store.hget(names.START_TIMES, PLACE)) < 60
    store.hset(names.START_TIMES, PLACE, "77")
    farm.start_worker()
    wait_until(lambda: "worker_ready" in farm.workers[-1].tail(), 10, "the second worker to be ready")
    assert store.hget(names.START_TIMES, PLACE) == b"77"
    farm.close()
