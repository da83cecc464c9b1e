"""Large bodies and results through a real S3 server: web, worker and host are real, the model is not."""

import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import monotonic
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from common.clock import FarmClock
from common.errors import FarmError, ObjectStoreError, QueueFullError
from tasks import codec, names
from tasks.client import FarmClient
from tasks.objects import HOUR_S, IN_REDIS_BYTES, ObjectStore
from tests.fakes.family import fake_vector
from tests.integration.test_client import call_for, vectors
from tests.live import FAKE, LiveFarm, fake_spec
from tests.services import PostgresServer, RedisServer, wait_until
from tests.standin import StandIn, vector_of
from tests.web import Web, start_web_of, stop_web
from tests.weights import KEYS, BucketServer, serving_buckets
from workers.aside import Aside

MSGPACK = "application/msgpack"
PACKED = {"Content-Type": MSGPACK, "Accept": MSGPACK}
WIDE, WIDTH = "fake/wide", 40_000
LARGE_BODY = {"items": [{"text": "word " * 350_000} for _ in range(5)]}
LARGE_RESULT = {"items": [{"text": f"{at}"} for at in range(64)]}


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch, serving_buckets() as serving:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        patch.setenv("NO_PROXY", "*")
        yield serving


@pytest.fixture
def bucket(server: Any) -> BucketServer:
    made = BucketServer(*server, name=f"payloads-{uuid4().hex}")
    made.client.create_bucket(Bucket=made.name)
    return made


@pytest.fixture
def store(bucket: BucketServer) -> ObjectStore:
    return ObjectStore(bucket.uri, bucket.url)


@dataclass
class Served:
    """A farm with an object store."""

    live: LiveFarm
    web: Web
    bucket: BucketServer

    def post(self, model: str, body: Any, **rest: Any) -> Any:
        return self.web.http.post(f"/v1/encode/{model}", content=msgspec.msgpack.encode(body), headers=PACKED, **rest)

    def is_empty(self) -> bool:
        return not self.bucket.objects()


