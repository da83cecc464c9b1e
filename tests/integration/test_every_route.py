"""What each inference route refuses, in its protocol's shape: hostile bodies, headers and keys. Nothing is queued."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from time import monotonic
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from flask.testing import FlaskClient

from common.settings import WebSettings
from config_db.access import KeySpec
from config_db.snapshot import Snapshot
from config_db.spec import Access, ModelSpec, Source
from tasks import names
from tasks.client import FarmClient
from tests.services import RedisServer
from tests.standin import SPECS, StandIn, StaticSnapshots
from webapp.app import create_app

MODELS = (
    *SPECS,
    ModelSpec(id="org/x", family="fake", source=Source(path="/"), operations=("extract",), outputs=("json",)),
)
OTHERS = tuple(
    msgspec.structs.replace(spec, id=f"{spec.id}-other", access=Access(tenants=("other",))) for spec in MODELS
)
ITEMS = [{"text": "a"}]
TENSOR = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "encode": ("/v1/encode/org/m", {"items": ITEMS}),
    "score": ("/v1/score/org/rank", {"query": {"text": "q"}, "items": ITEMS}),
    "extract": ("/v1/extract/org/x", {"items": ITEMS}),
    "embeddings": ("/v1/embeddings", {"model": "org/m", "input": "a"}),
    "rerank": ("/v1/rerank", {"model": "org/rank", "query": "q", "documents": ["a"]}),
    "infer": ("/v2/models/org/m/infer", {"inputs": [TENSOR]}),
}
every_route = pytest.mark.parametrize("route", ROUTES)
JSON, MSGPACK = "application/json", "application/msgpack"


def key_of(secret: str, **options: Any) -> tuple[str, KeySpec, str]:
    """Id, spec and text of an API key."""
    key_id, secret = sha256(secret.encode()).hexdigest()[:16], sha256(secret.encode()).hexdigest()
    hashed = sha256(secret.encode()).hexdigest()
    now = datetime.now(UTC)
    spec = KeySpec(tenant="acme", secret_sha256=hashed, prefix="fh", created_at=now, **options)
    return key_id, spec, f"fh_{key_id}_{secret}"


AGO = datetime.now(UTC) - timedelta(hours=1)
GOOD, EXPIRED, REVOKED, CONFIG = (
    key_of("good"),
    key_of("expired", expires_at=AGO),
    key_of("revoked", revoked_at=AGO),
    key_of("config", scopes=("config",)),
)


def application(redis_url: str, **settings: Any) -> tuple[FlaskClient, FarmClient]:
    found = WebSettings(redis_url=redis_url, max_body_bytes=4 * 2**20, **settings)
    client = FarmClient(redis_url, queue_limit=100, result_ttl_s=60)
    snapshots = StaticSnapshots()
    keys = {key_id: spec for key_id, spec, _ in (GOOD, EXPIRED, REVOKED, CONFIG)}
    snapshots.current = Snapshot(3, uuid4(), {spec.id: spec for spec in (*MODELS, *OTHERS)}, keys=keys)
    return create_app(found, snapshots, client).test_client(), client


@pytest.fixture(scope="module")
def web(redis_server: RedisServer) -> Iterator[FlaskClient]:
    web, client = application(redis_server.url)
    yield web
    client.close()


@pytest.fixture(scope="module")
def closed_web(redis_server: RedisServer) -> Iterator[FlaskClient]:
    web, client = application(redis_server.url, auth="keys")
    yield web
    client.close()


@pytest.fixture(autouse=True)
def standin(redis_url: str) -> Iterator[StandIn]:
    """Nobody serves; at the end, nothing may have been queued but what the test has taken."""
    standin = StandIn(redis_url)
    yield standin
    assert not standin.redis.keys(f"{names.QUEUE_PREFIX}*")
    assert not standin.redis.exists(names.OPEN)
    assert not standin.redis.keys("farm:body:*")
    standin.redis.close()


def post(web: FlaskClient, route: str, body: Any = None, kind: str = JSON, **headers: str) -> Any:
    path, good = ROUTES[route]
    raw = body if isinstance(body, bytes) else json.dumps(good if body is None else body).encode()
    return web.post(path, data=raw, content_type=kind, headers=headers)


def refused(response: Any, route: str, *statuses: int) -> str:
    """The code of an error, which has the shape of its protocol and tells nothing of the inside."""
    assert response.status_code in statuses, response.text
    error = response.json["error"]
    text = error if route == "infer" else error["message"]
    assert isinstance(text, str)
    assert text
    assert len(response.data) < 20_000
    assert "Traceback" not in response.text
    return str(response.headers["X-SIE-Error-Code"])


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


HOSTILE_JSON: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "empty": lambda _: b"",
    "no JSON": lambda _: b"hello",
    "cut off": lambda good: json.dumps(good).encode()[:-2],
    "more behind": lambda good: json.dumps(good).encode() + b"{}",
    "a list": lambda _: b"[]",
    "a number": lambda _: b"1",
    "null": lambda _: b"null",
    "nothing in it": lambda _: b"{}",
    "deep": lambda _: nested(200_000),
    "deep in every field": lambda good: b"{%s}" % b",".join(b'"%s":%s' % (n.encode(), nested(5000)) for n in good),
    "fields of another kind": lambda good: json.dumps(dict.fromkeys(good, 7)).encode(),
    "empty fields": lambda good: json.dumps(dict.fromkeys(good, "")).encode(),
    "invalid UTF-8": lambda good: json.dumps(good).encode().replace(b'"a"', b'"\xff\xfe"'),
    "a lone surrogate": lambda good: json.dumps(good).encode().replace(b'"a"', b'"\\ud800"'),
    "a number without end": lambda good: json.dumps(good).encode().replace(b'"a"', b"9" * 1_000_000),
    "a million empty maps": lambda good: json.dumps(good).encode().replace(b'"a"', b"[" + b"{}," * 10**6 + b"{}]"),
}


@every_route
@pytest.mark.parametrize("what", HOSTILE_JSON)
def test_a_hostile_json_body_is_refused(web: FlaskClient, route: str, what: str) -> None:
    began_at = monotonic()
    response = post(web, route, HOSTILE_JSON[what](ROUTES[route][1]))
    assert refused(response, route, 400, 404) in ("INVALID_INPUT", "MODEL_NOT_FOUND")
    assert monotonic() - began_at < 10


BOMBS = {
    "a list of four thousand million": b"\xdd\xff\xff\xff\xff",
    "a map of four thousand million": b"\xdf\xff\xff\xff\xff",
    "a text of four gigabytes": b"\xdb\xff\xff\xff\xff",
    "bytes of four gigabytes": b"\xc6\xff\xff\xff\xff",
    "an extension of four gigabytes": b"\xc9\xff\xff\xff\xff\x01",
    "lists within lists": b"\x91" * 500_000,
    "maps within maps": b"\x81\xa1a" * 200_000,
    "a byte that means nothing": b"\xc1",
}


@every_route
@pytest.mark.parametrize("what", BOMBS)
def test_a_msgpack_bomb_is_refused(web: FlaskClient, route: str, what: str) -> None:
    """Alone, and in every field of an otherwise good body."""
    bomb, good = BOMBS[what], ROUTES[route][1]
    bodies = [bomb]
    for name in good:
        rest = {field: value for field, value in good.items() if field != name}
        head = bytes([0x80 + len(good)]) + msgspec.msgpack.encode(rest)[1:]
        bodies.append(head + msgspec.msgpack.encode(name) + bomb)
    began_at = monotonic()
    for body in bodies:
        assert refused(post(web, route, body, MSGPACK), route, 400) == "INVALID_INPUT"
    assert monotonic() - began_at < 10


@every_route
def test_a_body_over_the_limit_is_refused(web: FlaskClient, route: str) -> None:
    assert refused(post(web, route, b" " * (4 * 2**20 + 1)), route, 413) == "INPUT_TOO_LONG"


@pytest.mark.parametrize("route", [route for route in ROUTES if route != "infer"])
@pytest.mark.parametrize("kind", ["text/html", "application/x-python-serialize", "multipart/form-data; boundary=x"])
def test_a_body_of_another_kind_is_refused(web: FlaskClient, route: str, kind: str) -> None:
    assert refused(post(web, route, kind=kind), route, 415) == "UNSUPPORTED_MEDIA_TYPE"


NO_POOLS = (
    "../../etc/passwd", "/", "a/b", "a b", "*", "farm:open", "default.cpu.interactive", "%2e%2e", "-", "x" * 10_000,
    "\xe9", '{"a": 1}', "'; drop table pools",
)  # fmt: skip


@every_route
@pytest.mark.parametrize("header", ["X-SIE-Pool", "X-SIE-MACHINE-PROFILE"])
@pytest.mark.parametrize("value", NO_POOLS)
def test_a_pool_named_like_a_path_is_not_found(web: FlaskClient, route: str, header: str, value: str) -> None:
    code = refused(post(web, route, **{header: value}), route, 400, 404)
    assert code in ("NOT_FOUND", "POOL_NOT_FOUND", "INVALID_INPUT")


ABSURD = [
    *(("X-Farmhand-Timeout", value) for value in ("", "0", "-1", "nan", "inf", "1e999", "soon", "9" * 5000)),
    *((name, value) for name in ("X-Priority", "X-Farmhand-Lane") for value in ("", "fast", "x" * 5000, "../batch")),
    ("Idempotency-Key", "x" * 5000),
]


@every_route
@pytest.mark.parametrize(("header", "value"), ABSURD, ids=[f"{name}={value[:10]}" for name, value in ABSURD])
def test_a_header_that_cannot_be_followed_is_refused(web: FlaskClient, route: str, header: str, value: str) -> None:
    assert refused(post(web, route, **{header: value}), route, 400) == "INVALID_INPUT"


@every_route
def test_what_a_caller_sends_never_becomes_a_header(web: FlaskClient, route: str) -> None:
    """Of the answer: what is echoed is checked, what stands in a body stays there."""
    hostile = "x\r\nSet-Cookie: a=b"
    path, good = ROUTES[route]
    named = {field: hostile if isinstance(value, str) else value for field, value in good.items()}
    for answer in (
        post(web, route, named, **{"X-Farmhand-Timeout": "0"}),
        web.post(f"{path}%0d%0aSet-Cookie:%20a=b", data=b"x"),
        post(web, route, **{"X-Request-Id": "x;Set-Cookie=a", "X-Farmhand-Timeout": "0"}),
    ):
        assert answer.status_code in (400, 404)
        assert not any("set-cookie" in f"{name}{value}".lower() for name, value in answer.headers)


WRONG_KEYS = {
    "none": "",
    "of no form": "Bearer hello",
    "unknown": f"Bearer {GOOD[2][:-1]}{'0' if GOOD[2][-1] != '0' else '1'}",
    "expired": f"Bearer {EXPIRED[2]}",
    "revoked": f"Bearer {REVOKED[2]}",
    "very long": f"Bearer {'x' * 16_000}",
    "not ASCII": "Bearer \xe9\xff",
    "a token without an algorithm": "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhbm4ifQ.",
    "basic": "Basic YTpi",
}


@every_route
@pytest.mark.parametrize("what", WRONG_KEYS)
def test_without_a_valid_key_nothing_is_read(closed_web: FlaskClient, route: str, what: str) -> None:
    headers = {"Authorization": WRONG_KEYS[what]} if what != "none" else {}
    answer = post(closed_web, route, b"not even JSON", **headers)
    assert refused(answer, route, 401) == "UNAUTHENTICATED"
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@every_route
def test_a_key_of_another_scope_or_class_is_refused(closed_web: FlaskClient, route: str) -> None:
    assert refused(post(closed_web, route, Authorization=f"Bearer {CONFIG[2]}"), route, 403) == "FORBIDDEN"


@every_route
def test_another_tenants_model_is_not_there(closed_web: FlaskClient, route: str) -> None:
    path, good = ROUTES[route]
    body = {**good, "model": f"{good['model']}-other"} if "model" in good else good
    path = path.replace("org/m/", "org/m-other/") if route == "infer" else path
    path = f"{path}-other" if route in ("encode", "score", "extract") else path
    answer = closed_web.post(path, json=body, headers={"Authorization": f"Bearer {GOOD[2]}"})
    assert refused(answer, route, 404) == "MODEL_NOT_FOUND"


@every_route
@pytest.mark.parametrize(
    "address", ["http://169.254.169.254/latest", "https://example.org/a.png", "file:///etc/passwd"]
)
def test_an_address_is_not_fetched_unless_allowed(web: FlaskClient, route: str, address: str) -> None:
    """Images are sent as bytes; of a document no route takes anything."""
    if route in ("embeddings", "rerank", "infer"):
        body: dict[str, Any] = {**ROUTES[route][1], "input": [{"url": address}], "documents": [{"url": address}]}
        body["inputs"] = [{**TENSOR, "data": [{"url": address}]}]
        body = {field: body[field] for field in ROUTES[route][1]}
        assert refused(post(web, route, body), route, 400) == "INVALID_INPUT"
        return
    for item in (
        {"images": [{"data": address}]},
        {"images": [{"url": address}]},
        {"images": [address]},
        {"document": {"url": address}},
        {"document": {"data": address}},
        {"audio": address},
    ):
        answer = post(web, route, {**ROUTES[route][1], "items": [item]})
        assert refused(answer, route, 400) == "INVALID_INPUT"


@every_route
def test_every_answer_tells_browsers_to_keep_and_guess_nothing(web: FlaskClient, route: str) -> None:
    path = ROUTES[route][0]
    for answer in (
        post(web, route, b"x"),
        web.get(path),
        web.get("/nowhere"),
        web.get("/healthz"),
        web.get("/v1/models"),
    ):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert "Server" not in answer.headers or not any(c.isdigit() for c in answer.headers["Server"])


def test_pages_may_run_what_they_bring_along(web: FlaskClient) -> None:
    policy = web.get("/docs/").headers["Content-Security-Policy"]
    assert "script-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
