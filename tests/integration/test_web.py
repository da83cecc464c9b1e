"""The web tier over real HTTP: gunicorn with gevent, a real Redis, and a stand-in for the worker."""

import json
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest
from sqlalchemy.orm import Session

from common.errors import InferenceError
from config_db.catalog import apply_models
from config_db.engine import open_engine
from tasks import codec, names
from tests.services import ROOT, RedisServer, free_port, wait_until
from tests.standin import QUEUE, SPECS, StandIn, vector_of
from tests.web import Web, gunicorn, start_web, stop_web

MSGPACK = "application/msgpack"
AS_JSON = {"Content-Type": "application/json"}


def test_an_encode_is_answered_in_json(web: Web, standin: StandIn) -> None:
    standin.start()
    body = {"items": [{"text": "hello", "id": "x"}, {"text": "na\u00efve \u4f60"}]}
    response = web.http.post("/v1/encode/org/m", json=body)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    answer = response.json()
    assert answer["model"] == "org/m"
    assert answer["items"] == [
        {"id": "x", "dense": {"dims": 2, "dtype": "float32", "values": vector_of("hello")}},
        {"dense": {"dims": 2, "dtype": "float32", "values": vector_of("na\u00efve \u4f60")}},
    ]
    assert answer["usage"]["input_tokens"] > 0
    assert set(answer["timing"]) == {"queue_ms", "tokenization_ms", "inference_ms", "postprocessing_ms", "total_ms"}
    headers = response.headers
    assert (headers["X-Queue-Time"], headers["X-Inference-Time"]) == ("1.50", "2.00")
    assert float(headers["X-Total-Time"]) > 0
    assert headers["X-SIE-Units-Input-Tokens"] == str(answer["usage"]["input_tokens"])
    assert headers["X-SIE-Request-ID"]
    assert headers["X-SIE-Model-Revision"]


@pytest.mark.parametrize(
    ("sent", "accept", "got"),
    [
        ("application/json", None, "application/json"),
        ("application/json", "*/*", "application/json"),
        ("application/json; charset=utf-8", "text/html", "application/json"),
        ("application/json", MSGPACK, MSGPACK),
        ("application/json", "application/x-msgpack, application/json", MSGPACK),
        (MSGPACK, "*/*", MSGPACK),
        (MSGPACK, MSGPACK, MSGPACK),
        ("application/x-msgpack", "application/json", "application/json"),
        (None, "application/json", "application/json"),
    ],
)
def test_any_format_in_and_any_format_out(
    web: Web, standin: StandIn, sent: str | None, accept: str | None, got: str
) -> None:
    standin.start()
    body = {"items": [{"text": "hello", "id": "x"}], "params": {"output_types": ["dense"]}}
    raw = msgspec.msgpack.encode(body) if "msgpack" in (sent or "") else json.dumps(body).encode()
    headers = {name: value for name, value in (("Content-Type", sent), ("Accept", accept)) if value is not None}
    request = web.http.build_request("POST", "/v1/encode/org/m", content=raw, headers=headers)
    if accept is None:
        del request.headers["Accept"]
    response = web.http.send(request)
    assert (response.status_code, response.headers["content-type"]) == (200, got)
    answer = msgspec.msgpack.decode(response.content) if got == MSGPACK else response.json()
    values = answer["items"][0]["dense"]["values"]
    assert (codec.array_of(values).tolist() if got == MSGPACK else values) == vector_of("hello")


def test_a_msgpack_array_is_the_map_that_public_clients_read(web: Web, standin: StandIn) -> None:
    standin.start()
    body = msgspec.msgpack.encode({"items": [{"text": "hello"}]})
    response = web.http.post("/v1/encode/org/m", content=body, headers={"Content-Type": MSGPACK, "Accept": MSGPACK})
    dense = msgspec.msgpack.decode(response.content)["items"][0]["dense"]
    assert set(dense) == {"dims", "dtype", "values"}
    values = dense["values"]
    assert set(values) == {b"nd", b"type", b"kind", b"shape", b"data"}
    assert (values[b"nd"], values[b"type"], values[b"shape"]) == (True, "<f4", [2])
    assert np.frombuffer(values[b"data"], "<f4").tolist() == vector_of("hello")


