"""Requests under an idempotency key, over real HTTP and a real Redis: computed once, answered as often as they come."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest

from common.errors import (
    CapacityError,
    FarmError,
    IdempotencyError,
    InferenceError,
    ModelLoadError,
    QueueFullError,
    QueueUnavailableError,
    RequestError,
)
from tasks import names
from tasks.client import FarmClient
from tasks.messages import INLINE_BODY_BYTES
from tasks.once import KEPT_S, once
from tests.integration.test_client import call_for, vectors
from tests.services import RedisServer, wait_until
from tests.standin import QUEUE, StandIn, vector_of
from tests.web import Web

KEY = {"Idempotency-Key": "order-17"}
ENCODE = ("/v1/encode/org/m", {"items": [{"text": "a"}]})
INFER = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}]}


@pytest.fixture
def client(redis_url: str) -> Iterator[FarmClient]:
    client = FarmClient(redis_url, queue_limit=2, result_ttl_s=600)
    yield client
    client.close()


def answers(response: httpx.Response) -> tuple[int, str | None, Any]:
    """Status, whether the answer is an earlier request's, and what was answered, without its times."""
    body = response.json()
    body.pop("timing", None)
    return response.status_code, response.headers.get("Idempotency-Replayed"), body


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ENCODE,
        ("/v1/embeddings", {"model": "org/m", "input": "a"}),
        ("/v2/models/org/m/infer", INFER),
    ],
)
def test_the_same_request_is_computed_once(web: Web, standin: StandIn, path: str, body: dict[str, Any]) -> None:
    with ThreadPoolExecutor(3) as pool:
        first = [pool.submit(web.http.post, path, json=body, headers=KEY) for _ in range(3)]
        taken = standin.take()
        wait_until(lambda: len(standin.redis.pubsub_channels("celery-task-meta-*")) == 1, 10, "somebody to wait for it")
        standin.answer(taken)
        together = [answers(one.result(15)) for one in first]
    again = answers(web.http.post(path, json=body, headers=KEY))
    assert again[:2] == (200, "true")
    assert sorted(str(replayed) for _, replayed, _ in together) == ["None", "true", "true"]
    assert all(said == again[2] for _, _, said in together)
    assert standin.redis.llen(QUEUE) == 0
    assert not standin.redis.exists(names.OPEN)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/score/org/rank", {"query": {"text": "q"}, "items": [{"text": "a"}]}),
        ("/v1/rerank", {"model": "org/rank", "query": "q", "documents": ["a"]}),
        (*ENCODE[:1], {**ENCODE[1], "params": {"output_dtype": "float16"}}),
        ("/v1/embeddings", {"model": "org/m", "input": "a", "encoding_format": "base64"}),
        ("/v2/models/org/m/infer", {**INFER, "id": "x"}),
    ],
)
def test_another_request_under_the_same_key_is_refused(
    web: Web, standin: StandIn, path: str, body: dict[str, Any]
) -> None:
    standin.start()
    assert web.http.post(ENCODE[0], json=ENCODE[1], headers=KEY).status_code == 200
    refused = web.http.post(path, json=body, headers=KEY)
    assert (refused.status_code, refused.headers["X-SIE-Error-Code"]) == (422, "IDEMPOTENCY_MISMATCH")
    assert "error" in refused.json()


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "caf\xe9", "tab\there"])
@pytest.mark.parametrize("path", ["/v1/encode/org/m", "/v1/embeddings"])
def test_a_key_that_is_none_is_refused(web: Web, standin: StandIn, path: str, key: str) -> None:
    body = ENCODE[1] if "encode" in path else {"model": "org/m", "input": "a"}
    refused = web.http.post(path, json=body, headers={"Idempotency-Key": key.encode("latin-1")})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "Idempotency-Key")
    assert standin.redis.llen(QUEUE) == 0


def test_a_caller_that_leaves_finds_its_outcome_when_it_comes_back(web: Web, standin: StandIn) -> None:
    """What it has asked without a key is cancelled meanwhile, so it was seen to leave."""
    raw = json.dumps(ENCODE[1]).encode()
    head = f"POST {ENCODE[0]} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n"
    taken = []
    for more in ("Idempotency-Key: order-17\r\n", ""):
        with socket.create_connection(("127.0.0.1", web.port)) as connection:
            connection.sendall(f"{head}{more}\r\n".encode() + raw)
            taken.append(standin.take())
    wait_until(lambda: standin.redis.zscore(names.OPEN, taken[1].task_id) is None, 10, "who left to be seen")
    assert standin.answer(*taken) == [1, 0]
    again = web.http.post(ENCODE[0], content=raw, headers={**KEY, "Content-Type": "application/json"})
    assert answers(again)[:2] == (200, "true")