@pytest.fixture(scope="module")
def served(
    server: Any, redis_server: RedisServer, postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    bucket = BucketServer(*server, name=f"payloads-{uuid4().hex}")
    bucket.client.create_bucket(Bucket=bucket.name)
    live = LiveFarm(redis_server.url, postgres_server.fresh_database(), tmp_path_factory.mktemp("live"))
    live.add_models(fake_spec(), fake_spec(WIDE, dim=WIDTH))
    live.start_worker(object_store=bucket.uri, object_store_endpoint=bucket.url)
    settings = {"OBJECT_STORE": bucket.uri, "OBJECT_STORE_ENDPOINT": bucket.url}
    web = start_web_of(live, **settings)
    yield Served(live, web, bucket)
    stop_web(web)
    live.close()


def values_of(items: Any) -> list[list[float]]:
    return [codec.array_of(item["dense"]["values"]).tolist() for item in items]


def test_a_large_body_travels_through_the_store_and_is_deleted_with_the_outcome(served: Served) -> None:
    worker = served.live.workers[0]
    worker.signal(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(served.post, FAKE, LARGE_BODY)
        wait_until(lambda: served.live.redis.zcard(names.OPEN) == 1, 15, "the request to be published")
        stored = served.bucket.objects()
        worker.signal(signal.SIGCONT)
        assert [len(content) > IN_REDIS_BYTES for content in stored.values()] == [True]
        assert not served.live.redis.keys("farm:body:*")
        items = msgspec.msgpack.decode(answer.result(30).content)["items"]
    assert values_of(items) == [fake_vector(one["text"]).tolist() for one in LARGE_BODY["items"]]
    wait_until(served.is_empty, 15, "the body to be deleted")


def test_a_large_result_travels_through_the_store_and_is_deleted_when_read(served: Served) -> None:
    answer = served.post(WIDE, LARGE_RESULT)
    assert answer.status_code == 200
    assert len(answer.content) > IN_REDIS_BYTES
    result = msgspec.msgpack.decode(answer.content)
    assert values_of(result["items"][-1:]) == [fake_vector("63", WIDTH).tolist()]
    assert result["usage"]["input_tokens"] > 0
    assert served.is_empty()


def test_a_large_result_of_a_task_stays_as_long_as_the_task(served: Served) -> None:
    task_id = served.post(WIDE, LARGE_RESULT, params={"mode": "async"}).json()["task_id"]
    for _ in range(2):
        shown = served.web.http.get(f"/v1/tasks/{task_id}", params={"wait": 20}, headers={"Accept": MSGPACK})
        view = msgspec.msgpack.decode(shown.content)
        assert (view["state"], len(view["result"]["items"])) == ("succeeded", 64)
    assert served.live.redis.strlen(names.celery_meta(task_id)) < 1000
    assert len(served.bucket.objects()) == 1


def test_a_small_request_takes_no_way_round(served: Served) -> None:
    before = served.bucket.objects().keys()
    assert served.post(FAKE, {"items": [{"text": "small"}]}).status_code == 200
    assert served.bucket.objects().keys() == before


def test_what_nobody_came_for_is_swept_by_its_hour(bucket: BucketServer, store: ObjectStore) -> None:
    now = 500_000 * HOUR_S + 10.0
    past = [store.put(b"x", wanted_until=now - ago) for ago in (HOUR_S, 30 * HOUR_S)]
    wanted = store.put(b"y", wanted_until=now)
    bucket.put("elsewhere/1", b"not ours")
    assert store.sweep(now) == 2
    assert [store.get(name) for name in (*past, wanted)] == [None, None, b"y"]
    assert b"not ours" in bucket.objects().values()
    store.delete(wanted)
    store.delete(wanted)
    assert store.sweep(now) == 0


def test_a_refused_request_leaves_no_body(own_redis: RedisServer, bucket: BucketServer, store: ObjectStore) -> None:
    client = FarmClient(own_redis.url, queue_limit=1, result_ttl_s=60, objects=store)
    client.submit(call_for("fills the queue"))
    large = call_for("x" * (IN_REDIS_BYTES + 1))
    for publish in (client.submit, client.run):
        with pytest.raises(QueueFullError):
            publish(large)
    assert not bucket.objects()
    client.close()


def test_without_a_store_redis_takes_what_is_large(own_redis: RedisServer) -> None:
    client, standin = FarmClient(own_redis.url, queue_limit=10, result_ttl_s=60), StandIn(own_redis.url).start()
    text = "x" * (IN_REDIS_BYTES + 1)
    assert vectors(client.run(call_for(text))) == [vector_of(text)]
    assert not standin.redis.keys("farm:body:*")
    standin.stop()
    standin.redis.close()
    client.close()


def test_a_store_that_falls_silent_is_given_up(own_redis: RedisServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = ObjectStore("s3://any/thing", f"http://127.0.0.1:{silent.getsockname()[1]}")
        client = FarmClient(own_redis.url, queue_limit=10, result_ttl_s=60, objects=store)
        began_at = monotonic()
        with pytest.raises(ObjectStoreError) as refused:
            client.run(call_for("x" * (IN_REDIS_BYTES + 1)))
        assert monotonic() - began_at < 12
        assert refused.value.retry_after_s
        client.close()
    with own_redis.client() as redis:
        assert not redis.exists(names.OPEN)


def test_a_process_without_a_store_says_so(store: ObjectStore) -> None:
    told: list[Any] = []
    aside = Aside(None, FarmClock())
    aside.get(store.put(b"x", wanted_until=0), told.append)
    aside.tick()
    assert isinstance(told[0], FarmError)
    assert "set the same for all" in told[0].message
    aside.stop()


def test_a_store_that_is_away_is_one_clear_error(served: Served) -> None:
    """At last, as it does not come back."""
    served.bucket.server.stop()
    for model, body in ((FAKE, LARGE_BODY), (WIDE, LARGE_RESULT)):
        answer = served.post(model, body)
        assert (answer.status_code, answer.headers["X-SIE-Error-Code"]) == (503, "OBJECT_STORE_UNAVAILABLE")
        assert float(answer.headers["Retry-After"]) > 0
    assert served.post(FAKE, {"items": [{"text": "small"}]}).status_code == 200
    served.live.assert_settled()
