"""A worker and its Redis when something is wrong but not dead: read-only, full, a heartbeat lost, a hurried end."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks import names
from tasks.names import Lane, queue_name
from tests.live import POOL, PROFILE, LiveFarm, fake_spec
from tests.services import RedisServer, free_port, wait_until

SLOW = "fake/slow"
INTERACTIVE = queue_name(POOL, PROFILE, Lane.INTERACTIVE)


@pytest.fixture
def live(own_redis: RedisServer, database_url: str, tmp_path: Path) -> Iterator[LiveFarm]:
    farm = LiveFarm(own_redis.url, database_url, tmp_path)
    farm.add_models(fake_spec(), fake_spec(SLOW, item_ms=20))
    yield farm
    farm.close()


def test_a_redis_that_turns_read_only_and_back_ends_no_worker(live: LiveFarm) -> None:
    """As in a failover: writes are refused, then taken again."""
    worker = live.start_worker()
    live.wait_outcomes(live.send_many("abc"))
    live.redis.replicaof("127.0.0.1", free_port())
    wait_until(lambda: "read only replica" in worker.log.read_text(), 10, "the worker to be refused")
    live.redis.replicaof("NO", "ONE")
    live.wait_outcomes(live.send_many("def"), timeout_s=30)
    assert worker.process.poll() is None
    live.assert_settled()


def test_a_worker_comes_to_a_full_redis_and_empties_it(live: LiveFarm) -> None:
    tasks = live.send_many([str(n) for n in range(200)])
    live.redis.config_set("maxmemory", 1)
    with pytest.raises(Exception, match="maxmemory"):
        live.redis.set("more", 1)
    live.start_worker(ready=False)
    wait_until(lambda: not live.waiting() and not live.redis.exists(names.OPEN), 30, "the queue to be empty")
    live.redis.config_set("maxmemory", 0)
    live.wait_outcomes(tasks)


@pytest.mark.parametrize("transport", ["farm", "redis"])
def test_a_worker_judged_dead_answers_each_request_once(
    transport: str, own_redis: RedisServer, database_url: str, tmp_path: Path
) -> None:
    farm = LiveFarm(own_redis.url, database_url, tmp_path, transport=transport)
    farm.add_models(fake_spec(SLOW, item_ms=20))
    try:
        worker = farm.start_worker(batch_max_items=8)
        tasks = farm.send_many([str(n) for n in range(200)], model=SLOW)
        wait_until(lambda: farm.outcomes() and worker.held() > 8, 10, "answers, and messages that are held")
        former = worker.incarnation
        farm.redis.delete(names.beat(former))
        wait_until(worker.is_ready, 10, "the worker to be born again")
        assert worker.incarnation != former
        farm.wait_outcomes(tasks, timeout_s=30)  # on kombu's transport it takes an hour for what is dropped to be back
    finally:
        farm.close()


def test_records_that_nobody_has_read_go_back_at_shutdown(live: LiveFarm) -> None:
    """A pop whose reply was never read leaves records that the intake knows nothing of."""
    worker = live.start_worker(queues=[queue_name(POOL, PROFILE, Lane.BATCH)])
    _, _, raw = live.message(["x"])
    live.redis.hset(names.unacked(worker.incarnation), 10**12, INTERACTIVE.encode() + b"\n" + raw)
    incarnation = worker.incarnation
    assert worker.stop() == 0
    assert live.redis.lrange(INTERACTIVE, 0, -1) == [raw]
    assert not live.redis.exists(names.unacked(incarnation), names.started(incarnation), names.beat(incarnation))


def test_a_cold_shutdown_gives_back_what_runs(live: LiveFarm) -> None:
    worker = live.start_worker(batch_max_items=8)
    tasks = live.send_many([str(n) for n in range(50)], model=SLOW)
    wait_until(lambda: worker.started() > 0 and worker.held() > 0, 10, "a running batch")
    worker.signal(signal.SIGQUIT)
    worker.process.wait(15)
    answered = set(live.outcomes())
    assert live.waiting() == len(tasks) - len(answered) > 0
    live.start_worker()
    live.wait_outcomes(tasks)
    live.assert_settled()