def test_many_callers_each_get_their_own_answer(web: Web, standin: StandIn) -> None:
    standin.start()
    limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
    with httpx.Client(base_url=web.http.base_url, limits=limits, timeout=30) as http, ThreadPoolExecutor(64) as pool:
        answers = list(
            pool.map(
                lambda at: http.post("/v1/encode/org/m", json={"items": [{"text": f"text {at}"}]}).json(), range(256)
            )
        )
    assert [answer["items"][0]["dense"]["values"] for answer in answers] == [
        vector_of(f"text {at}") for at in range(256)
    ]


def test_an_error_of_the_worker_has_its_status(web: Web, standin: StandIn) -> None:
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(web.encode, "bad")
        standin.answer(standin.take(), error=InferenceError("the model failed", details={"items": [{"index": 0}]}))
        answer = response.result(10)
    assert (answer.status_code, answer.headers["X-SIE-Error-Code"]) == (500, "INFERENCE_ERROR")
    assert answer.json()["error"] == {"code": "INFERENCE_ERROR", "message": "the model failed", "items": [{"index": 0}]}


def test_a_deadline_is_a_504(web: Web, standin: StandIn) -> None:
    response = web.encode("slow", headers={"X-Farmhand-Timeout": "0.1"})
    assert (response.status_code, response.json()["error"]["code"]) == (504, "DEADLINE_EXCEEDED")
    assert float(response.headers["Retry-After"]) > 0
    assert standin.redis.llen(QUEUE) == 1


@pytest.mark.parametrize("how", ["header", "query"])
def test_an_asynchronous_request_becomes_a_task(web: Web, standin: StandIn, how: str) -> None:
    rest = {"headers": {"Prefer": "respond-async"}} if how == "header" else {"params": {"mode": "async"}}
    accepted = web.encode("hello", **rest)
    assert (accepted.status_code, accepted.json()["state"]) == (202, "queued")
    task = accepted.headers["Location"]
    assert task == f"/v1/tasks/{accepted.json()['task_id']}"
    assert web.http.get(task).json()["state"] == "queued"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(web.http.get, task, params={"wait": 20})
        standin.answer(standin.take())
        shown = waiting.result(10).json()
    assert shown["state"] == "succeeded"
    assert shown["result"]["items"][0]["dense"]["values"] == vector_of("hello")
    packed = web.http.get(task, headers={"Accept": MSGPACK})
    values = msgspec.msgpack.decode(packed.content)["result"]["items"][0]["dense"]["values"]
    assert codec.array_of(values).tolist() == vector_of("hello")


def test_a_failed_task_shows_its_error(web: Web, standin: StandIn) -> None:
    task = web.encode("bad", headers={"Prefer": "respond-async"}).headers["Location"]
    standin.answer(standin.take(), error=InferenceError("the model failed"))
    shown = web.http.get(task)
    assert shown.status_code == 200
    assert (shown.json()["state"], shown.json()["error"]["code"]) == ("failed", "INFERENCE_ERROR")


def test_a_task_can_be_cancelled(web: Web, standin: StandIn) -> None:
    task = web.encode("a", params={"mode": "async"}).headers["Location"]
    assert web.http.delete(task).json()["state"] == "cancelled"
    assert web.http.delete(task).json()["state"] == "cancelled"
    assert standin.answer(standin.take()) == [0]
    assert web.http.get(task).json()["error"]["code"] == "CANCELLED"
    unknown = web.http.delete("/v1/tasks/no-such")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "TASK_NOT_FOUND")


def test_nothing_is_ever_redirected(web: Web) -> None:
    for path in (
        "/v1/models/",
        "/v1//models",
        "/v1/encode/org/m/",
        "/healthz/",
        "//healthz",
        "/v1/encode//org/m",
        "/v1/tasks/x/",
    ):
        for method in ("GET", "POST"):
            response = web.http.request(method, path, content=b"{}", headers={"Content-Type": "application/json"})
            assert not 300 <= response.status_code < 400, (method, path)


