"""A live farm that is asked for more than it can, whose limits change, and whose web process is killed."""

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any

import httpx
import msgspec
import psutil
import pytest
from sqlalchemy.orm import Session

from config_db import tenants
from config_db.access import Quotas, TenantSpec
from config_db.engine import open_engine
from config_db.spec import Limits
from tasks import names
from tests.live import LiveFarm, fake_spec
from tests.services import PostgresServer, RedisServer, wait_until
from tests.web import Web, start_web_of, stop_web

WHO: Any = {"actor": "test", "reason": "test"}
ITEM_MS = 40
DEADLINE_S = 1.6
SLOW = "fake/slow"
"""A host serves 25 of its requests a second."""


@pytest.fixture(scope="module")
def live(
    redis_server: RedisServer, postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveFarm]:
    farm = LiveFarm(redis_server.url, postgres_server.fresh_database(), tmp_path_factory.mktemp("overload"))
    farm.add_models(fake_spec(SLOW, item_ms=ITEM_MS), fake_spec("fake/bounded"))
    farm.start_worker(batch_max_items=8)
    yield farm
    farm.close()


def start(live: LiveFarm) -> Web:
    return start_web_of(live, CONFIG_POLL_S="0.2")


@pytest.fixture(scope="module")
def web(live: LiveFarm) -> Iterator[Web]:
    web = start(live)
    wait_until(lambda: web.http.get("/readyz").status_code == 200, 10, "the farm to be ready")
    yield web
    stop_web(web)


def ask(web: Web, text: str, *, model: str = SLOW, **headers: str) -> httpx.Response:
    return web.http.post(f"/v1/encode/{model}", json={"items": [{"text": text}]}, headers=headers, timeout=30)


def measured(live: LiveFarm) -> dict[str, float]:
    (told,) = (one for one in live.incarnations().values() if one["alive"])
    return {name: told[name] for name in ("computed_s", "late_s")}


def test_a_farm_asked_for_three_times_what_it_can_serves_in_time_what_it_takes(live: LiveFarm, web: Web) -> None:
    url = f"http://127.0.0.1:{web.port}/v1/encode/{SLOW}"
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=200)
    body, headers = {"items": [{"text": "x"}]}, {"X-Deadline-Ms": str(DEADLINE_S * 1000)}

    with httpx.Client(limits=limits, timeout=30) as http, ThreadPoolExecutor(160) as pool:

        def flood(enough: Any) -> list[httpx.Response]:
            """75 requests a second, each answered or refused, until the answers say that it is enough."""
            asked, tick, until = [], threading.Event(), monotonic() + 20
            while not enough([one.result() for one in asked if one.done()]) and monotonic() < until:
                asked.append(pool.submit(http.post, url, json=body, headers=headers))
                tick.wait(1 / 75)
            return [one.result() for one in asked]

        flood(lambda seen: any(one.status_code == 503 for one in seen))  # until the pace is known
        before = measured(live)
        seen = flood(lambda seen: len(seen) > 250)
    count = Counter(one.status_code for one in seen)
    assert set(count) <= {200, 503, 504}
    for one in seen:
        if one.status_code == 503:
            assert one.json()["error"]["code"] == "QUEUE_FULL"
            assert one.json()["error"]["limit"] == "wait"
            assert int(one.headers["Retry-After"]) >= 1
    assert count[503] > 100
    assert count[200] > 30
    assert count[504] <= count[200] / 4
    live.assert_settled()
    wait_until(lambda: not live.redis.keys(f"{names.OPEN}:*"), 10, "no slot to be held")
    wait_until(lambda: measured(live)["computed_s"] > before["computed_s"], 10, "the worker to tell")
    after = measured(live)
    assert after["late_s"] - before["late_s"] <= (after["computed_s"] - before["computed_s"]) / 10


def test_a_killed_web_process_leaks_no_slot(live: LiveFarm) -> None:
    other = start(live)
    with ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(ask, other, f"!sleep:{0.3}") for _ in range(5)]
        queue = names.OPEN_BY_QUEUE + "farm.default.cpu.interactive"
        wait_until(lambda: live.redis.zcard(queue) == 5, 10, "five to be admitted")
        for process in (*psutil.Process(other.process.pid).children(recursive=True), other.process):
            process.kill()
        other.process.wait(10)
        assert all(isinstance(one.exception(), httpx.TransportError) for one in asked)
    other.http.close()
    wait_until(lambda: not live.redis.keys(f"{names.OPEN}*"), 10, "the worker to give every slot back")


def test_limits_follow_the_epoch(live: LiveFarm, web: Web) -> None:
    """Of a model, then of a tenant: each holds from an epoch on, and no longer than until the next."""
    spec = live.specs["fake/bounded"]

    def submit(**headers: str) -> httpx.Response:
        return ask(web, "!sleep:0.2", model=spec.id, Prefer="respond-async", **headers)

    def refused(**headers: str) -> Any:
        return submit(**headers).json().get("error")

    live.add_models(msgspec.structs.replace(spec, limits=Limits(queue_limit=1, max_concurrency=1)))
    wait_until(refused, 10, "the model to be bounded")
    error = refused()
    while error is None:
        error = refused()
    assert (error["code"], error["limit"]) == ("QUEUE_FULL", "model")
    live.add_models(spec)
    wait_until(lambda: all(submit().status_code == 202 for _ in range(4)), 10, "the model to be unbounded")
    engine = open_engine(live.database_url)

    def put(quotas: Quotas, **rest: Any) -> None:
        with Session(engine) as session, session.begin():
            tenants.put(session, "default", TenantSpec(quotas=quotas, **rest), **WHO)

    put(Quotas(in_flight=1))
    wait_until(lambda: (refused() or {}).get("limit") == "tenant", 10, "the tenant to be bounded")
    put(Quotas(tokens_per_minute=1))
    wait_until(lambda: (refused() or {}).get("limit") == "tokens_per_minute", 10, "its tokens to be counted")
    response = submit()
    assert (response.status_code, response.headers["X-SIE-Error-Code"]) == (429, "RATE_LIMIT")
    assert int(response.headers["Retry-After"]) >= 1
    put(Quotas(), latency_classes=("batch",))
    wait_until(lambda: not refused(), 10, "the tenant to be unbounded")
    wait_until(lambda: (refused(**{"X-Priority": "interactive"}) or {}).get("code") == "FORBIDDEN", 10, "its classes")
    put(Quotas())
    engine.dispose()
    live.assert_settled()


@pytest.mark.parametrize("asked", ["0", "-5", "x", "nan", "1e99"])
def test_a_deadline_that_is_none_is_refused(web: Web, asked: str) -> None:
    error = ask(web, "x", **{"X-Deadline-Ms": asked}).json()["error"]
    assert (error["code"], error["param"]) == ("INVALID_INPUT", "X-Deadline-Ms")
