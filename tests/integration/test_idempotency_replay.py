"""What stands under an idempotency key comes back whatever the config says of its model by then: a real web tier."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx
import msgspec
import pytest
from sqlalchemy.orm import Session

from common.errors import CapacityError
from config_db import keys, tenants
from config_db.access import TenantSpec
from config_db.engine import open_engine
from config_db.spec import Access, ModelSpec
from tests.fakes.family import PLACE
from tests.integration.test_idempotency import answers
from tests.live import LiveFarm, fake_spec
from tests.services import PostgresServer, RedisServer, wait_until
from tests.standin import QUEUE, StandIn
from tests.web import Web, start_web, stop_web

WHO: Any = {"actor": "test", "reason": "test"}
MODEL, STAYS = "org/m", "org/stays"
ENCODE = (f"/v1/encode/{MODEL}", {"items": [{"text": "a"}]})
ROUTES = [
    ENCODE,
    ("/v1/embeddings", {"model": MODEL, "input": "a"}),
    (f"/v2/models/{MODEL}/infer", {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}),
]


@dataclass
class Shop:
    """A farm with two tenants, whose models come and go; the test plays its worker."""

    farm: LiveFarm
    web: Web
    keys: dict[str, keys.NewKey]
    numbers: Iterator[int] = field(default_factory=count)

    def post(self, path: str, body: Any, *, key: str | None, tenant: str = "acme", **headers: str) -> httpx.Response:
        sent = {"Authorization": f"Bearer {self.keys[tenant].key}", **headers}
        if key is not None:
            sent["Idempotency-Key"] = key
        return self.web.http.post(path, json=body, headers=sent)

    def serve(self, *specs: ModelSpec) -> None:
        """Serve these models and no others, from now on."""
        self.farm.replace_models(*specs)
        wait_until(lambda: self.web.http.get("/readyz").json().get("epoch", 0) >= self.farm.epoch, 10, "the new epoch")

    def new_key(self) -> str:
        return f"order-{next(self.numbers)}"


@pytest.fixture(scope="module")
def shop(
    redis_server: RedisServer, postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Shop]:
    directory = tmp_path_factory.mktemp("replay")
    farm = LiveFarm(redis_server.url, postgres_server.fresh_database(), directory)
    farm.add_models(fake_spec(MODEL), fake_spec(STAYS))
    engine = open_engine(farm.database_url)
    with Session(engine) as session, session.begin():
        for tenant in ("acme", "other"):
            tenants.put(session, tenant, TenantSpec(), **WHO)
        made = {tenant: keys.create(session, tenant=tenant, **WHO) for tenant in ("acme", "other")}
    engine.dispose()
    settings = {"DATABASE_URL": farm.database_url, "EXTRA_FAMILIES": f"fake={PLACE}", "AUTH": "keys"}
    web = start_web(farm.redis_url, directory, (), CONFIG_POLL_S="0.2", **settings)
    yield Shop(farm, web, made)
    stop_web(web)
    farm.close()


@pytest.fixture(autouse=True)
def standin(shop: Shop) -> Iterator[StandIn]:
    standin = StandIn(shop.farm.redis_url).start()
    yield standin
    standin.stop()
    standin.redis.close()
    shop.serve(fake_spec(MODEL), fake_spec(STAYS))


def test_the_outcome_comes_back_when_the_model_is_gone(shop: Shop) -> None:
    asked = [(path, body, shop.new_key()) for path, body in ROUTES]
    first = [answers(shop.post(path, body, key=key)) for path, body, key in asked]
    assert [said[:2] for said in first] == [(200, None)] * len(ROUTES)
    shop.serve(fake_spec(STAYS))
    for (path, body, key), (_, _, said) in zip(asked, first, strict=True):
        assert answers(shop.post(path, body, key=key)) == (200, "true", said)
        assert shop.post(path, body, key=None).status_code == 404
        assert shop.post(path, body, key=shop.new_key()).status_code == 404
        assert shop.post(path, body, key=key, tenant="other").status_code == 404
        assert shop.post(path, {**body, "id": "another"}, key=key).status_code == 422


def test_a_task_is_found_and_waited_for_when_its_model_is_gone(shop: Shop, standin: StandIn) -> None:
    standin.stop()
    key, later = shop.new_key(), {"Prefer": "respond-async"}
    task = shop.post(*ENCODE, key=key, **later)
    taken = standin.take()
    shop.serve(fake_spec(STAYS))
    again = shop.post(*ENCODE, key=key, **later)
    assert (again.status_code, again.headers["Idempotency-Replayed"]) == (202, "true")
    assert again.json()["task_id"] == task.json()["task_id"]
    late = shop.post(*ENCODE, key=key, **{"X-Farmhand-Timeout": "nonsense"})
    assert (late.status_code, late.json()["error"]["param"]) == (400, "X-Farmhand-Timeout")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(shop.post, *ENCODE, key=key)
        wait_until(lambda: standin.redis.pubsub_channels("celery-task-meta-*"), 10, "it to wait for the task")
        standin.answer(taken)
        assert answers(waiting.result(15))[:2] == (200, "true")


def test_a_tenant_that_lost_its_model_keeps_what_was_computed_for_it(shop: Shop) -> None:
    key = shop.new_key()
    first = answers(shop.post(*ENCODE, key=key))
    taken_away = msgspec.structs.replace(fake_spec(MODEL), access=Access(tenants=("other",)))
    shop.serve(taken_away, fake_spec(STAYS))
    assert answers(shop.post(*ENCODE, key=key)) == (200, "true", first[2])
    assert shop.post(*ENCODE, key=None).status_code == 404
    assert answers(shop.post(*ENCODE, key=key, tenant="other"))[:2] == (200, None)


def test_what_is_not_kept_is_asked_for_anew_and_passes_the_checks_of_today(shop: Shop, standin: StandIn) -> None:
    standin.stop()
    key = shop.new_key()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(shop.post, *ENCODE, key=key)
        standin.answer(standin.take(), error=CapacityError("no room"))
        assert waiting.result(15).status_code == 503
    shop.serve(fake_spec(STAYS))
    assert shop.post(*ENCODE, key=key).status_code == 404
    assert not standin.redis.llen(QUEUE)


def test_without_a_worker_what_stands_comes_back_and_nothing_else(shop: Shop) -> None:
    elsewhere = {"X-Farmhand-Lane": "batch"}  # a queue that the stand-in does not serve
    key = shop.new_key()
    assert shop.post(*ENCODE, key=key).status_code == 200
    assert answers(shop.post(*ENCODE, key=key, **elsewhere))[:2] == (200, "true")
    assert shop.post(*ENCODE, key=shop.new_key(), **elsewhere).status_code in (202, 503)


def test_who_may_not_come_in_gets_nothing(shop: Shop) -> None:
    """The last of this file: it takes a key away."""
    key = shop.new_key()
    assert shop.post(*ENCODE, key=key).status_code == 200
    engine = open_engine(shop.farm.database_url)
    with Session(engine) as session, session.begin():
        keys.revoke(session, shop.keys["acme"].id, **WHO)
    engine.dispose()
    wait_until(lambda: shop.post(*ENCODE, key=key).status_code == 401, 10, "the key to be revoked")
