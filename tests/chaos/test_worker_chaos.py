"""What dies and what happens: real processes, real signals, outcomes counted as written in Redis.

Each test proves the state it wants to hit before it strikes.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
import pytest

from tasks import names, scripts
from tasks.names import Lane, queue_name
from tests.live import POOL, PROFILE, LiveFarm, LiveWorker, fake_spec
from tests.lossy_line import LossyLine
from tests.services import PostgresServer, RedisServer, wait_until

SLOW = "fake/slow"
DEATHS_OF_64 = 8
"""64 requests in one micro-batch, then 32, 16, 8, 4 and 2, and twice the culprit alone."""
INTERACTIVE = queue_name(POOL, PROFILE, Lane.INTERACTIVE)


def build(redis_url: str, database_url: str, directory: Path, transport: str = "farm") -> LiveFarm:
    farm = LiveFarm(redis_url, database_url, directory, transport=transport)
    farm.add_models(fake_spec(), fake_spec(SLOW, item_ms=10))
    return farm


@pytest.fixture
def live(redis_url: str, database_url: str, tmp_path: Path) -> Iterator[LiveFarm]:
    farm = build(redis_url, database_url, tmp_path)
    yield farm
    farm.close()


@pytest.fixture(params=["farm", "redis"])
def stoppable(request: Any, own_redis: RedisServer, database_url: str, tmp_path: Path) -> Iterator[LiveFarm]:
    """On a Redis of its own, which the test may stop."""
    farm = build(own_redis.url, database_url, tmp_path, request.param)
    yield farm
    farm.close()


def wait_running(*workers: LiveWorker) -> None:
    wait_until(lambda: all(one.started() > 0 and one.held() > 0 for one in workers), 10, "a running batch of each")


def start_workers(farm: LiveFarm, count: int, **settings: Any) -> list[LiveWorker]:
    """So many, of which none can take all that is sent."""
    return [farm.start_worker(**settings) for _ in range(count)]


def die(worker: LiveWorker) -> None:
    worker.signal(signal.SIGKILL)
    worker.process.wait(10)


def test_a_killed_worker_loses_none_of_500_requests(live: LiveFarm) -> None:
    victim, other = live.start_worker(intake_max_messages=300), live.start_worker(intake_max_messages=300)
    tasks = live.send_many([str(n) for n in range(500)], model=SLOW)
    wait_running(victim)
    incarnation = victim.incarnation
    die(victim)
    struck_at = monotonic()
    assert live.redis.hlen(names.unacked(incarnation)) > 0
    wait_until(lambda: not live.redis.exists(names.unacked(incarnation)), 10, "its messages to be back in the queue")
    assert monotonic() - struck_at < 10
    live.wait_outcomes(tasks, timeout_s=60)
    live.assert_settled()
    assert other.process.poll() is None


def test_a_lone_workers_successor_finds_its_messages(live: LiveFarm) -> None:
    victim = live.start_worker()
    tasks = live.send_many([str(n) for n in range(100)], model=SLOW)
    wait_running(victim)
    die(victim)
    live.start_worker()
    live.wait_outcomes(tasks)
    live.assert_settled()


@pytest.mark.parametrize(
    "point",
    [
        "worker.popped",
        "worker.started",
        "worker.sent",
        "worker.batch_done",
        "worker.before_outcome",
        "worker.after_outcome",
    ],
)
def test_a_worker_that_dies_at_a_step_loses_and_repeats_nothing(live: LiveFarm, point: str) -> None:
    """One kill point per step of a request's life."""
    victim = live.start_worker(fault=point)
    tasks = live.send_many([str(n) for n in range(20)])
    assert victim.process.wait(15) == -signal.SIGKILL
    live.start_worker()
    outcomes = live.wait_outcomes(tasks)
    assert {outcome.state for outcome in outcomes} == {"succeeded"}
    live.assert_settled()


def test_a_message_that_is_lost_with_three_workers_is_given_up(live: LiveFarm) -> None:
    task = live.send("fatal")
    for _ in range(3):
        assert live.start_worker(ready=False, fault="worker.sent").process.wait(30) == -signal.SIGKILL
    live.start_worker()
    (outcome,) = live.wait_outcomes([task])
    assert outcome.error is not None
    assert outcome.error["code"] == "WORKER_LOST"
    letter = live.redis.lindex(names.DEAD_LETTERS, 0)
    assert task.encode() in letter
    live.assert_settled()


def test_a_frozen_worker_cannot_answer_after_it_was_judged_dead(live: LiveFarm) -> None:
    frozen, other = live.start_worker(), live.start_worker()
    tasks = live.send_many([str(n) for n in range(200)], model=SLOW)
    wait_running(frozen)
    former = frozen.incarnation
    frozen.signal(signal.SIGSTOP)
    wait_until(lambda: not live.redis.exists(names.beat(former)), 10, "its heartbeat to expire")
    wait_until(lambda: not live.redis.exists(names.unacked(former)), 10, "its messages to be returned")
    frozen.signal(signal.SIGCONT)
    live.wait_outcomes(tasks)
    wait_until(frozen.is_ready, 10, "the thawed worker to live under a new incarnation")
    assert frozen.incarnation != former
    other.signal(signal.SIGSTOP)
    again = live.send("after the thaw")
    live.wait_outcomes([again])
    other.signal(signal.SIGCONT)
    live.wait_outcomes(tasks)
    live.assert_settled()


