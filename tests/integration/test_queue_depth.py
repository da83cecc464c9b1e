"""How many requests wait for each model, as ``/health`` and ``/ws/cluster-status`` say: over HTTP, on a real Redis."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from config_db.spec import Profile
from tasks import names
from tasks.app import build_app
from tasks.client import FarmClient
from tasks.names import Lane, queue_name
from tests.fakes.family import PLACE
from tests.integration.test_client import call_for
from tests.integration.test_cluster_status import Watcher, heard
from tests.integration.test_settling import LONG_AGO_S, now
from tests.live import POOL, PROFILE, LiveFarm, fake_spec
from tests.services import PostgresServer, RedisServer, wait_until
from tests.standin import QUEUE, StandIn
from tests.web import Web, start_web_of, stop_web

LASTS_MS = 40_000
"""Longer than its test."""


@pytest.fixture(scope="module")
def farm(
    redis_server: RedisServer, postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveFarm]:
    farm = LiveFarm(redis_server.url, postgres_server.fresh_database(), tmp_path_factory.mktemp("depth"))
    with_profile = msgspec.structs.replace(fake_spec("org/m"), profiles={"short": Profile()})
    farm.add_models(with_profile, fake_spec("org/other"), fake_spec("org/slow", batch_ms=LASTS_MS))
    yield farm
    farm.close()


@pytest.fixture(scope="module")
def web(farm: LiveFarm) -> Iterator[Web]:
    web = start_web_of(farm, EXTRA_FAMILIES=f"fake={PLACE}")
    yield web
    stop_web(web)


def depths(web: Web) -> dict[str, int]:
    return {model["name"]: model["total_queue_depth"] for model in web.http.get("/health").json()["models"]}


def test_what_is_open_and_has_not_begun_is_counted_by_model(web: Web, farm: LiveFarm) -> None:
    """Of every model, limited or not; a profile counts as its model, and what is overdue not at all."""
    client = FarmClient(farm.redis_url, queue_limit=10, result_ttl_s=60)
    standin, call = StandIn(farm.redis_url).tell(machine_profile="cpu"), call_for("a")
    assert depths(web) == {"org/m": 0, "org/m:short": 0, "org/other": 0, "org/slow": 0}
    lost = client.submit(call)
    for one in (call, replace(call, model="org/m:short"), replace(call, model="org/other")):
        client.submit(one)
    wait_until(lambda: depths(web)["org/other"] == 1, 10, "the requests to be seen")
    assert depths(web) == {"org/m": 3, "org/m:short": 3, "org/other": 1, "org/slow": 0}
    standin.tell(machine_profile="cpu", running={"org/m": 1, "org/other": 2})  # it told before one of these ended
    wait_until(lambda: depths(web)["org/m"] == 2, 10, "what runs to be left out")
    assert depths(web)["org/other"] == 0
    long_ago = now(standin.redis) - LONG_AGO_S
    standin.redis.zadd(names.slots("org/m", "default", QUEUE)[0], {lost: long_ago}, xx=True)
    wait_until(lambda: depths(web)["org/m"] == 1, 10, "what is overdue to be left out")
    with closing(Watcher.connect(f"ws://127.0.0.1:{web.port}/ws/cluster-status")) as watcher:
        assert {model["name"]: model["total_queue_depth"] for model in heard(watcher)["models"]} == depths(web)
    assert standin.answer(*(standin.take() for _ in range(4))) == [1] * 4
    standin.tell(machine_profile="cpu")
    wait_until(lambda: set(depths(web).values()) == {0}, 10, "all to be answered")
    standin.fall_silent()
    standin.redis.hdel(names.INCARNATIONS, standin.incarnation)
    standin.redis.close()
    client.close()


def test_a_worker_tells_what_its_hosts_have(web: Web, farm: LiveFarm) -> None:
    """A request counts once, whatever it was cut into; a plain producer's neither waits here nor runs."""
    worker = farm.start_worker(batch_max_items=4)
    producer: Any = build_app(farm.redis_url, farm_transport="redis", pool=POOL, machine_profile=PROFILE)
    items = [{"text": str(at)} for at in range(4)]
    with closing(producer):
        queue = queue_name(POOL, PROFILE, Lane.INTERACTIVE)
        producer.send_task("farm.encode", args=("org/slow", {"items": items}), queue=queue)
    wait_until(lambda: worker.started() == 1, 20, "the plain producer's to run")
    farm.send(*(str(at) for at in range(6)), model="org/slow")
    wait_until(lambda: worker.started() == 2, 20, "a part of the long one to be at the host")
    farm.send_many(["a", "b", "c"], model="org/slow")
    wait_until(lambda: depths(web)["org/slow"] == 3, 10, "the worker to have told what has begun")
    worker.process.kill()
    worker.process.wait(10)
    wait_until(lambda: depths(web)["org/slow"] == 4, 20, "it to be missed: what it ran waits again")
