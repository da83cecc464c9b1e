"""Tasks that nobody settles, against a real Redis: each is closed once, and nothing of it stays for ever."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis as redis_py

from common.errors import DeadlineExceededError
from tasks import names, scripts
from tasks.app import build_app
from tasks.client import FarmClient
from tasks.names import Lane
from tasks.publisher import OPEN_GRACE_S
from tasks.settling import CANCELLED_S, CLOSED_AT_ONCE, UNCLAIMED_S, close_overdue
from tests.integration.test_client import call_for
from tests.live import LiveFarm
from tests.services import wait_until
from tests.standin import ASYNC_QUEUE, StandIn

pytestmark = pytest.mark.integration


@pytest.fixture
def standin(redis_url: str) -> Iterator[StandIn]:
    """A worker that Redis does not know: what is left there is looked at."""
    made = StandIn(redis_url)
    yield made
    made.redis.close()


LONG_AGO_S = OPEN_GRACE_S + UNCLAIMED_S + 2
"""How long ago the deadline of a task is that nobody has claimed."""


def close(redis: "redis_py.Redis") -> int:
    """As a worker's janitor does; returns how many tasks were closed."""

    def script(name: str, keys: list[str], arguments: list[Any]) -> Any:
        return redis.eval(scripts.source(name), len(keys), *keys, *arguments)

    closed = close_overdue(script, result_ttl_s=600)
    assert isinstance(closed, int)
    return closed


def now(redis: "redis_py.Redis") -> int:
    answer: Any = redis.time()
    return int(answer[0])


def let_pass(redis: "redis_py.Redis", *task_ids: str, deadline_s_ago: float) -> None:
    """As if the deadline of these tasks had been that long ago."""
    score = now(redis) - deadline_s_ago + OPEN_GRACE_S
    redis.zadd(names.OPEN, dict.fromkeys(task_ids, score), xx=True)


def submit(client: FarmClient, text: str = "a") -> str:
    return client.submit(call_for(text, lane=Lane.STANDARD))


def test_a_task_whose_message_was_lost_ends_as_it_would_for_who_asks(client: FarmClient, standin: StandIn) -> None:
    redis = standin.redis
    asked, unasked = submit(client), submit(client)
    redis.delete(ASYNC_QUEUE)
    redis.hset(names.task_record(asked), "deadline", now(redis) - LONG_AGO_S)
    let_pass(redis, unasked, deadline_s_ago=LONG_AGO_S)
    by_asking = client.task(asked)
    assert close(redis) == 1
    by_closing = client.task(unasked)
    assert by_closing.state == by_asking.state == "failed"
    assert by_asking.outcome is not None
    assert by_asking.outcome.error is not None
    assert by_asking.outcome.error["code"] == "DEADLINE_EXCEEDED"
    assert by_closing.outcome == msgspec.structs.replace(by_asking.outcome, task_id=unasked)
    assert redis.hget(names.task_record(unasked), "state") == b"failed"
    for key in (names.task_record(unasked), names.celery_meta(unasked)):
        assert 590 <= redis.ttl(key) <= 600
    assert not redis.exists(names.OPEN)


def test_a_running_worker_closes_what_nobody_claims(
    client: FarmClient, standin: StandIn, redis_url: str, database_url: str, tmp_path: Path
) -> None:
    redis = standin.redis
    lost = submit(client)
    redis.delete(ASYNC_QUEUE)
    let_pass(redis, lost, deadline_s_ago=LONG_AGO_S)
    live = LiveFarm(redis_url, database_url, tmp_path)
    live.start_worker()
    wait_until(lambda: redis.hget(names.task_record(lost), "state") == b"failed", 60, "the worker's janitor")
    assert not redis.exists(names.OPEN)
    live.close()


def test_celery_reads_the_result_of_a_closed_task(client: FarmClient, standin: StandIn, redis_url: str) -> None:
    model = "organisation/" + "m" * 300
    task_id = client.submit(replace(call_for("a", lane=Lane.STANDARD), model=model))
    let_pass(standin.redis, task_id, deadline_s_ago=LONG_AGO_S)
    assert close(standin.redis) == 1
    outcome = client.task(task_id).outcome
    assert outcome is not None
    assert (outcome.task_id, outcome.model) == (task_id, model)
    app = build_app(redis_url, farm_transport="redis", pool="default", machine_profile="cpu")
    result = app.AsyncResult(task_id)
    assert (result.id, result.state) == (task_id, "FAILURE")
    assert isinstance(result.result, DeadlineExceededError)
    app.backend.client.close()  # type: ignore[attr-defined]
    app.close()