def test_a_pop_whose_reply_is_lost_is_returned(live: LiveFarm) -> None:
    """Redis has executed the worker's own pop; the connection breaks before the worker hears of it."""
    with LossyLine(live.redis_url) as line:
        worker = live.start_worker(redis_url=line.url)
        incarnation = worker.incarnation
        line.lose(live.reply_to)  # every message holds it
        tasks = live.send_many(map(str, range(20)))
        assert line.has_caught.wait(10)
        assert (live.waiting(), worker.held(), worker.started()) == (0, len(tasks), 0)
        line.break_connection()
        outcomes = live.wait_outcomes(tasks)
        assert {outcome.state for outcome in outcomes} == {"succeeded"}
        assert worker.incarnation == incarnation
        live.assert_settled()


def test_what_is_recorded_as_a_workers_and_is_not_is_returned(live: LiveFarm) -> None:
    """The test pops in the worker's name and never tells it; the worker compares from time to time."""
    worker = live.start_worker()
    incarnation = worker.incarnation
    wait_until(lambda: worker.held() == 0, 20, "an idle worker")
    task, _, raw = live.message(["lost"])
    live.redis.zadd(names.OPEN, {task: live.clock.now() + 60})
    elsewhere = queue_name(POOL, "elsewhere", Lane.INTERACTIVE)
    live.redis.lpush(elsewhere, raw)
    keys = [
        names.beat(incarnation),
        names.closing(incarnation),
        names.unacked(incarnation),
        names.LOST,
        names.CANCELLED,
    ]
    live.redis.eval(scripts.source("pop"), 6, *keys, elsewhere, 1, 1, 0, 0, 0, names.bell(""), 1)
    record = live.redis.hget(names.unacked(incarnation), "0")
    assert record is not None
    wait_until(lambda: live.redis.llen(elsewhere) == 1, 12, "the message to be back in its queue")
    live.redis.rename(elsewhere, INTERACTIVE)
    live.wait_outcomes([task])
    live.assert_settled()


def test_a_full_redis_still_drains(own_redis: RedisServer, database_url: str, tmp_path: Path) -> None:
    farm = build(own_redis.url, database_url, tmp_path)
    try:
        worker = farm.start_worker()
        worker.signal(signal.SIGSTOP)
        tasks = farm.send_many([str(n) for n in range(100)])
        farm.redis.config_set("maxmemory", 1)
        with pytest.raises(Exception, match="maxmemory"):
            farm.redis.set("x", "y")
        worker.signal(signal.SIGCONT)
        wait_until(lambda: len(farm.outcomes()) == len(tasks), 20, "every outcome")
        farm.wait_outcomes(tasks)
        farm.assert_settled()
    finally:
        farm.redis.config_set("maxmemory", 0)
        farm.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_host_takes_no_request_with_it(live: LiveFarm, workers: int) -> None:
    worker, *others = start_workers(live, workers, intake_max_messages=50)
    tasks = live.send_many([str(n) for n in range(100)], model=SLOW)
    wait_running(worker, *others)
    (host,) = worker.host_pids()
    os.kill(host, signal.SIGKILL)
    outcomes = live.wait_outcomes(tasks)
    assert {outcome.state for outcome in outcomes} == {"succeeded"}
    assert worker.host_pids() != [host]
    live.assert_settled()


