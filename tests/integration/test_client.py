"""The farm's client against a real Redis: every caller gets its own outcome, exactly one, in bounded time."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import redis

from common.errors import (
    CancelledError,
    DeadlineExceededError,
    FarmError,
    InferenceError,
    QueueFullError,
    QueueUnavailableError,
    TaskNotFoundError,
)
from tasks import codec, live_workers, names
from tasks.client import FarmClient
from tasks.connections import Connections
from tasks.following import OVERDUE_GRACE_S
from tasks.messages import INLINE_BODY_BYTES, Request
from tasks.names import Lane, Operation
from tasks.submitting import Call
from tests.services import RedisServer, wait_until
from tests.standin import ASYNC_QUEUE, QUEUE, StandIn, vector_of

pytestmark = pytest.mark.integration


def call_for(*texts: str, timeout_s: float = 20, lane: Lane = Lane.INTERACTIVE, **options: Any) -> Call:
    request = Request(items=[{"text": text} for text in texts], options=options)
    return Call(
        model="org/m",
        spec="0123456789abcdef",
        operation=Operation.ENCODE,
        request=request,
        items=len(texts),
        tokens=sum(map(len, texts)) // 4,
        lane=lane,
        pool="default",
        machine_profile="cpu",
        timeout_s=timeout_s,
    )


def vectors(outcome: Any) -> list[list[float]]:
    return [codec.array_of(item["dense"]["values"]).tolist() for item in codec.unpack(outcome.result)]


def in_thread(function: Any, *args: Any) -> "tuple[threading.Thread, list[Any]]":
    """Run in a thread; the list receives what it returned or raised."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function(*args))
        except FarmError as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, results


def finish(thread: threading.Thread, results: list[Any], timeout_s: float = 10) -> Any:
    thread.join(timeout_s)
    assert not thread.is_alive()
    return results[0]


def test_callers_at_the_same_time_each_get_their_own_outcome(client: FarmClient, standin: StandIn) -> None:
    standin.start()
    texts = [f"text number {at} {'x' * (at % 37)}" for at in range(640)]
    with ThreadPoolExecutor(64) as pool:
        outcomes = list(pool.map(lambda text: client.run(call_for(text)), texts))
    assert [vectors(outcome) for outcome in outcomes] == [[vector_of(text)] for text in texts]
    assert len({outcome.task_id for outcome in outcomes}) == 640
    assert (client.waiting, client.dropped) == (0, 0)
    assert not standin.redis.exists(names.OPEN)


def test_callers_that_publish_together_share_a_round_trip(client: FarmClient, standin: StandIn) -> None:
    standin.start()
    client.run(call_for("warm"))
    before = standin.redis.info("commandstats")["cmdstat_evalsha"]["calls"]
    with ThreadPoolExecutor(64) as pool:
        list(pool.map(lambda at: client.submit(call_for(f"{at}", lane=Lane.STANDARD)), range(640)))
    assert standin.redis.info("commandstats")["cmdstat_evalsha"]["calls"] - before < 640


def test_an_error_of_the_worker_arrives_as_the_outcome(client: FarmClient, standin: StandIn) -> None:
    thread, results = in_thread(client.run, call_for("bad"))
    standin.answer(standin.take(), error=InferenceError("the model failed", param="items[0]"))
    outcome = finish(thread, results)
    assert outcome.state == "failed"
    with pytest.raises(InferenceError, match="the model failed"):
        outcome.raise_error()


def test_a_message_says_what_the_worker_needs(client: FarmClient, standin: StandIn) -> None:
    before = time.time()
    task_id = client.submit(call_for("a", "b", timeout_s=50, lane=Lane.STANDARD, threshold=1))
    taken = standin.take()
    ticket = taken.ticket
    assert (taken.task_id, ticket.items, ticket.asynchronous, ticket.admitted) == (task_id, 2, True, True)
    assert ticket.key.startswith("org/m@0123456789abcdef|encode||")
    assert ticket.deadline == pytest.approx(before + 50, abs=2)
    assert standin.redis.zscore(names.OPEN, task_id) == pytest.approx(ticket.deadline + 60)
    assert standin.redis.llen(names.bell(ASYNC_QUEUE)) == 1
    assert taken.request.items == [{"text": "a"}, {"text": "b"}]


