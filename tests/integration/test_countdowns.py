"""Plain Celery producers' countdowns and expiries, as a worker holds them until their time has come."""

from collections.abc import Iterator
from time import monotonic
from typing import Any

import pytest
from celery import Celery

from tasks.app import build_app
from tasks.names import Lane, queue_name
from tests.live import FAKE, POOL, PROFILE, LiveFarm
from tests.services import wait_until

QUEUE = queue_name(POOL, PROFILE, Lane.STANDARD)
REQUEST = (FAKE, {"items": [{"text": "x"}]})


@pytest.fixture
def producer(live: LiveFarm) -> Iterator[Celery]:
    app = build_app(live.redis_url, farm_transport="redis", pool=POOL, machine_profile=PROFILE)
    yield app
    app.close()


def later(producer: Celery, count: int, **options: Any) -> list[Any]:
    return [producer.send_task("farm.encode", args=REQUEST, queue=QUEUE, **options) for _ in range(count)]


def test_parked_messages_keep_no_others_out(live: LiveFarm, producer: Celery) -> None:
    worker = live.start_worker(intake_max_messages=8)
    later(producer, 50, countdown=600)
    wait_until(lambda: worker.held() == 50, 10, "all of them to be held")
    answered = later(producer, 20)
    assert [one.get(timeout=10)["model"] for one in answered] == [FAKE] * 20
    live.wait_outcomes(live.send_many("abc"))


def test_a_parked_message_expires_while_it_is_parked(live: LiveFarm, producer: Celery) -> None:
    """And a countdown extends no expiry that its producer named."""
    live.start_worker()
    (one,) = later(producer, 1, countdown=600, expires=1.0)
    wait_until(lambda: one.state in {"FAILURE", "REVOKED"}, 10, "the parked task to expire")


def test_a_parked_message_outlives_a_lost_connection_and_runs_in_its_time(live: LiveFarm, producer: Celery) -> None:
    worker = live.start_worker()
    sent_at = monotonic()
    (one,) = later(producer, 1, countdown=4)
    wait_until(lambda: worker.held() == 1, 10, "it to be held")
    live.redis.client_kill_filter(_type="normal", skipme=True)
    wait_until(worker.is_ready, 10, "the worker to be back")
    assert one.get(timeout=15)["model"] == FAKE
    assert monotonic() - sent_at >= 4


def test_parked_messages_go_back_when_the_worker_stops(live: LiveFarm, producer: Celery) -> None:
    worker = live.start_worker()
    later(producer, 3, countdown=600)
    wait_until(lambda: worker.held() == 3, 10, "all of them to be held")
    assert worker.stop() == 0
    assert live.waiting(Lane.STANDARD) == 3
