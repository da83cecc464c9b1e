"""From a queued message to its one outcome, through a real Celery worker, on both transports."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from celery import Celery

from config_db.spec import Limits, Placement
from tasks import codec, names
from tasks.app import build_app
from tasks.messages import Outcome
from tasks.names import Lane, queue_name
from tests.fakes.family import fake_vector
from tests.live import FAKE, POOL, PROFILE, LiveFarm, fake_spec
from tests.services import RedisServer, wait_until


@pytest.fixture(params=["farm", "redis"])
def live(request: Any, redis_url: str, database_url: str, tmp_path: Path) -> Iterator[LiveFarm]:
    farm = LiveFarm(redis_url, database_url, tmp_path, transport=request.param)
    farm.add_models(fake_spec(), fake_spec("fake/slow", batch_ms=300), fake_spec("fake/b"))
    yield farm
    farm.close()


def vectors(outcome: Outcome) -> list[list[float]]:
    """The dense vectors of an outcome."""
    outcome.raise_error()
    return [codec.array_of(item["dense"]["values"]).tolist() for item in msgspec.msgpack.decode(outcome.result)]


def test_each_request_gets_its_own_answer(live: LiveFarm) -> None:
    live.start_worker()
    texts = [f"text {n}" for n in range(300)]
    tasks = live.send_many(texts)
    outcomes = live.wait_outcomes(tasks)
    for text, outcome in zip(texts, outcomes, strict=True):
        assert vectors(outcome) == [pytest.approx(fake_vector(text, 4).tolist())]
    live.assert_settled()


def test_items_of_a_request_cut_over_several_batches_come_back_in_order(live: LiveFarm) -> None:
    live.start_worker(batch_max_items=8)
    texts = [f"item {n}" for n in range(50)]
    (outcome,) = live.wait_outcomes([live.send(*texts)])
    assert vectors(outcome) == [pytest.approx(fake_vector(text, 4).tolist()) for text in texts]


def test_requests_of_several_models_are_answered_by_their_own(live: LiveFarm) -> None:
    live.start_worker()
    tasks = [live.send("x", model=model) for model in (FAKE, "fake/b") * 10]
    assert {outcome.model for outcome in live.wait_outcomes(tasks)} == {FAKE, "fake/b"}


def test_waiting_requests_share_a_micro_batch(live: LiveFarm) -> None:
    """64 requests that wait together cost a handful of batches of 300 ms, not 64."""
    live.start_worker()
    tasks = live.send_many([str(n) for n in range(64)], model="fake/slow")
    outcomes = live.wait_outcomes(tasks, timeout_s=10)
    assert max(outcome.timing["queue_ms"] for outcome in outcomes) < 5000


def test_a_failing_item_fails_alone(live: LiveFarm) -> None:
    live.start_worker()
    tasks = live.send_many(["a", "!raise", "b"])
    states = [outcome.state for outcome in live.wait_outcomes(tasks)]
    assert states == ["succeeded", "failed", "succeeded"]


def test_a_request_past_its_deadline_is_answered_uncomputed(live: LiveFarm) -> None:
    task = live.send("late", timeout_s=-1)
    live.start_worker()
    (outcome,) = live.wait_outcomes([task])
    assert outcome.error is not None
    assert outcome.error["code"] == "DEADLINE_EXCEEDED"
    live.assert_settled()


def test_a_cancelled_request_in_the_queue_is_dropped(live: LiveFarm) -> None:
    """Its cancellation has answered it: the worker writes nothing."""
    tasks = [live.send("gone"), live.send("stays")]
    live.redis.zrem(names.OPEN, tasks[0])
    live.redis.zadd(names.CANCELLED, {tasks[0]: live.clock.now() + 60})
    live.start_worker()
    live.wait_outcomes(tasks[1:])
    wait_until(lambda: live.waiting() == 0, 20, "the queue to drain")
    live.assert_settled(tasks[0])


def test_an_unknown_model_is_one_clear_error(live: LiveFarm) -> None:
    live.specs["fake/none"] = fake_spec("fake/none")
    live.start_worker()
    (outcome,) = live.wait_outcomes([live.send("x", model="fake/none")])
    assert outcome.error is not None
    assert outcome.error["code"] == "MODEL_NOT_FOUND"


def test_a_model_published_after_the_worker_started_is_served(live: LiveFarm) -> None:
    live.start_worker()
    live.add_models(fake_spec("fake/new"))
    (outcome,) = live.wait_outcomes([live.send("x", model="fake/new")])
    assert outcome.state == "succeeded"


def test_more_models_than_fit_are_all_served(live: LiveFarm) -> None:
    """Five models of 1 MB in 2.5 MB: each request is answered by its own, and never more than two are resident."""
    models = [f"fake/m{n}" for n in range(5)]
    live.add_models(*(fake_spec(name, bytes=1_000_000) for name in models))
    worker = live.start_worker(device_memory="2.5MB")
    for _ in range(3):
        tasks = [live.send("x", model=name) for name in models]
        assert [outcome.model for outcome in live.wait_outcomes(tasks)] == models
        assert len(live.incarnations()[worker.incarnation]["resident"]) <= 2


def test_a_model_to_preload_is_resident_before_anyone_asks(live: LiveFarm) -> None:
    """At the start of a worker, and when it is published later."""
    fields = msgspec.structs.asdict(fake_spec("fake/early"))
    early, late = (
        type(fake_spec())(**{**fields, "id": name, "placement": Placement(preload=True)})
        for name in ("fake/early", "fake/late")
    )
    live.add_models(early)
    worker = live.start_worker()

    def resident() -> set[str]:
        return set(live.incarnations()[worker.incarnation]["resident"])

    wait_until(lambda: early.digest in resident(), 10, "the model to be resident")
    live.add_models(late)
    wait_until(lambda: late.digest in resident(), 10, "the later model to be resident")


def test_a_lower_lane_is_served_under_a_flood_of_the_upper(live: LiveFarm) -> None:
    flood = live.send_many([str(n) for n in range(2000)])
    lower = live.send("patient", lane=Lane.BATCH)
    live.start_worker()
    live.wait_outcomes([*flood, lower], timeout_s=60)
    order = list(live.outcomes())
    if live.transport == "farm":  # kombu's own transport takes its queues in turn
        assert order.index(lower) < 1500


def test_a_model_with_max_concurrency_is_served(live: LiveFarm) -> None:
    spec = fake_spec("fake/one", batch_ms=5)
    live.add_models(type(spec)(**{**msgspec.structs.asdict(spec), "limits": Limits(max_concurrency=1)}))
    live.start_worker(batch_max_items=4)
    live.wait_outcomes(live.send_many([str(n) for n in range(40)], model="fake/one"))


def test_a_killed_worker_is_forgotten_by_the_others(live: LiveFarm) -> None:
    """Else what it told of itself would be read for ever, by all that look who lives."""
    killed, _ = live.start_worker(), live.start_worker()
    incarnation = killed.incarnation
    killed.process.kill()
    wait_until(lambda: incarnation not in live.incarnations(), 20, "it to be forgotten")


@pytest.fixture
def producer(live: LiveFarm) -> Iterator[Celery]:
    """A plain Celery producer on plain ``redis://``: knows nothing of our transport."""
    app = build_app(live.redis_url, farm_transport="redis", pool=POOL, machine_profile=PROFILE)
    yield app
    app.close()