def test_a_full_queue_refuses_before_anything_is_published(redis_url: str, standin: StandIn) -> None:
    client = FarmClient(redis_url, queue_limit=3, result_ttl_s=600)
    for at in range(3):
        client.submit(call_for(f"{at}", lane=Lane.STANDARD))
    with pytest.raises(QueueFullError) as refused:
        client.submit(call_for("one too many", lane=Lane.STANDARD))
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s > 0
    assert (standin.redis.llen(ASYNC_QUEUE), standin.redis.zcard(names.OPEN)) == (3, 3)
    with pytest.raises(QueueFullError):
        FarmClient(redis_url, queue_limit=0, result_ttl_s=600).run(call_for("nothing fits"))
    standin.start()
    wait_until(lambda: standin.redis.llen(ASYNC_QUEUE) == 0, 20, "the queue to drain")
    client.submit(call_for("now it fits", lane=Lane.STANDARD))
    client.close()


def test_a_large_body_travels_by_reference(client: FarmClient, standin: StandIn) -> None:
    text = "y" * 600 * 1024
    thread, results = in_thread(client.run, call_for(text))
    taken = standin.take()
    assert taken.ticket.body_key == names.body_key(taken.task_id)
    assert len(taken.raw) < 4096 < INLINE_BODY_BYTES
    assert 0 < standin.redis.ttl(taken.ticket.body_key) <= 20 + 120
    standin.answer(taken)
    assert vectors(finish(thread, results)) == [vector_of(text)]
    assert not standin.redis.exists(taken.ticket.body_key)


def test_a_large_outcome_is_fetched_and_its_key_removed(client: FarmClient, standin: StandIn) -> None:
    thread, results = in_thread(client.run, call_for("large"))
    taken = standin.take()
    standin.answer(taken, by_reference=True)
    assert vectors(finish(thread, results)) == [vector_of("large")]
    assert not standin.redis.exists(names.result_key(taken.task_id))


def test_a_deadline_ends_the_wait_and_takes_the_right_to_answer_back(client: FarmClient, standin: StandIn) -> None:
    thread, results = in_thread(client.run, call_for("slow", timeout_s=0.2))
    taken = standin.take()
    assert isinstance(finish(thread, results, 5), DeadlineExceededError)
    assert standin.answer(taken) == [0], "the late worker must not answer"
    assert standin.redis.zscore(names.CANCELLED, taken.task_id) is not None
    assert client.waiting == 0


def test_a_reply_nobody_waits_for_is_dropped_and_counted(client: FarmClient, standin: StandIn) -> None:
    thread, results = in_thread(client.run, call_for("a"))
    taken = standin.take()
    assert taken.reply_to is not None
    standin.answer(taken)
    finish(thread, results)
    standin.hold(taken)
    standin.redis.zadd(names.OPEN, {taken.task_id: 1})  # as if its admission had been lost: it is answered again
    assert standin.answer(taken) == [1]
    wait_until(lambda: client.dropped == 1, 20, "the late reply to be dropped")
    standin.start()
    assert client.run(call_for("b")).state == "succeeded"


def test_replies_survive_the_loss_of_the_connection_they_are_read_by(client: FarmClient, standin: StandIn) -> None:
    standin.start()
    client.run(call_for("warm"))
    stop = threading.Event()

    def cut_reply_connections() -> None:
        while not stop.wait(0.02):
            for known in standin.redis.client_list():
                if known["name"] == "farmhand-replies":
                    standin.redis.client_kill_filter(_id=known["id"])

    cutter = threading.Thread(target=cut_reply_connections, daemon=True)
    cutter.start()
    try:
        with ThreadPoolExecutor(32) as pool:
            outcomes = list(pool.map(lambda at: client.run(call_for(f"text {at}")), range(400)))
    finally:
        stop.set()
        cutter.join()
    assert [vectors(outcome) for outcome in outcomes] == [[vector_of(f"text {at}")] for at in range(400)]


