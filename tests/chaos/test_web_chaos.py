"""A web process that dies at a step of a request: what it had published is answered once, what not was never there."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tasks import names
from tests.live import FAKE, LiveFarm, fake_spec
from tests.services import wait_until
from tests.web import start_web_of, stop_web


@pytest.fixture
def live(redis_url: str, database_url: str, tmp_path: Path) -> Iterator[LiveFarm]:
    farm = LiveFarm(redis_url, database_url, tmp_path)
    farm.add_models(fake_spec())
    farm.start_worker()
    yield farm
    farm.close()


@pytest.mark.parametrize(("point", "written"), [("web.before_publish", 0), ("web.published", 1), ("web.reply_read", 1)])
def test_a_web_process_that_dies_at_a_step(live: LiveFarm, point: str, written: int) -> None:
    web = start_web_of(live, FAULT=point)
    with pytest.raises(httpx.TransportError):
        web.http.post(f"/v1/encode/{FAKE}", json={"items": [{"text": "x"}]})
    wait_until(lambda: not live.redis.exists(names.OPEN) and live.waiting() == 0, 10, "the request to be settled")
    replies = [live.redis.llen(key) for key in live.redis.scan_iter("farm:replies:*")]
    assert sum(replies) == written
    web.process.kill()
    web.process.wait(10)
    web.http.close()
    live.assert_settled()


def test_a_request_goes_all_the_way_through_the_real_farm(live: LiveFarm) -> None:
    """Web, Redis, Celery worker, host and back: at once, as a task, cancelled, and refused."""
    web = start_web_of(live)
    wait_until(lambda: web.http.get("/readyz").status_code == 200, 10, "the farm to be ready")
    url = f"/v1/encode/{FAKE}"
    answer = web.http.post(url, json={"items": [{"text": "x", "id": "i"}]})
    assert answer.status_code == 200
    assert answer.json()["items"][0]["id"] == "i"
    assert {"X-Queue-Time", "X-Inference-Time", "X-Total-Time"} <= {name.title() for name in answer.headers}
    task = web.http.post(url, json={"items": [{"text": "later"}]}, params={"mode": "async"})
    assert task.status_code == 202
    view = web.http.get(f"/v1/tasks/{task.json()['task_id']}", params={"wait": 10}).json()
    assert view["state"] == "succeeded"
    for text in ("!sleep:2", "!sleep:2", "never"):
        task = web.http.post(url, json={"items": [{"text": text}]}, params={"mode": "async"})
    cancelled = web.http.delete(f"/v1/tasks/{task.json()['task_id']}").json()
    assert cancelled["state"] == "cancelled"
    failed = web.http.post(url, json={"items": [{"text": "!raise"}]})
    assert failed.json()["error"]["code"] == "INFERENCE_ERROR"
    live.assert_settled()
    stop_web(web)


def test_a_caller_that_goes_away_leaves_nothing_behind(live: LiveFarm) -> None:
    web = start_web_of(live)
    with pytest.raises(httpx.ReadTimeout):
        web.http.post(f"/v1/encode/{FAKE}", json={"items": [{"text": "!sleep:1"}]}, timeout=0.3)
    live.assert_settled()
    wait_until(lambda: not live.redis.keys("farm:replies:*"), 10, "its reply to be taken off the list")
    assert web.http.post(f"/v1/encode/{FAKE}", json={"items": [{"text": "next"}]}).status_code == 200
    stop_web(web)


def test_what_a_caller_has_left_is_never_computed_unless_it_was_running(live: LiveFarm) -> None:
    """Two micro-batches keep the host busy; what waits behind them would end it, were it computed."""
    web = start_web_of(live)
    url, worker = f"/v1/encode/{FAKE}", live.workers[0]
    hosts = worker.host_pids()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(web.http.post, url, json={"items": [{"text": "!sleep:2"}]})
        wait_until(lambda: worker.started() == 1, 10, "the first to run")
        next_one = live.send("!sleep:0.1")
        wait_until(lambda: worker.started() == 2, 10, "the second to be prepared")
        with pytest.raises(httpx.ReadTimeout):
            web.http.post(url, json={"items": [{"text": "!exit"}]}, timeout=0.3)
        wait_until(lambda: live.redis.zcard(names.OPEN) == 2, 10, "the third to be cancelled")
        assert running.result(20).status_code == 200
    live.wait_outcomes([next_one])
    live.assert_settled()
    assert worker.host_pids() == hosts
    stop_web(web)


@pytest.mark.parametrize(("point", "is_replayed"), [("web.before_publish", False), ("web.published", True)])
def test_a_retry_after_the_death_of_a_web_process_finds_what_was_published(
    live: LiveFarm, point: str, is_replayed: bool
) -> None:
    """By the idempotency key that both tries carry; what was published is computed once."""
    request = {"json": {"items": [{"text": "x"}]}, "headers": {"Idempotency-Key": "k"}}
    dies = start_web_of(live, FAULT=point)
    with pytest.raises(httpx.TransportError):
        dies.http.post(f"/v1/encode/{FAKE}", **request)
    dies.process.kill()
    dies.process.wait(10)
    dies.http.close()
    web = start_web_of(live)
    retried = web.http.post(f"/v1/encode/{FAKE}", **request)
    assert (retried.status_code, "Idempotency-Replayed" in retried.headers) == (200, is_replayed)
    assert len(live.redis.keys("farm:task:*")) == 1
    live.assert_settled()
    stop_web(web)
