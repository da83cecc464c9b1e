"""A worker that a pool reserves, and what it holds at that moment, on both transports: real workers and servers."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from config_db import pools
from config_db.access import PoolSpec
from config_db.engine import open_engine
from tasks.names import LANES, queue_name
from tests.live import LiveFarm, LiveWorker, fake_spec
from tests.services import wait_until

WHO: Any = {"actor": "test", "reason": "test"}
MOVES_S = 20
SLOW = "fake/slow"


TRANSPORTS = ["farm", "redis"]


@pytest.fixture(params=TRANSPORTS)
def farm(request: Any, redis_url: str, database_url: str, tmp_path: Path) -> Iterator[LiveFarm]:
    live = LiveFarm(redis_url, database_url, tmp_path, transport=request.param)
    live.add_models(fake_spec(), fake_spec(SLOW, batch_ms=400))
    yield live
    live.close()


def reserve(farm: LiveFarm, name: str, workers: int) -> None:
    engine = open_engine(farm.database_url)
    with Session(engine) as session, session.begin():
        pools.lease(session, name, PoolSpec(machine_profiles={"cpu": workers}), **WHO)
    engine.dispose()


def drop(farm: LiveFarm, name: str) -> None:
    engine = open_engine(farm.database_url)
    with Session(engine) as session, session.begin():
        pools.delete(session, name, **WHO)
    engine.dispose()


def serves(worker: LiveWorker, pool: str) -> bool:
    told = worker.farm.incarnations()[worker.incarnation]
    return set(told["queues"]) == {queue_name(pool, "cpu", lane) for lane in LANES}


def start_two(farm: LiveFarm) -> list[LiveWorker]:
    workers = [farm.start_worker(ready=False, batch_max_items=4) for _ in range(2)]
    for worker in workers:
        wait_until(worker.is_ready, 40, "a worker to be ready")
    return workers


@pytest.mark.parametrize("farm", ["farm"], indirect=True)
def test_what_a_reserved_worker_has_not_started_goes_to_the_others(farm: LiveFarm) -> None:
    """Each request has one outcome, and the worker's backlog does not stand before the pool's requests."""
    workers = start_two(farm)
    sent = farm.send_many([f"text {at}" for at in range(160)], model=SLOW)
    wait_until(lambda: all(worker.held() > 20 for worker in workers), 10, "both workers to hold a backlog")
    reserve(farm, "p", 1)
    wait_until(lambda: any(serves(worker, "p") for worker in workers), MOVES_S, "one worker to be reserved")
    (reserved,) = [worker for worker in workers if serves(worker, "p")]
    wait_until(lambda: reserved.held() <= 8, 5, "the backlog to be given back")
    farm.wait_outcomes(sent, timeout_s=60)
    assert "held_returned" in reserved.log.read_text()
    farm.assert_settled()


@pytest.mark.parametrize("farm", ["redis"], indirect=True)
def test_on_the_fallback_a_reserved_worker_finishes_what_it_holds(farm: LiveFarm) -> None:
    """The records are kombu's, which would return them one by one; what comes from then on is the others'."""
    workers = start_two(farm)
    sent = farm.send_many([f"text {at}" for at in range(100)], model=SLOW)
    wait_until(lambda: not farm.waiting(), 10, "the workers to hold them all")
    reserve(farm, "p", 2)
    wait_until(lambda: all(serves(worker, "p") for worker in workers), MOVES_S, "both workers to be reserved")
    after = farm.send("nobody serves the shared queue now", model=SLOW)
    sent.append(farm.send("behind what was held", model=SLOW, pool="p"))
    farm.wait_outcomes(sent, timeout_s=60)
    assert after not in farm.outcomes()
    drop(farm, "p")
    farm.wait_outcomes([after], timeout_s=MOVES_S)
    farm.assert_settled()
    assert not any("held_returned" in worker.log.read_text() for worker in workers)


def test_what_comes_while_a_worker_moves_is_answered_once(farm: LiveFarm) -> None:
    """Also what arrives between the change of queues and the end of a sleep on those before it."""
    workers, sent = start_two(farm), list[str]()

    def until(moved: Callable[[], bool], what: str) -> None:
        def look() -> bool:
            sent.append(farm.send(f"text {len(sent)}"))
            return moved()

        wait_until(look, MOVES_S, what)

    until(lambda: len(sent) > 20, "requests to be under way")
    reserve(farm, "p", 1)
    until(lambda: any(serves(worker, "p") for worker in workers), "one worker to be reserved")
    sent.append(farm.send("of the pool", pool="p"))
    drop(farm, "p")
    until(lambda: all(serves(worker, "default") for worker in workers), "both workers to be shared")
    until(lambda: len(sent) > 200, "some more")
    farm.wait_outcomes(sent, timeout_s=30)
    farm.assert_settled()


def test_the_last_shared_worker_finishes_what_it_holds(farm: LiveFarm) -> None:
    """Nobody else would; what comes after that waits until it is shared again."""
    worker = farm.start_worker(batch_max_items=4, intake_max_messages=40)
    sent = farm.send_many([f"text {at}" for at in range(24)], model=SLOW)
    wait_until(lambda: worker.held() >= 20, 10, "the worker to hold them")
    reserve(farm, "p", 1)
    wait_until(lambda: serves(worker, "p"), MOVES_S, "the worker to be reserved")
    farm.wait_outcomes(sent, timeout_s=30)
    assert "held_returned" not in worker.log.read_text()
    waiting = farm.send("nobody serves the shared queue now")
    drop(farm, "p")
    wait_until(lambda: serves(worker, "default"), MOVES_S, "the worker to be shared")
    farm.wait_outcomes([waiting], timeout_s=20)
    farm.assert_settled()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_reserved_worker_keeps_its_queues_over_a_restart_of_redis(
    transport: str, own_redis: Any, database_url: str, tmp_path: Path
) -> None:
    farm = LiveFarm(own_redis.url, database_url, tmp_path, transport=transport)
    farm.add_models(fake_spec())
    worker = farm.start_worker()
    reserve(farm, "p", 1)
    wait_until(lambda: serves(worker, "p"), MOVES_S, "the worker to be reserved")
    own_redis.stop()
    own_redis.start()
    wait_until(lambda: worker.is_ready() and serves(worker, "p"), MOVES_S, "the worker to be back in its place")
    farm.wait_outcomes([farm.send("after", pool="p")], timeout_s=20)
    farm.close()