def test_a_full_redis_refuses_requests_and_still_delivers_replies(client: FarmClient, standin: StandIn) -> None:
    thread, results = in_thread(client.run, call_for("in flight"))
    taken = standin.take()
    standin.redis.config_set("maxmemory", "1")
    try:
        with pytest.raises(QueueFullError, match="memory"):
            client.submit(call_for("no room"))
        with pytest.raises(QueueFullError, match="memory"):
            client.run(call_for("z" * 600 * 1024))
        assert standin.answer(taken) == [1]
        assert vectors(finish(thread, results)) == [vector_of("in flight")]
    finally:
        standin.redis.config_set("maxmemory", "0")
    assert standin.redis.zcard(names.OPEN) == 0
    standin.start()
    assert client.run(call_for("room again")).state == "succeeded"


def test_scripts_flushed_by_an_operator_are_loaded_again(client: FarmClient, standin: StandIn) -> None:
    standin.start()
    client.run(call_for("a"))
    standin.redis.script_flush()
    assert client.run(call_for("b")).state == "succeeded"


# -- Redis away ------------------------------------------------------------------------------------------------------

Own = tuple[FarmClient, StandIn]


@pytest.fixture
def own(own_redis: RedisServer) -> Iterator[Own]:
    """Client and stand-in of a Redis that the test may stop."""
    client, standin = FarmClient(own_redis.url, queue_limit=1000, result_ttl_s=600), StandIn(own_redis.url)
    yield client, standin
    standin.stop()
    client.close()
    standin.redis.close()


def test_redis_away_is_said_within_three_seconds_and_forgotten_when_it_is_back(
    own_redis: RedisServer, own: Own
) -> None:
    client, standin = own
    standin.start()
    client.run(call_for("before"))
    own_redis.kill()
    try:
        started_at = time.monotonic()
        with ThreadPoolExecutor(16) as pool:
            errors = list(pool.map(lambda at: _error_of(client, f"{at}"), range(16)))
        assert time.monotonic() - started_at < 3
        assert {type(error) for error in errors} == {QueueUnavailableError}
        assert all(error.retry_after_s > 0 for error in errors)
        with pytest.raises(QueueUnavailableError):
            client.task("any")
    finally:
        own_redis.start()
    back_at = time.monotonic()
    wait_until(lambda: _error_of(client, "again") is None, 5, "requests to succeed again")
    assert time.monotonic() - back_at < 5


def test_closing_waits_for_what_is_asked_aside(client: FarmClient, monkeypatch: pytest.MonkeyPatch) -> None:
    asking, go_on, order = threading.Event(), threading.Event(), []

    def ask_slowly(connections: Connections) -> list[live_workers.WorkerView]:
        asking.set()
        assert go_on.wait(20)
        connections.ask("PING")
        order.append("answered")
        return []

    monkeypatch.setattr(live_workers, "live_workers", ask_slowly)
    monkeypatch.setattr(redis.Redis, "close", lambda _: order.append("closed"))
    client.queue_lengths({QUEUE})
    assert asking.wait(10)
    closing, _ = in_thread(client.close)
    closing.join(0.2)  # as long as one that does not wait may take
    go_on.set()
    closing.join(10)
    assert (closing.is_alive(), order) == (False, ["answered", "closed"])