def test_hostile_headers_change_nothing(web: Web, standin: StandIn) -> None:
    standin.start()
    hostile = {
        "X-Request-Id": 'x" onload=alert(1)',
        "X-SIE-Pool": "../../etc",
        "X-Forwarded-For": "1.2.3.4, ; drop table",
        "farm": '{"model": "other"}',
        "reply_to": "farm:replies:other",
        "Prefer": "return=minimal; wait=" + "9" * 1000,
    }
    pool = hostile.pop("X-SIE-Pool")
    response = web.encode("hello", headers=hostile)
    assert response.status_code == 200
    assert response.headers["X-SIE-Request-ID"] != hostile["X-Request-Id"]
    for asked, status in ((pool, 400), ("other", 404), ("a" * 5000, 400)):
        refused = web.encode("hello", headers={"X-SIE-Pool": asked})
        assert (refused.status_code, refused.json()["error"]["param"]) == (status, "X-SIE-Pool")
    refused = web.encode("hello", headers={"X-SIE-MACHINE-PROFILE": "l4"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "X-SIE-MACHINE-PROFILE")
    assert web.encode("hello", headers={"X-SIE-Pool": "default", "X-SIE-MACHINE-PROFILE": "CPU"}).status_code == 200


def test_a_pool_that_a_worker_serves_can_be_asked_for(web: Web, standin: StandIn) -> None:
    standin.tell(pool="tenant-a", machine_profile="l4", queues=["farm.tenant-a.l4.interactive"])
    headers = {"X-SIE-Pool": "tenant-a", "X-SIE-MACHINE-PROFILE": "l4", "X-Farmhand-Timeout": "0.1"}
    wait_until(lambda: web.encode("a", headers=headers).status_code == 504, 10, "the pool to be known")
    assert standin.redis.llen("farm.tenant-a.l4.interactive") >= 1


def test_ready_only_once_a_request_would_succeed(web: Web, standin: StandIn) -> None:
    standin.fall_silent()
    response = web.http.get("/readyz")
    assert (response.status_code, response.json()["status"]) == (503, "not_ready")
    standin.tell(ready=False)
    assert web.http.get("/readyz").status_code == 503
    standin.tell(queues=["farm.other.cpu.interactive"])
    assert web.http.get("/readyz").status_code == 503
    standin.tell()
    assert (web.http.get("/readyz").status_code, web.http.get("/readyz").json()["status"]) == (200, "ready")
    standin.tell(transport="redis")
    assert (web.http.get("/readyz").status_code, web.http.get("/readyz").json()["status"]) == (200, "degraded")
    standin.fall_silent()
    assert web.http.get("/readyz").status_code == 503


def test_models_tell_whether_they_are_loaded(web: Web, standin: StandIn) -> None:
    digest = web.http.get("/v1/models").json()["models"]
    assert [info["name"] for info in digest] == ["org/m", "org/rank"]
    standin.start()
    spec = web.encode("a").headers["X-SIE-Model-Revision"]
    standin.tell(resident=[spec])
    wait_until(lambda: web.http.get("/v1/models/org/m").json()["loaded"], 20, "the model to be shown as loaded")
    assert web.http.get("/v1/models/org/m").json()["state"] == "loaded"


def test_a_body_over_512_kib_and_one_over_34_mib(web: Web, standin: StandIn) -> None:
    standin.start()
    text = "y" * 600 * 1024
    assert web.encode(text).json()["items"][0]["dense"]["values"] == vector_of(text)
    refused = web.http.post("/v1/encode/org/m", content=b"x" * (34 * 2**20 + 1), headers=AS_JSON)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "INPUT_TOO_LONG")
    chunked = web.http.post("/v1/encode/org/m", content=iter([b"x" * 2**20] * 35), headers=AS_JSON)
    assert (chunked.status_code, chunked.json()["error"]["code"]) == (413, "INPUT_TOO_LONG")


def test_a_caller_that_goes_away_leaves_nothing_behind(web: Web, standin: StandIn) -> None:
    body = b'{"items": [{"text": "a"}]}'
    head = b"POST /v1/encode/org/m HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nX-Farmhand-Timeout: 2\r\n"
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", web.port)) as gone:
            gone.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            taken = standin.take()
        assert taken.task_id
    wait_until(lambda: not standin.redis.exists(names.OPEN), 10, "the web process to close the tasks nobody waits for")
    standin.start()
    assert web.encode("still here").status_code == 200