def test_a_plain_celery_producer_gets_its_result(live: LiveFarm, producer: Celery) -> None:
    live.start_worker()
    queue = queue_name(POOL, PROFILE, Lane.STANDARD)
    result = producer.send_task("farm.encode", args=(FAKE, {"items": [{"text": "hi"}]}), queue=queue)
    answer = result.get(timeout=15)
    assert answer["model"] == FAKE
    assert codec.array_of(answer["items"][0]["dense"]["values"]).tolist() == pytest.approx(
        fake_vector("hi", 4).tolist()
    )


@pytest.mark.parametrize(
    "arguments",
    [(), ("fake/a",), (FAKE, {"items": []}), (FAKE, {"items": 3}), ("no/such", {"items": [{"text": "x"}]}), (1, 2)],
)
def test_a_plain_producers_nonsense_is_one_failed_task(
    live: LiveFarm, producer: Celery, arguments: tuple[Any, ...]
) -> None:
    worker = live.start_worker()
    queue = queue_name(POOL, PROFILE, Lane.STANDARD)
    result = producer.send_task("farm.encode", args=arguments, queue=queue)
    wait_until(lambda: result.state == "FAILURE", 15, "the task to fail")
    assert worker.process.poll() is None


def test_celerys_expires_and_countdown_work(live: LiveFarm, producer: Celery) -> None:
    queue = queue_name(POOL, PROFILE, Lane.STANDARD)
    request = (FAKE, {"items": [{"text": "x"}]})
    expired = producer.send_task("farm.encode", args=request, queue=queue, expires=0.01)
    later = producer.send_task("farm.encode", args=request, queue=queue, countdown=1)
    live.start_worker()
    assert later.get(timeout=15)["model"] == FAKE
    wait_until(lambda: expired.state in {"FAILURE", "REVOKED"}, 15, "the expired task to be answered")