def test_who_waits_for_a_task_learns_that_it_was_closed(client: FarmClient, standin: StandIn) -> None:
    task_id = submit(client)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.task, task_id, wait_s=60)
        channel = names.celery_meta(task_id)
        wait_until(lambda: standin.redis.pubsub_numsub(channel) == [(channel.encode(), 1)], 20, "the subscription")
        let_pass(standin.redis, task_id, deadline_s_ago=LONG_AGO_S)
        assert close(standin.redis) == 1
        assert waiting.result(4.5).state == "failed"


def test_only_tasks_overdue_by_the_margin_are_closed(client: FarmClient, standin: StandIn) -> None:
    fresh, late = submit(client), submit(client)
    let_pass(standin.redis, late, deadline_s_ago=LONG_AGO_S - 7)
    assert close(standin.redis) == 0
    assert set(standin.redis.zrange(names.OPEN, 0, -1)) == {fresh.encode(), late.encode()}
    assert [client.task(task_id).state for task_id in (fresh, late)] == ["queued", "queued"]
    assert standin.answer(standin.take(), standin.take()) == [1, 1]


def test_many_that_close_at_once_close_each_task_once(client: FarmClient, standin: StandIn) -> None:
    redis = standin.redis
    task_ids = [submit(client, f"{at}") for at in range(2 * CLOSED_AT_ONCE + 50)]
    fresh = submit(client, "fresh")
    let_pass(redis, *task_ids, deadline_s_ago=LONG_AGO_S)
    with redis.pubsub(ignore_subscribe_messages=True) as pubsub, ThreadPoolExecutor(8) as pool:
        pubsub.psubscribe(names.celery_meta("*"))
        wait_until(lambda: redis.pubsub_numpat() == 1, 20, "the subscription")
        closed = list(pool.map(lambda _: close(redis), range(24)))
        assert max(closed) == CLOSED_AT_ONCE
        assert sum(closed) == len(task_ids)
        assert redis.zrange(names.OPEN, 0, -1) == [fresh.encode()]
        ended: list[str] = []
        wait_until(lambda: _hear(pubsub, ended) == len(task_ids), 10, "one hint a task")
    assert sorted(ended) == sorted(names.celery_meta(task_id) for task_id in task_ids)


def _hear(pubsub: Any, heard: list[str]) -> int:
    while (message := pubsub.get_message()) is not None:
        heard.append(message["channel"].decode())
    return len(heard)


def test_a_message_found_after_its_task_was_closed_is_not_answered(client: FarmClient, standin: StandIn) -> None:
    task_id = submit(client)
    let_pass(standin.redis, task_id, deadline_s_ago=LONG_AGO_S)
    assert close(standin.redis) == 1
    assert standin.answer(standin.take()) == [0]
    assert client.task(task_id).state == "failed"


def test_a_synchronous_request_leaves_nothing_when_it_is_closed(standin: StandIn) -> None:
    redis = standin.redis
    redis.zadd(names.OPEN, {"of-a-web-process-that-died": now(redis) - UNCLAIMED_S - 2})
    assert close(redis) == 1
    assert redis.keys() == []


def test_a_full_redis_still_closes(client: FarmClient, standin: StandIn) -> None:
    task_id = submit(client)
    let_pass(standin.redis, task_id, deadline_s_ago=LONG_AGO_S)
    standin.redis.config_set("maxmemory", "1")
    try:
        assert close(standin.redis) == 1
    finally:
        standin.redis.config_set("maxmemory", "0")
    assert client.task(task_id).state == "failed"


def test_the_cancelled_ids_go_when_the_last_has_stayed_its_time(client: FarmClient, standin: StandIn) -> None:
    redis = standin.redis
    client.cancel(submit(client))
    assert CANCELLED_S - 5 <= redis.ttl(names.CANCELLED) <= CANCELLED_S
    redis.zadd(names.CANCELLED, {"stays longer": now(redis) + 2 * CANCELLED_S + 0.5, "has stayed": now(redis) - 1})
    client.cancel(submit(client))
    assert 2 * CANCELLED_S - 5 <= redis.ttl(names.CANCELLED) <= 2 * CANCELLED_S + 1
    assert redis.zcard(names.CANCELLED) == 3
