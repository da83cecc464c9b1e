"""A change reaches every process, each tells which epoch it serves, and what was admitted before finishes as it was."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from redis import Redis
from sqlalchemy.orm import Session

from common.errors import QueueUnavailableError
from config_db import tenants
from config_db.access import TenantSpec
from config_db.convergence import Epoch
from config_db.engine import open_engine, transaction
from config_db.epochs import epoch_now, lock_epoch, raise_epoch
from config_db.publish import Delete, publish
from config_db.schema import ModelRow
from config_db.spec import ModelSpec, Profile, plain
from tasks import codec, names
from tasks.client import FarmClient
from tasks.messages import Outcome
from tasks.names import Lane, queue_name
from tests.config_writes import RARELY_S
from tests.live import FAKE, POOL, PROFILE, LiveFarm, LiveWorker, fake_spec
from tests.services import PostgresServer, RedisServer, wait_until
from tests.standin import StandIn
from tests.web import start_web, stop_web
from webapp.bundles import bundle_status
from webapp.fleet import Fleet, ProcessEpoch, has_converged


def epoch_of(worker: LiveWorker) -> int:
    told: int = worker.farm.incarnations()[worker.incarnation]["epoch"]
    return told


def wait_listening(worker: LiveWorker) -> None:
    wait_until(lambda: "epochs_heard" in worker.log.read_text(), 10, "the worker to listen")


def add_unheard(live: LiveFarm, spec: ModelSpec) -> None:
    """Publish a model without telling anybody."""
    engine = open_engine(live.database_url)
    with transaction(engine) as session:
        live.epoch = raise_epoch(session, lock_epoch(session), actor="test", reason="test")
        session.add(ModelRow(id=spec.id, spec=plain(spec), epoch=live.epoch))
    engine.dispose()
    live.specs[spec.id] = spec


def delete(live: LiveFarm, model: str) -> None:
    engine = open_engine(live.database_url)
    with transaction(engine) as session:
        live.epoch = publish(session, [Delete("model", model)], actor="test", reason="test").epoch
    engine.dispose()


def width(outcome: Outcome) -> int:
    outcome.raise_error()
    (item,) = msgspec.msgpack.decode(outcome.result)
    return len(codec.array_of(item["dense"]["values"]))


def test_everybody_tells_when_a_change_has_reached_them(
    live: LiveFarm, client: FarmClient, redis_url: str, database_url: str, tmp_path: Path
) -> None:
    live.start_worker(config_poll_s=RARELY_S)
    web = start_web(redis_url, tmp_path, (), DATABASE_URL=database_url, CONFIG_POLL_S=str(RARELY_S), WEB_PROCESSES="2")
    fleet, engine = Fleet(client), open_engine(database_url)
    wait_until(lambda: [one.kind for one in fleet.epochs()] == ["web", "web", "worker"], 10, "three processes")
    for number in range(3):
        live.add_models(fake_spec(f"fake/{number}"))
        wait_until(lambda: all(one.epoch == live.epoch for one in fleet.epochs()), 20, "all to have the change")
        with Session(engine) as session:
            epoch, epoch_id = epoch_now(session)
        processes = fleet.epochs()
        assert {(one.epoch, one.epoch_id, one.machine_profile) for one in processes} == {
            (epoch, str(epoch_id), PROFILE)
        }
        present = Epoch(epoch, str(epoch_id))
        assert has_converged(processes, present)
        assert not has_converged(processes, present, epoch + 1)
    assert len({one.name for one in fleet.epochs()}) == 3
    engine.dispose()
    stop_web(web)


def test_a_web_process_that_is_silent_does_not_count(client: FarmClient, redis_url: str) -> None:
    client.tell(machine_profile="cpu", epoch=3, epoch_id="x")
    now = client.clock.now()
    with Redis.from_url(redis_url) as redis:
        for name, told_at in (("gone", now - 111), ("silent", now - 11), ("living", now - 8)):
            redis.hset(names.WEB_PROCESSES, name, json.dumps({"name": name, "told_at": told_at}))
        redis.hset(names.WEB_PROCESSES, "strange", "{")
        found = client.web_processes()
        assert {one.name for one in found} - {"living"} == {one.name for one in found if one.epoch == 3}
        assert len(found) == 2
        kept = {key.decode() for key in redis.hkeys(names.WEB_PROCESSES)}
    assert "gone" not in kept, "whoever is long gone is forgotten"
    assert {"silent", "living", "strange"} <= kept, "who may be back, or tells what this release cannot read, is not"


def test_a_full_redis_still_learns_who_lives(own_redis: RedisServer) -> None:
    client = FarmClient(own_redis.url, queue_limit=10, result_ttl_s=60)
    with own_redis.client() as redis:
        redis.config_set("maxmemory", 1)
        for epoch in (1, 2):
            client.tell(machine_profile="cpu", epoch=epoch, epoch_id="x")
            assert [one.epoch for one in client.web_processes()] == [epoch]
    own_redis.stop()
    with pytest.raises(QueueUnavailableError):
        client.tell(machine_profile="cpu", epoch=3, epoch_id="x")
    client.close()


def process(epoch: int, epoch_id: str = "a") -> ProcessEpoch:
    return ProcessEpoch(kind="web", name="w", machine_profile="cpu", epoch=epoch, epoch_id=epoch_id)


@pytest.mark.parametrize(
    ("processes", "wanted", "expected"),
    [
        ([], None, True),
        ([process(5), process(5)], None, True),
        ([process(5), process(5, "")], None, True),
        ([process(5), process(4)], None, False),
        ([process(5), process(4)], 4, True),
        ([process(5), process(4)], 5, False),
        ([process(5)], 6, False),
        ([process(5), process(5, "of a history that is gone")], None, False),
        ([process(5), process(9, "of a history that is gone")], None, False),
        ([process(5), process(9, "of a history that is gone")], 3, False),
    ],
)
def test_all_have_converged_when_nobody_is_elsewhere(
    processes: list[ProcessEpoch], wanted: int | None, expected: bool
) -> None:
    present = Epoch(5, "a")
    assert has_converged(processes, present, wanted) is expected
    spec = fake_spec("fake/m")
    workers = [replace(one, kind="worker", name=str(at)) for at, one in enumerate(processes)]
    if wanted is None and workers:
        assert bundle_status(spec, workers, present)["acked"] is expected


def test_a_worker_that_meets_a_newer_epoch_looks_at_once(live: LiveFarm) -> None:
    worker = live.start_worker(config_poll_s=RARELY_S)
    wait_listening(worker)
    add_unheard(live, fake_spec("fake/late", dim=6))
    (first,) = live.wait_outcomes([live.send("x")])
    first.raise_error()
    (outcome,) = live.wait_outcomes([live.send("x", model="fake/late")], timeout_s=10)
    assert width(outcome) == 6
    wait_until(lambda: epoch_of(worker) == live.epoch, 20, "the worker to tell")


def test_what_was_admitted_before_a_change_is_served_as_it_was(live: LiveFarm) -> None:
    live.add_models(fake_spec("fake/gone", dim=5))
    worker = live.start_worker(config_poll_s=RARELY_S)
    wait_listening(worker)
    admitted = [live.message(["x"], model=model) for model in (FAKE, "fake/gone")]
    live.add_models(fake_spec(dim=8))
    delete(live, "fake/gone")
    wait_until(lambda: epoch_of(worker) == live.epoch, 20, "the worker to have the change")
    queue = queue_name(POOL, PROFILE, Lane.INTERACTIVE)
    live._publish([(*one, queue) for one in admitted])
    outcomes = live.wait_outcomes([task_id for task_id, *_ in admitted])
    assert [width(outcome) for outcome in outcomes] == [4, 5]
    assert [outcome.spec for outcome in outcomes] == [ticket.spec for _, ticket, _ in admitted]
    (after,) = live.wait_outcomes([live.send("x")])
    assert width(after) == 8


def test_who_starts_after_a_change_serves_what_was_admitted_before_as_it_was(live: LiveFarm) -> None:
    """As what waits for a farm that starts from zero."""
    live.add_models(fake_spec("fake/gone", dim=5))
    waiting = [live.send("x", model=model) for model in (FAKE, "fake/gone")]
    live.add_models(fake_spec(dim=8))
    delete(live, "fake/gone")
    live.start_worker()
    assert [width(outcome) for outcome in live.wait_outcomes(waiting)] == [4, 5]
    (after,) = live.wait_outcomes([live.send("x")])
    assert width(after) == 8


def test_tenants_share_a_worker_by_the_weights_of_the_config(live: LiveFarm) -> None:
    live.add_models(fake_spec(batch_ms=10))
    worker = live.start_worker(batch_max_items=1)
    live.wait_outcomes([live.send("the model is loaded now")])
    engine = open_engine(live.database_url)
    with transaction(engine) as session:
        tenants.put(session, "big", TenantSpec(weight=3), actor="test", reason="test")
        live.epoch, _ = epoch_now(session)
    engine.dispose()
    wait_until(lambda: epoch_of(worker) == live.epoch, 20, "the worker to have the change")
    who = {task: tenant for tenant in ("small", "big") for task in live.send_many(["x"] * 80, tenant=tenant)}
    live.wait_outcomes(list(who))
    order = [who[task] for task in live.outcomes() if task in who]
    assert Counter(order[20:80])["big"] >= 40, order


def test_a_worker_serves_the_profiles_of_a_model(live: LiveFarm) -> None:
    spec = msgspec.structs.replace(fake_spec("fake/p"), profiles={"wide": Profile(options={"dim": 9})})
    live.add_models(spec)
    live.specs["fake/p:wide"] = spec.with_profile("wide")
    live.start_worker()
    tasks = [live.send("x", model=model) for model in ("fake/p", "fake/p:wide")]
    assert [width(outcome) for outcome in live.wait_outcomes(tasks)] == [4, 9]


def test_a_web_process_starts_from_its_copy_and_says_that_it_is_degraded(
    own_postgres: PostgresServer, redis_url: str, tmp_path: Path
) -> None:
    url = own_postgres.fresh_database()
    live = LiveFarm(redis_url, url, tmp_path)
    live.add_models(fake_spec())
    settings = {"DATABASE_URL": url, "CONFIG_POLL_S": "0.2"}
    stop_web(start_web(redis_url, tmp_path, (), **settings))
    own_postgres.stop()
    web, standin = start_web(redis_url, tmp_path, (), **settings), StandIn(redis_url)
    standin.tell()
    answer = web.http.get("/readyz")
    assert (answer.status_code, answer.json()["status"], answer.json()["epoch"]) == (200, "degraded", live.epoch)
    assert "config DB" in answer.json()["reasons"][0]
    assert [one["name"] for one in web.http.get("/v1/models").json()["models"]] == [FAKE]
    own_postgres.start()
    wait_until(lambda: web.http.get("/readyz").json()["status"] == "ready", 15, "the config DB to be back")
    live.add_models(fake_spec("fake/new"))
    wait_until(lambda: web.http.get("/v1/models/fake/new").status_code == 200, 10, "the change")
    standin.stop()
    standin.redis.close()
    live.close()
    stop_web(web)
