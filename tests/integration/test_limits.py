"""Admission against a real Redis: what is over a limit is refused before it is published, and slots come back."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from common.errors import (
    CapacityError,
    DeadlineExceededError,
    FarmError,
    QueueFullError,
    RateLimitError,
    TenantLimitError,
)
from tasks import names
from tasks.bounds import Bounds
from tasks.client import FarmClient
from tasks.names import Lane
from tasks.pace import KEPT_SHARE
from tasks.submitting import Call
from tests.integration.test_client import call_for
from tests.integration.test_settling import LONG_AGO_S, now
from tests.services import wait_until
from tests.standin import ASYNC_QUEUE, QUEUE, StandIn

pytestmark = pytest.mark.integration


def bounded(lane: Lane = Lane.STANDARD, *, tenant: str = "a", tokens: int = 1, per_minute: int = 0) -> Call:
    bounds = Bounds(tokens_per_minute=per_minute)
    return replace(call_for("text", lane=lane), tenant=tenant, tokens=tokens, bounds=bounds)


def refused(client: FarmClient, call: Call) -> CapacityError:
    with pytest.raises(CapacityError) as caught:
        client.submit(call)
    assert caught.value.retry_after_s
    assert caught.value.retry_after_s > 0
    assert caught.value.param is None
    return caught.value


def is_refused(client: FarmClient, call: Call) -> bool:
    try:
        client.submit(call)
    except CapacityError:
        return True
    return False


def sets(standin: StandIn) -> dict[str, int]:
    """How many tasks stand in each set of open tasks but the one of all."""
    return {key.decode(): standin.redis.zcard(key) for key in standin.redis.keys(f"{names.OPEN}:*")}


def test_a_model_has_no_more_open_requests_than_it_may(client: FarmClient, standin: StandIn) -> None:
    for _ in range(2):
        client.submit(bounded())
    call = replace(bounded(), bounds=Bounds(model=2))
    error = refused(client, call)
    assert (type(error), error.details) == (QueueFullError, {"limit": "model"})
    profile = refused(client, replace(call, model="org/m:short"))
    assert profile.details == {"limit": "model"}
    client.submit(replace(call, model="org/other"))
    assert standin.redis.llen(ASYNC_QUEUE) == standin.redis.zcard(names.OPEN) == 3
    assert standin.answer(standin.take()) == [1]
    client.submit(call)


def test_a_tenant_has_no_more_open_requests_than_it_may(client: FarmClient, standin: StandIn) -> None:
    call = bounded()
    of_tenant, of_lane = replace(call, bounds=Bounds(tenant=3)), replace(call, bounds=Bounds(lane=2))
    client.submit(of_lane)
    client.submit(replace(of_tenant, lane=Lane.BATCH))
    client.submit(of_lane)
    for held_to, limit in ((of_tenant, "tenant"), (of_lane, "lane")):
        error = refused(client, held_to)
        assert (type(error), error.code, error.details) == (TenantLimitError, "QUEUE_FULL", {"limit": limit})
        client.submit(replace(held_to, tenant=f"other-{limit}"))
    client.submit(replace(of_lane, lane=Lane.BATCH))
    assert standin.answer(standin.take()) == [1]
    client.submit(of_lane)


def test_tokens_of_a_minute_are_spent_and_come_back_with_time(client: FarmClient, standin: StandIn) -> None:
    whole = bounded(tokens=600, per_minute=600)
    client.submit(whole)
    error = refused(client, bounded(tokens=20, per_minute=600))
    assert isinstance(error, RateLimitError)
    assert 0 < (error.retry_after_s or 0) <= 2.0
    client.submit(replace(whole, tenant="b"))
    clock = names.token_clock("a")
    assert 60 < standin.redis.ttl(clock) <= 121
    standin.redis.incrbyfloat(clock, -2.5)  # so much time has passed
    client.submit(bounded(tokens=20, per_minute=600))
    refused(client, bounded(tokens=20, per_minute=600))


def test_a_request_over_the_budget_of_a_minute_is_taken_when_nothing_is_owed(
    client: FarmClient, standin: StandIn
) -> None:
    large = bounded(tokens=1800, per_minute=600)
    client.submit(large)
    assert 170 < (refused(client, large).retry_after_s or 0) <= 180
    standin.redis.set(names.token_clock("a"), now(standin.redis) - 1)
    client.submit(large)


def test_slots_come_back_however_a_task_ends(client: FarmClient, standin: StandIn) -> None:
    answered, cancelled, overdue = (client.submit(bounded()) for _ in range(3))
    assert set(sets(standin).values()) == {3}
    assert len(sets(standin)) == 3
    assert standin.answer(standin.take()) == [1]
    client.cancel(cancelled, tenant="a")
    standin.redis.hset(names.task_record(overdue), "deadline", now(standin.redis) - 100)
    assert client.task(overdue, tenant="a").state == "failed"
    with pytest.raises(DeadlineExceededError):
        client.run(replace(bounded(Lane.INTERACTIVE), timeout_s=0.05))
    assert client.task(answered, tenant="a").state == "succeeded"
    assert sets(standin) == {}


def test_a_slot_that_nobody_gives_back_ends_with_the_clock(client: FarmClient, standin: StandIn) -> None:
    """Who published has died, the message is lost, and no worker lives whose janitor would close the task."""
    call = replace(bounded(), bounds=Bounds(model=1, tenant=1, lane=1))
    task_id = client.submit(call)
    standin.redis.delete(ASYNC_QUEUE)
    refused(client, call)
    for key in (names.OPEN, *names.slots(call.model, call.tenant, ASYNC_QUEUE)):
        assert standin.redis.zadd(key, {task_id: now(standin.redis) - LONG_AGO_S}, xx=True, ch=True) == 1
    client.submit(call)
    assert set(sets(standin).values()) == {1}
    assert all(standin.redis.ttl(key) > 7 * 24 * 3600 for key in sets(standin))


def test_what_would_be_late_is_refused_at_once(client: FarmClient, standin: StandIn) -> None:
    for _ in range(40):
        client.submit(bounded(Lane.INTERACTIVE))
    call = replace(bounded(Lane.INTERACTIVE), timeout_s=4.0)
    client.submit(call)  # nothing is known of the pace
    standin.tell(hosts=2, request_s={QUEUE: 1.0, ASYNC_QUEUE: 1.0})
    wait_until(lambda: is_refused(client, call), 10, "the pace to be known")
    waiting = standin.redis.llen(QUEUE)
    error = refused(client, call)
    assert (type(error), error.details) == (QueueFullError, {"limit": "wait"})
    expected_s = (waiting + 1) / 2
    assert error.retry_after_s == pytest.approx(expected_s - 4.0 * KEPT_SHARE, abs=0.01)
    client.submit(replace(call, timeout_s=expected_s / KEPT_SHARE + 0.1))
    less_urgent = replace(call, lane=Lane.STANDARD)
    assert refused(client, replace(less_urgent, timeout_s=1.0)).details == {"limit": "wait"}
    client.submit(replace(less_urgent, timeout_s=13.0))  # its least share serves it before all the others are done


def test_a_tenant_waits_for_its_own_requests_first(client: FarmClient, standin: StandIn) -> None:
    """What others have in the workers' hands is served in turns with it; what stands in the queue, before it."""
    for _ in range(40):
        client.submit(bounded(Lane.INTERACTIVE, tenant="flood"))
    for _ in range(39):
        standin.take()
    standin.tell(hosts=1, request_s={QUEUE: 1.0}, weights={"interactive": 2.0})
    flood = replace(bounded(Lane.INTERACTIVE, tenant="flood"), timeout_s=20.0)
    wait_until(lambda: is_refused(client, flood), 10, "the pace to be known")
    while standin.redis.llen(QUEUE):
        standin.take()
    client.submit(replace(flood, tenant="other", timeout_s=2.0))
    standin.take()
    client.submit(replace(flood, tenant="other", timeout_s=6.0))
    refused(client, replace(flood, tenant="other", timeout_s=4.0))
    refused(client, flood)


def test_of_many_callers_at_once_as_many_are_admitted_as_may_be(client: FarmClient, standin: StandIn) -> None:
    call = replace(bounded(Lane.INTERACTIVE), bounds=Bounds(model=100, lane=100))

    def ask(_: int) -> str:
        try:
            return client.run(replace(call, timeout_s=30)).state
        except FarmError as error:
            return error.code

    with ThreadPoolExecutor(256) as pool:
        asked = [pool.submit(ask, at) for at in range(256)]
        wait_until(lambda: standin.redis.llen(QUEUE) == 100, 20, "the admitted to wait")
        wait_until(lambda: sum(one.done() for one in asked) == 156, 20, "the others to be refused")
        standin.start()
        states = [one.result(30) for one in asked]
    assert {state: states.count(state) for state in set(states)} == {"succeeded": 100, "QUEUE_FULL": 156}
    assert sets(standin) == {}


def test_256_callers_at_once_are_all_served(client: FarmClient, standin: StandIn) -> None:
    standin.start()
    with ThreadPoolExecutor(256) as pool:
        outcomes = list(pool.map(lambda _: client.run(bounded(Lane.INTERACTIVE)).state, range(256)))
    assert set(outcomes) == {"succeeded"}
    assert sets(standin) == {}