def occupy(live: LiveFarm, inspect: Any) -> list[str]:
    """Fill the worker's only host: one micro-batch computing, one waiting inside it."""
    running: list[str] = []
    for text in ("!sleep:1.5", "!sleep:1.5"):
        running.append(live.send(text))
        wait_until(
            lambda: {one["id"] for ones in (inspect.active() or {}).values() for one in ones} == set(running),
            5,
            "the host to hold it",
        )
    return running


def test_inspect_sees_the_worker_and_what_it_runs(live: LiveFarm, producer: Celery) -> None:
    worker = live.start_worker()
    inspect = producer.control.inspect(timeout=5, limit=1)
    node = next(iter(inspect.ping()))
    assert node.startswith(worker.name)
    running = occupy(live, inspect)
    assert {one["id"] for one in inspect.active()[node]} == set(running)
    waiting = live.send("third")
    wait_until(lambda: waiting in {one["id"] for one in inspect.reserved()[node]}, 20, "inspect to show one reserved")
    assert inspect.stats()[node]["farm"]["held"] == 3
    live.wait_outcomes([*running, waiting])
    wait_until(lambda: not inspect.active()[node], 20, "nothing to be active any more")


def test_what_runs_is_marked_in_redis_until_it_is_answered(live: LiveFarm, producer: Celery) -> None:
    worker = live.start_worker()
    running = occupy(live, producer.control.inspect(timeout=5, limit=1))
    wait_until(lambda: worker.started() == len(running), 5, "both to be marked")
    live.wait_outcomes(running)
    wait_until(lambda: worker.started() == 0, 5, "nothing to be marked any more")


def test_revoke_answers_a_waiting_request_as_cancelled(live: LiveFarm, producer: Celery) -> None:
    live.start_worker()
    inspect = producer.control.inspect(timeout=5, limit=1)
    running = occupy(live, inspect)
    waiting = live.send("third")
    wait_until(lambda: waiting in {r["id"] for rs in (inspect.reserved() or {}).values() for r in rs}, 20, "it is held")
    producer.control.revoke(waiting)
    outcomes = live.wait_outcomes([*running, waiting])
    assert [outcome.state for outcome in outcomes] == ["succeeded", "succeeded", "cancelled"]


def test_events_tell_the_life_of_each_request(live: LiveFarm, producer: Celery) -> None:
    live.start_worker()
    seen: list[tuple[str, str]] = []
    with producer.connection_for_read() as connection:
        receiver = producer.events.Receiver(
            connection, handlers={"*": lambda event: seen.append((event.get("uuid", ""), event["type"]))}
        )
        with receiver.consumer_context() as (listening, *_):
            wait_until(lambda: listening.drain_events(timeout=5) or seen, 10, "the receiver to hear a heartbeat")
            good, bad = live.send("x"), live.send("!raise")
            wanted = {
                *((good, kind) for kind in ("task-received", "task-started", "task-succeeded")),
                *((bad, kind) for kind in ("task-received", "task-started", "task-failed")),
            }

            def all_seen() -> bool:
                listening.drain_events(timeout=5)
                return wanted <= set(seen)

            wait_until(all_seen, 15, "the events")


def test_what_ends_while_a_worker_shuts_down_is_told_as_well(live: LiveFarm, producer: Celery) -> None:
    worker = live.start_worker()
    seen: list[tuple[str, str]] = []
    with producer.connection_for_read() as connection:
        receiver = producer.events.Receiver(
            connection, handlers={"*": lambda event: seen.append((event["type"], event.get("uuid", "")))}
        )
        with receiver.consumer_context() as (listening, *_):
            wait_until(lambda: listening.drain_events(timeout=5) or seen, 10, "the receiver to hear a heartbeat")
            running = occupy(live, producer.control.inspect(timeout=5, limit=1))
            assert worker.stop() == 0
            assert [outcome.state for outcome in live.wait_outcomes(running)] == ["succeeded"] * len(running)

            def all_seen() -> bool:
                listening.drain_events(timeout=5)
                return {("task-succeeded", one) for one in running} <= set(seen)

            wait_until(all_seen, 10, "the events")