def test_slow_and_idle_connections_do_not_hold_up_others(web: Web, standin: StandIn) -> None:
    standin.start()
    slow = [socket.create_connection(("127.0.0.1", web.port)) for _ in range(200)]
    try:
        for at, connection in enumerate(slow):
            connection.sendall(
                b"POST /v1/encode/org/m HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n" + (b"\r\n{" if at % 2 else b"")
            )
        started_at = time.monotonic()
        assert web.encode("quick").status_code == 200
        assert time.monotonic() - started_at < 5
    finally:
        for connection in slow:
            connection.close()


def test_redis_away_is_a_503_in_time_and_forgotten_when_it_is_back(own_redis: RedisServer, tmp_path: Path) -> None:
    web, standin = start_web(own_redis.url, tmp_path), StandIn(own_redis.url).start()
    assert web.encode("before").status_code == 200
    own_redis.kill()
    started_at = time.monotonic()
    response = web.encode("while away")
    assert time.monotonic() - started_at < 3
    assert (response.status_code, response.json()["error"]["code"]) == (503, "QUEUE_UNAVAILABLE")
    assert float(response.headers["Retry-After"]) > 0
    assert web.http.get("/readyz").status_code == 503
    own_redis.start()
    back_at = time.monotonic()
    wait_until(lambda: web.encode("back").status_code == 200, 5, "requests to succeed again")
    assert time.monotonic() - back_at < 5
    standin.stop()
    stop_web(web)


def test_shutdown_answers_what_it_has_taken(own_redis: RedisServer, tmp_path: Path) -> None:
    web, standin = start_web(own_redis.url, tmp_path), StandIn(own_redis.url).tell()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(web.encode, f"{at}") for at in range(4)]
        taken = [standin.take() for _ in range(4)]
        web.process.send_signal(signal.SIGTERM)
        standin.answer(*taken)
        assert [response.result(10).status_code for response in waiting] == [200] * 4
    web.process.wait(10)
    web.http.close()


def test_a_hurried_shutdown_tells_who_waits_to_try_again(own_redis: RedisServer, tmp_path: Path) -> None:
    """As at the end of a whole farm: the workers are gone, and nobody will answer."""
    web, standin = start_web(own_redis.url, tmp_path), StandIn(own_redis.url).tell()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(web.encode, f"{at}") for at in range(4)]
        taken = [standin.take() for _ in range(4)]
        assert own_redis.client().zcard(names.OPEN) == len(taken)
        web.process.send_signal(signal.SIGTERM)
        web.process.send_signal(signal.SIGQUIT)
        responses = [response.result(10) for response in waiting]
    assert {response.status_code for response in responses} == {503}
    assert {response.json()["error"]["code"] for response in responses} == {"QUEUE_UNAVAILABLE"}
    assert all(float(response.headers["Retry-After"]) > 0 for response in responses)
    assert not own_redis.client().exists(names.OPEN)
    web.process.wait(10)
    web.http.close()


def test_the_real_application_serves_what_the_config_db_says(redis_url: str, database_url: str, tmp_path: Path) -> None:
    engine = open_engine(database_url)
    with Session(engine) as session, session.begin():
        apply_models(session, [SPECS[0]], actor="test", reason="test")
    engine.dispose()
    web, standin = start_web(redis_url, tmp_path, application=(), DATABASE_URL=database_url), StandIn(redis_url).start()
    assert [info["name"] for info in web.http.get("/v1/models").json()["models"]] == ["org/m"]
    assert web.encode("hello").json()["items"][0]["dense"]["values"] == vector_of("hello")
    unknown = web.http.post("/v1/encode/org/n", json={"items": [{"text": "a"}]}).json()["error"]
    assert (unknown["code"], unknown["nearest"]) == ("MODEL_NOT_FOUND", ["org/m"])
    standin.tell()
    assert web.http.get("/readyz").json()["status"] == "ready"
    standin.stop()
    stop_web(web)


def test_without_a_config_db_it_says_so_in_one_line_and_gives_up(redis_url: str, tmp_path: Path) -> None:
    command, environment = gunicorn(redis_url, tmp_path, free_port(), (), DATABASE_URL="postgresql://127.0.0.1:1/none")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert done.stderr.count("web_cannot_start") == 1