def test_a_task_under_a_key_is_one_task_and_its_waiting_request_the_same(web: Web, standin: StandIn) -> None:
    tasks = [web.http.post(*ENCODE[:1], json=ENCODE[1], headers=KEY, params={"mode": "async"}) for _ in range(2)]
    assert [task.status_code for task in tasks] == [202, 202]
    assert tasks[0].json()["task_id"] == tasks[1].json()["task_id"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(web.http.post, ENCODE[0], json=ENCODE[1], headers=KEY)
        standin.answer(standin.take())
        assert waiting.result(15).json()["items"][0]["dense"]["values"] == vector_of("a")


def test_key_record_and_result_are_kept_for_a_day(client: FarmClient, standin: StandIn) -> None:
    standin.start()
    use = once("default", "k", b"r")
    outcome, _ = client.run_once(call_for("a"), use)
    for key in (use.name, names.task_record(outcome.task_id), names.celery_meta(outcome.task_id)):
        assert KEPT_S - 100 < standin.redis.ttl(key) <= KEPT_S, key


def test_a_key_is_its_tenants(client: FarmClient, standin: StandIn) -> None:
    standin.start()
    ours, _ = client.run_once(call_for("ours"), once("default", "k", b"ours"))
    call = replace(call_for("theirs"), tenant="acme")
    theirs, is_replayed = client.run_once(call, once("acme", "k", b"theirs"))
    assert (vectors(ours), vectors(theirs), is_replayed) == ([vector_of("ours")], [vector_of("theirs")], False)


@pytest.mark.parametrize(
    ("error", "is_kept"),
    [
        (InferenceError("the model failed"), True),
        (RequestError("no such label"), True),
        (CapacityError("no room"), False),
        (ModelLoadError("not there"), False),
    ],
)
def test_a_failure_is_kept_if_another_try_would_fail_as_well(
    client: FarmClient, standin: StandIn, error: FarmError, is_kept: bool
) -> None:
    use = once("default", "k", b"r")
    first = client.submit_once(call_for("a"), use)
    standin.answer(standin.take(), error=error)
    second = client.submit_once(call_for("a"), use)
    assert second.is_replayed == is_kept
    assert (first.task_id == second.task_id) == is_kept
    if not is_kept:  # what comes after it finds the second
        assert client.submit_once(call_for("a"), use).task_id == second.task_id


def test_a_task_that_was_cancelled_or_forgotten_leaves_its_key(client: FarmClient, standin: StandIn) -> None:
    use = once("default", "k", b"r")
    cancelled = client.submit_once(call_for("a"), use)
    client.cancel(cancelled.task_id)
    standin.take()
    forgotten = client.submit_once(call_for("a"), use)
    assert not forgotten.is_replayed
    standin.redis.delete(names.task_record(forgotten.task_id))
    assert not client.submit_once(call_for("a"), use).is_replayed


def test_many_that_find_a_key_left_publish_once(client: FarmClient, standin: StandIn, redis_url: str) -> None:
    use, other = once("default", "k", b"r"), FarmClient(redis_url, queue_limit=2, result_ttl_s=600)
    client.cancel(client.submit_once(call_for("a"), use).task_id)
    standin.take()
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda at: (client, other)[at % 2].submit_once(call_for("a"), use), range(32)))
    other.close()
    assert len({one.task_id for one in found}) == 1
    assert sum(not one.is_replayed for one in found) == 1
    assert standin.redis.llen(QUEUE) == 1


def test_a_refused_request_takes_no_key_and_a_replay_is_not_refused(client: FarmClient, standin: StandIn) -> None:
    use, late = once("default", "k", b"r"), once("default", "late", b"r")
    first = client.submit_once(call_for("a"), use)
    client.submit(call_for("fills the queue"))
    with pytest.raises(QueueFullError):
        client.submit_once(call_for("b"), late)
    assert not standin.redis.exists(late.name)
    assert client.submit_once(call_for("a"), use).task_id == first.task_id
    standin.take()
    assert not client.submit_once(call_for("b"), late).is_replayed


def test_a_publish_that_failed_takes_no_key(own_redis: RedisServer) -> None:
    client, use = FarmClient(own_redis.url, queue_limit=10, result_ttl_s=600), once("default", "k", b"r")
    client.submit(call_for("before"))
    own_redis.stop()
    with pytest.raises(QueueUnavailableError):
        client.submit_once(call_for("a"), use)
    own_redis.start()
    assert not client.submit_once(call_for("a"), use).is_replayed
    client.close()


def test_a_large_body_that_was_not_needed_is_not_kept(client: FarmClient, standin: StandIn) -> None:
    use, text = once("default", "k", b"r"), "x" * INLINE_BODY_BYTES
    client.submit_once(call_for(text), use)
    assert client.submit_once(call_for(text), use).is_replayed
    assert len(standin.redis.keys("farm:body:*")) == 1
    with pytest.raises(IdempotencyError):
        client.submit_once(call_for(text), once("default", "k", b"other"))
    assert len(standin.redis.keys("farm:body:*")) == 1


def test_a_request_without_a_key_stands_nowhere(web: Web, standin: StandIn) -> None:
    standin.start()
    assert web.http.post(ENCODE[0], json=ENCODE[1]).status_code == 200
    assert not standin.redis.keys("farm:once:*")
    assert not standin.redis.keys("farm:task:*")