HOSTILE = [
    b"\xff\xfe not json",
    b"{}",
    b"[]",
    b'{"body": "", "headers": 3, "properties": {}}',
    b'{"body": "e30=", "headers": {"id": "x", "task": "farm.encode", "farm": "{"}, "content-type": '
    b'"application/x-msgpack", "content-encoding": "binary", "properties": {"body_encoding": "base64"}}',
    b'{"body": "e30=", "headers": {"id": "x", "task": "farm.encode", "farm": {"a": [1]}}, "content-type": '
    b'"application/x-python-serialize", "content-encoding": "binary", "properties": {"body_encoding": "base64"}}',
    b'{"body": "%%%", "headers": {"id": null, "task": null}, "properties": {"body_encoding": "base64"}}',
    b'{"body": "", "headers": {"task": "os.system", "id": "1"}, "properties": {"delivery_info": 5}}',
    b'{"body": "", "headers": {"task": "farm.encode", "id": {"a": 1}, "eta": "yesterday"}, "properties": {}}',
    b'{"body": "e30=", "headers": {"task": "farm.encode", "id": null}, "properties": {"body_encoding": "base64"}}',
    b'{"body": "e30=", "headers": {"task": "farm.encode", "id": ["a"]}, "properties": {"body_encoding": "base64"}}',
    b"{" * 5000,
]
EVIL = b"cos\nsystem\n(S'touch %s'\ntR."
"""A pickle that runs a command when it is read."""
FORBIDDEN_TYPES = ["application/x-python-serialize", "application/x-yaml", "application/data", "text/plain", None, 7]


@pytest.mark.parametrize("transport", ["farm"])
def test_hostile_messages_go_to_the_dead_letters_and_hurt_nobody(
    transport: str, redis_url: str, database_url: str, tmp_path: Path
) -> None:
    """On kombu's own transport a damaged message ends the consumer: one more reason for ours."""
    farm = LiveFarm(redis_url, database_url, tmp_path, transport=transport)
    farm.add_models(fake_spec())
    worker = farm.start_worker()
    try:
        queue = queue_name(POOL, PROFILE, Lane.INTERACTIVE)
        ran = tmp_path / "ran"
        never_sent, _, good = farm.message(["never sent"])
        hostile = [*HOSTILE, *(of_another_kind(good, kind, EVIL % str(ran).encode()) for kind in FORBIDDEN_TYPES)]
        for raw in hostile:
            farm.redis.lpush(queue, raw)
        tasks = farm.send_many(["a", "b", "c"])
        farm.wait_outcomes(tasks)
        wait_until(lambda: farm.redis.llen(names.DEAD_LETTERS) == len(hostile), 10, "the dead letters")
        farm.assert_settled(never_sent)
        assert worker.process.poll() is None
        assert not ran.exists()
    finally:
        farm.close()


def of_another_kind(raw: bytes, kind: Any, body: bytes) -> bytes:
    """A message of a plain Celery producer, whose body is said to be of this kind."""
    message = json.loads(raw)
    del message["headers"]["farm"]
    return json.dumps({**message, "content-type": kind, "body": base64.b64encode(body).decode()}).encode()


def test_a_worker_that_joins_late_drains_what_waits(live: LiveFarm) -> None:
    tasks = live.send_many([str(n) for n in range(10_000)])
    live.start_worker()
    live.wait_outcomes(tasks, timeout_s=60)
    live.assert_settled()


def test_a_message_replayed_by_hand_is_answered_once(live: LiveFarm) -> None:
    live.start_worker()
    task_id, _, raw = live.message(["x"])
    live.redis.zadd(names.OPEN, {task_id: live.clock.now() + 60})
    queue = queue_name(POOL, PROFILE, Lane.INTERACTIVE)
    live.redis.lpush(queue, raw, raw, raw)
    live.wait_outcomes([task_id])
    wait_until(lambda: live.waiting() == 0, 20, "the queue to drain")
    live.assert_settled()
    live.wait_outcomes([task_id])


def test_a_worker_refuses_a_misspelt_setting_in_one_line(tmp_path: Path) -> None:
    farm = LiveFarm("redis://127.0.0.1:1/0", "postgresql://127.0.0.1/none", tmp_path)
    worker = farm.start_worker(ready=False, pool="NO SUCH")
    try:
        assert worker.process.wait(30) == 1
        assert "FARMHAND_POOL" in worker.tail()
        assert "Traceback" not in worker.tail()
    finally:
        farm.close()


def test_a_worker_refuses_a_redis_that_evicts(own_redis: RedisServer, database_url: str, tmp_path: Path) -> None:
    own_redis.client().config_set("maxmemory-policy", "allkeys-lru")
    farm = LiveFarm(own_redis.url, database_url, tmp_path)
    worker = farm.start_worker(ready=False)
    try:
        assert worker.process.wait(20) == 1
        assert "noeviction" in worker.tail()
        assert "Traceback" not in worker.tail()
    finally:
        farm.close()