def test_a_redis_that_hangs_is_given_up_within_three_seconds(own_redis: RedisServer, own: Own) -> None:
    client, standin = own
    standin.start()
    client.run(call_for("before"))
    blocker = own_redis.client()
    hang, hung = in_thread(lambda: blocker.execute_command("DEBUG", "SLEEP", "4"))
    time.sleep(0.05)  # DEBUG SLEEP answers nobody, so there is no state to wait for
    started_at = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        errors = list(pool.map(lambda at: _error_of(client, f"{at}"), range(8)))
    assert time.monotonic() - started_at < 3
    assert {type(error) for error in errors} == {QueueUnavailableError}
    finish(hang, hung)
    blocker.close()
    wait_until(lambda: _error_of(client, "again") is None, 5, "requests to succeed again")


def test_a_waiting_caller_is_answered_across_a_restart_of_redis(own_redis: RedisServer, own: Own) -> None:
    client, standin = own
    thread, results = in_thread(client.run, call_for("patient"))
    taken = standin.take()
    own_redis.stop()
    own_redis.start()
    assert standin.answer(taken) == [1]
    assert vectors(finish(thread, results)) == [vector_of("patient")]


def test_a_client_that_never_met_redis_says_so_at_once(own_redis: RedisServer) -> None:
    own_redis.stop()
    client = FarmClient(own_redis.url, queue_limit=10, result_ttl_s=60)
    try:
        started_at = time.monotonic()
        with ThreadPoolExecutor(16) as pool:
            errors = list(pool.map(lambda at: _error_of(client, f"{at}"), range(16)))
        assert time.monotonic() - started_at < 3
        assert {type(error) for error in errors} == {QueueUnavailableError}
    finally:
        own_redis.start()
    client.close()


def _error_of(client: FarmClient, text: str) -> FarmError | None:
    try:
        client.run(call_for(text, timeout_s=10))
    except FarmError as error:
        return error
    return None


# -- asynchronous tasks ----------------------------------------------------------------------------------------------


def test_a_task_is_seen_queued_then_running_then_succeeded(client: FarmClient, standin: StandIn) -> None:
    task_id = client.submit(call_for("a", lane=Lane.STANDARD))
    assert client.task(task_id).state == "queued"
    taken = standin.take()
    standin.redis.hset(names.task_record(task_id), "state", "running")  # as start.lua does
    assert client.task(task_id).state == "running"
    standin.answer(taken)
    view = client.task(task_id)
    assert (view.state, view.model, view.operation) == ("succeeded", "org/m", Operation.ENCODE)
    assert vectors(view.outcome) == [vector_of("a")]
    assert 0 < standin.redis.ttl(names.task_record(task_id)) <= 3600


def test_waiting_for_a_task_ends_when_it_does(client: FarmClient, standin: StandIn) -> None:
    task_id = client.submit(call_for("a", lane=Lane.STANDARD))
    taken = standin.take()
    waits = [in_thread(lambda: client.task(task_id, wait_s=20)) for _ in range(8)]
    subscribers = lambda: dict(standin.redis.pubsub_numsub(names.celery_meta(task_id)))  # noqa: E731
    wait_until(lambda: set(subscribers().values()) == {1}, 20, "one subscription for all")
    answered_at = time.monotonic()
    standin.answer(taken)
    assert [finish(*wait).state for wait in waits] == ["succeeded"] * 8
    assert time.monotonic() - answered_at < 2
    wait_until(lambda: set(subscribers().values()) == {0}, 20, "the subscription to end")


def test_waiting_for_a_task_is_bounded(client: FarmClient) -> None:
    task_id = client.submit(call_for("a", lane=Lane.STANDARD))
    started_at = time.monotonic()
    assert client.task(task_id, wait_s=0.3).state == "queued"
    assert 0.3 <= time.monotonic() - started_at < 2


def test_an_unknown_task_is_not_found(client: FarmClient) -> None:
    with pytest.raises(TaskNotFoundError):
        client.task("no-such-task")
    with pytest.raises(TaskNotFoundError):
        client.cancel("no-such-task")