@pytest.mark.parametrize(("poison", "workers"), [("!segfault", 1), ("!exit", 1), ("!segfault", 2)])
def test_one_poisonous_request_of_64_fails_alone(live: LiveFarm, poison: str, workers: int) -> None:
    """In as many deaths as there are halvings, and one for the second time that it runs alone."""
    alive = start_workers(live, workers, intake_max_messages=64 // workers)
    for worker in alive:
        worker.signal(signal.SIGSTOP)
    tasks = live.send_many([poison if n == 37 else str(n) for n in range(64)])
    for worker in alive:
        worker.signal(signal.SIGCONT)
    states = [outcome.state for outcome in live.wait_outcomes(tasks, timeout_s=60)]
    assert states == ["failed" if n == 37 else "succeeded" for n in range(64)]
    assert all(worker.process.poll() is None for worker in alive)
    deaths = sum(worker.log.read_text(errors="replace").count('"event": "host_lost"') for worker in alive)
    assert DEATHS_OF_64 - workers < deaths <= DEATHS_OF_64
    live.assert_settled()


def test_a_hanging_request_is_cut_and_fails_alone(live: LiveFarm) -> None:
    worker = live.start_worker(hang_floor_s=1, hang_unmeasured_s=1)
    hosts = worker.host_pids()
    tasks = live.send_many(["a", "!hang", "b"])
    wait_until(lambda: worker.started() == len(tasks), 10, "the hang to be running")
    assert worker.host_pids() == hosts
    states = [outcome.state for outcome in live.wait_outcomes(tasks, timeout_s=30)]
    assert states == ["succeeded", "failed", "succeeded"]
    assert worker.host_pids() != hosts
    live.assert_settled()


@pytest.mark.parametrize(("stoppable", "workers"), [("farm", 1), ("redis", 1), ("farm", 2)], indirect=["stoppable"])
def test_redis_restarts_under_load_while_a_batch_runs(
    stoppable: LiveFarm, own_redis: RedisServer, workers: int
) -> None:
    alive = start_workers(stoppable, workers, intake_max_messages=100)
    tasks = stoppable.send_many([str(n) for n in range(300)], model=SLOW)
    if stoppable.transport == "farm":
        wait_running(*alive)
    else:  # kombu's own records do not tell what has been started
        wait_until(lambda: stoppable.outcomes() and alive[0].held() > 0, 10, "answers, and what is held")
    assert stoppable.waiting() > 0
    own_redis.stop()
    own_redis.start()
    stoppable.wait_outcomes([stoppable.send("after")], timeout_s=30)
    if stoppable.transport == "redis":  # kombu pops before it records: the one message on its way may be lost
        wait_until(lambda: len(stoppable.outcomes()) >= len(tasks), 30, "all but one outcome")
    else:
        stoppable.wait_outcomes(tasks, timeout_s=30)
        stoppable.assert_settled()
    assert all(worker.process.poll() is None for worker in alive)


def test_redis_away_for_longer_than_a_heartbeat(own_redis: RedisServer, database_url: str, tmp_path: Path) -> None:
    farm = build(own_redis.url, database_url, tmp_path)
    try:
        worker = farm.start_worker()
        tasks = farm.send_many([str(n) for n in range(200)], model=SLOW)
        wait_running(worker)
        own_redis.stop()
        gone_at = monotonic()
        wait_until(lambda: monotonic() - gone_at > 6, 10, "longer than a heartbeat lives")
        own_redis.start()
        farm.wait_outcomes(tasks, timeout_s=60)
        farm.assert_settled()
    finally:
        farm.close()


def test_serving_goes_on_without_postgres(redis_url: str, own_postgres: PostgresServer, tmp_path: Path) -> None:
    """Away for as long as it takes both lives of a worker to notice, which poll ten times as often as they would."""
    url = own_postgres.fresh_database()
    farm = build(redis_url, url, tmp_path)
    try:
        worker = farm.start_worker()
        own_postgres.stop()
        wait_until(lambda: "config_db_away" in worker.log.read_text(), 10, "a poll to fail")
        for turn in range(3):
            outcomes = farm.wait_outcomes(farm.send_many([f"without postgres {turn} {n}" for n in range(100)]))
            assert {outcome.state for outcome in outcomes} == {"succeeded"}
        assert "config_db_connected" not in worker.log.read_text().rpartition("config_db_away")[2]
        die(worker)
        successor = farm.start_worker(state_dir=tmp_path / worker.name)
        assert "the copy on disk" in successor.log.read_text()
        farm.wait_outcomes([farm.send("from the copy on disk")])
        own_postgres.start()
        farm.add_models(fake_spec("fake/later"))
        farm.wait_outcomes([farm.send("x", model="fake/later")])
        farm.assert_settled()
    finally:
        farm.close()


def test_sigterm_under_load_answers_what_runs_and_returns_the_rest(live: LiveFarm) -> None:
    worker = live.start_worker()
    tasks = live.send_many([str(n) for n in range(400)], model=SLOW)
    wait_running(worker)
    family = worker.family()
    asked_at = monotonic()
    assert worker.stop() == 0
    assert monotonic() - asked_at < 10
    psutil.wait_procs(family, timeout=3)
    assert not [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert live.incarnations() == {}
    assert not live.redis.keys("farm:unacked:*")
    answered = len(live.outcomes())
    assert 0 < answered < len(tasks)
    assert live.waiting() == len(tasks) - answered
    live.start_worker()
    live.wait_outcomes(tasks)
    live.assert_settled()


def test_a_batch_that_outlasts_its_grace_goes_back_to_the_queue(live: LiveFarm) -> None:
    worker = live.start_worker(drain_s=1)
    task = live.send("!sleep:30")
    wait_until(lambda: worker.started() == 1, 10, "a running batch")
    asked_at = monotonic()
    assert worker.stop() == 0
    assert monotonic() - asked_at > 1, "it did not wait for the running batch"
    assert live.waiting() == 1
    assert task not in live.outcomes()


def test_the_zygote_is_replaced(live: LiveFarm) -> None:
    worker = live.start_worker()
    live.wait_outcomes([live.send("before")])
    (zygote,) = [child for child in worker.family() if child.ppid() == worker.process.pid]
    zygote.kill()
    live.wait_outcomes([live.send("after")], timeout_s=20)
    assert worker.process.poll() is None
