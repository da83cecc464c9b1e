"""The watcher of results against a real Redis: who watches is woken, and never left behind by a close."""

import threading

import pytest

from common.errors import FarmError, QueueUnavailableError
from tasks import names
from tasks.client import FarmClient
from tasks.names import Lane
from tasks.results import ResultWatcher
from tests.integration.test_client import call_for
from tests.services import RedisServer, wait_until

pytestmark = pytest.mark.integration


def test_closing_ends_a_watch_with_an_error_and_refuses_another(redis_url: str) -> None:
    watcher = ResultWatcher(redis_url)
    with watcher.watching("task") as watch:
        watcher.close()
        with pytest.raises(QueueUnavailableError, match="ask again"):
            watch.wait(20)
    with pytest.raises(QueueUnavailableError, match="ask again"), watcher.watching("task"):
        pass


def test_closing_a_client_ends_the_waits_for_its_tasks(redis_server: RedisServer, redis_url: str) -> None:
    client = FarmClient(redis_url, queue_limit=10, result_ttl_s=60)
    task_id = client.submit(call_for("a", lane=Lane.STANDARD))
    errors: list[FarmError] = []

    def wait_for_task() -> None:
        with pytest.raises(QueueUnavailableError) as caught:
            client.task(task_id, wait_s=60)
        errors.append(caught.value)

    waits = [threading.Thread(target=wait_for_task) for _ in range(4)]
    for wait in waits:
        wait.start()
    channel = names.celery_meta(task_id)
    with redis_server.client() as redis:
        wait_until(lambda: redis.pubsub_numsub(channel) == [(channel.encode(), 1)], 20, "the subscription")
        client.close()
        for wait in waits:
            wait.join(3)
        assert [error.code for error in errors] == ["QUEUE_UNAVAILABLE"] * 4
        assert all(error.retry_after_s for error in errors)
        wait_until(lambda: redis.pubsub_numsub(channel) == [(channel.encode(), 0)], 20, "the subscription to end")
    assert client.task(task_id).state == "queued", "the client connects anew"
    client.close()