def test_a_cancelled_task_is_never_answered_by_a_worker(client: FarmClient, standin: StandIn) -> None:
    task_id = client.submit(call_for("z" * 600 * 1024, lane=Lane.STANDARD))
    assert client.cancel(task_id).state == "cancelled"
    assert standin.redis.zscore(names.CANCELLED, task_id) is not None
    assert not standin.redis.exists(names.OPEN, names.body_key(task_id))
    view = client.task(task_id)
    assert view.state == "cancelled"
    with pytest.raises(CancelledError):
        view.outcome.raise_error()  # type: ignore[union-attr]


def test_cancelling_a_finished_task_changes_nothing(client: FarmClient, standin: StandIn) -> None:
    task_id = client.submit(call_for("a", lane=Lane.STANDARD))
    standin.answer(standin.take())
    assert client.cancel(task_id).state == "succeeded"
    assert client.task(task_id).state == "succeeded"


def test_of_cancel_and_finish_exactly_one_wins(client: FarmClient, standin: StandIn) -> None:
    winners: Counter[str] = Counter()
    for at in range(60):
        task_id = client.submit(call_for(f"{at}", lane=Lane.STANDARD))
        taken = standin.take()
        gate = threading.Barrier(2)
        cancel, cancelled = in_thread(lambda gate=gate, one=task_id: (gate.wait(5), client.cancel(one))[1])
        answer, answered = in_thread(lambda gate=gate, one=taken: (gate.wait(5), standin.answer(one))[1])
        view, answers = finish(cancel, cancelled), finish(answer, answered)
        assert (view.state == "succeeded") == (answers == [1])
        assert client.task(task_id).state == view.state
        winners[view.state] += 1
    assert sum(winners.values()) == 60
    assert not standin.redis.exists(names.OPEN)


def test_an_overdue_task_is_settled_once_by_whoever_asks(client: FarmClient, standin: StandIn) -> None:
    task_id = client.submit(replace(call_for("a", lane=Lane.STANDARD), timeout_s=0.05))
    taken = standin.take()
    assert client.task(task_id).state == "queued", "a worker has its grace after the deadline"
    now = time.monotonic()
    client.clock.sync((int(client.clock.now() + OVERDUE_GRACE_S + 2), 0), asked_at=now, answered_at=now)
    with ThreadPoolExecutor(8) as pool:
        views = list(pool.map(lambda _: client.task(task_id), range(8)))
    assert {view.state for view in views} == {"failed"}
    assert {view.outcome.error["code"] for view in views} == {"DEADLINE_EXCEEDED"}  # type: ignore[union-attr,index]
    assert standin.answer(taken) == [0]
    assert standin.redis.zcard(names.CANCELLED) == 1


def test_celery_reads_the_outcome_of_a_cancelled_task(client: FarmClient, redis_url: str) -> None:
    from tasks.app import build_app

    task_id = client.submit(call_for("a", lane=Lane.STANDARD))
    client.cancel(task_id)
    app = build_app(redis_url, farm_transport="redis", pool="default", machine_profile="cpu")
    assert app.AsyncResult(task_id).state == "REVOKED"
    app.backend.client.close()  # type: ignore[attr-defined]
    app.close()


def test_live_workers_are_those_with_a_heartbeat(client: FarmClient, standin: StandIn) -> None:
    standin.tell(resident=["abc"])
    standin.redis.hset(names.INCARNATIONS, "dead", '{"node": "gone", "ready": true}')
    standin.redis.hset(names.INCARNATIONS, "newer", "no json")
    standin.redis.set(names.beat("newer"), "1", ex=60)
    (worker,) = client.workers()
    assert (worker.node, worker.is_ready, worker.resident) == ("stand-in", True, frozenset({"abc"}))
    assert QUEUE in worker.queues


def test_a_client_can_be_closed_and_used_again(client: FarmClient, standin: StandIn) -> None:
    standin.start()
    assert client.run(call_for("a")).state == "succeeded"
    client.close()
    assert client.run(call_for("b")).state == "succeeded"
