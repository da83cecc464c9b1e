"""Whatever a caller sends: one shape of error with a code and, where it applies, the field; never a traceback."""

# ruff: noqa: E501 - the table reads better with one case a line

import gzip
from typing import Any

import msgspec
import pytest
from flask.testing import FlaskClient

from common.settings import WebSettings
from config_db.snapshot import Snapshot
from tasks.client import FarmClient
from tests.standin import SPECS, StaticSnapshots
from webapp.app import create_app

MODEL = "/v1/encode/org/m"
DEEP = 100_000


@pytest.fixture
def web() -> FlaskClient:
    """An application whose Redis is away: nothing that is refused may reach for it."""
    settings = WebSettings(redis_url="redis://127.0.0.1:1/0", max_body_bytes=4 * 2**20)
    client = FarmClient(settings.redis_url, queue_limit=10, result_ttl_s=60)
    return create_app(settings, StaticSnapshots(*SPECS), client).test_client()


def post(
    web: FlaskClient, body: bytes, kind: str | None = "application/json", path: str = MODEL, **headers: str
) -> Any:
    return web.post(path, data=body, content_type=kind, headers=headers)


def error_of(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.data
    assert response.content_type == "application/json"
    error: dict[str, Any] = response.json["error"]
    assert (error["code"], response.headers["X-SIE-Error-Code"]) == (code, code)
    assert isinstance(error["message"], str)
    assert error["message"]
    assert "Traceback" not in response.text
    assert ("Retry-After" in response.headers) == (status in (429, 503, 504))
    return error


BAD_BODIES: list[tuple[str, bytes, str | None]] = [
    ("empty", b"", None),
    ("not json", b"hello", None),
    ("cut off", b'{"items": [{"text": "a"}', None),
    ("trailing words", b'{"items": [{"text": "a"}]} {}', None),
    ("nan", b'{"items": [{"text": "a"}], "params": {"options": {"x": NaN}}}', None),
    ("out of range", b'{"items": [{"text": "a"}], "params": {"options": {"x": 1e999}}}', "params.options"),
    ("huge integer", b'{"items": [{"text": "a"}], "params": {"options": {"x": %s}}}' % (b"9" * 40), "params.options.x"),
    ("invalid utf-8", b'{"items": [{"text": "\xff\xfe"}]}', None),
    ("lone surrogate", b'{"items": [{"text": "\\ud800"}]}', None),
    ("deep metadata", b'{"items": [{"text": "a", "metadata": ' + b"[" * DEEP + b"]" * DEEP + b"}]}", None),
    ("deep options", b'{"items": [{"text": "a"}], "params": {"options": {"x": ' + b"[" * 500 + b"]" * 500 + b"}}}", "params.options.x" + "[0]" * 32),
    ("a list", b"[]", None),
    ("no items field", b"{}", "items"),
    ("no items", b'{"items": []}', "items"),
    ("items of the wrong type", b'{"items": "a"}', "items"),
    ("an item of the wrong type", b'{"items": ["a"]}', "items[0]"),
    ("null text", b'{"items": [{"text": "a"}, {"text": null}]}', "items[1].text"),
    ("missing text", b'{"items": [{"id": "x"}]}', "items[0].text"),
    ("text of the wrong type", b'{"items": [{"text": 7}]}', "items[0].text"),
    ("id of the wrong type", b'{"items": [{"text": "a", "id": 7}]}', "items[0].id"),
    ("too many items", b'{"items": [%s]}' % b",".join([b'{"text": "a"}'] * 65), "items"),
    ("images for a text model", b'{"items": [{"text": "a", "images": [{"data": "aGk="}]}]}', "items[0].images"),
    ("a text over 2 MiB", b'{"items": [{"text": "%s"}]}' % (b"a" * (2 * 2**20 + 1)), "items[0].text"),
    ("params of the wrong type", b'{"items": [{"text": "a"}], "params": 1}', "params"),
    ("output_types of the wrong type", b'{"items": [{"text": "a"}], "params": {"output_types": "dense"}}', "params.output_types"),
    ("unknown output type", b'{"items": [{"text": "a"}], "params": {"output_types": ["thick"]}}', "params.output_types[0]"),
    ("an output it has not", b'{"items": [{"text": "a"}], "params": {"output_types": ["dense", "sparse"]}}', "params.output_types[1]"),
    ("no output types", b'{"items": [{"text": "a"}], "params": {"output_types": []}}', "params.output_types"),
    ("unknown dtype", b'{"items": [{"text": "a"}], "params": {"output_dtype": "int3"}}', "params.output_dtype"),
    ("unknown dtype option", b'{"items": [{"text": "a"}], "params": {"options": {"output_dtype": []}}}', "params.output_dtype"),
    ("unknown adapter", b'{"items": [{"text": "a"}], "params": {"options": {"lora": "x"}}}', "params.options.lora"),
    ("unknown adapter id", b'{"items": [{"text": "a"}], "params": {"options": {"lora_id": {}}}}', "params.options.lora_id"),
    ("unknown profile", b'{"items": [{"text": "a"}], "params": {"options": {"profile": "x"}}}', "params.options.profile"),
    ("is_query of the wrong type", b'{"items": [{"text": "a"}], "params": {"options": {"is_query": "yes"}}}', "params.options.is_query"),
    ("instruction of the wrong type", b'{"items": [{"text": "a"}], "params": {"instruction": 1}}', "params.instruction"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), [case[1:] for case in BAD_BODIES], ids=[case[0] for case in BAD_BODIES])
def test_a_bad_json_body_is_refused(web: FlaskClient, body: bytes, param: str | None) -> None:
    error = error_of(post(web, body), 400, "INVALID_INPUT")
    assert error.get("param") == param or (param == "params.options" and error["param"].startswith(param))


def packed(options: Any) -> bytes:
    return msgspec.msgpack.encode({"items": [{"text": "a"}], "params": {"options": options}})


BAD_MSGPACK: list[tuple[str, bytes, str | None]] = [
    ("cut off", b"\x81", None),
    ("trailing bytes", packed({}) + b"\x01", None),
    ("invalid utf-8", b"\x81\xa5items\x91\x81\xa4text\xa2\xff\xfe", None),
    ("deep", b"\x82\xa5items\x91\x81\xa4text\xa1a\xa6params\x81\xa7options\x81\xa1a" + b"\x91" * DEEP + b"\xc0", None),
    ("bytes for text", msgspec.msgpack.encode({"items": [{"text": b"a"}]}), "items[0].text"),
    ("keys of bytes", b"\x81\xc4\x05items\x90", None),
    ("nan in options", packed({"x": float("nan")}), "params.options.x"),
    ("infinity in options", packed({"x": [1, float("inf")]}), "params.options.x[1]"),
    ("bytes in options", packed({"x": b"raw"}), "params.options.x"),
    ("names of bytes in options", packed({"x": {b"y": 1}}), "params.options.x"),
    ("a timestamp in options", packed({"x": msgspec.msgpack.Ext(-1, b"\x00" * 4)}), "params.options.x"),
    ("an extension in options", packed({"x": msgspec.msgpack.Ext(5, b"y")}), "params.options.x"),
    ("a map as a name", b"\x82\xa5items\x91\x81\xa4text\xa1a\xa6params\x81\xa7options\x81\xa1a\x81\x80\x01", None),
]


@pytest.mark.parametrize(("body", "param"), [case[1:] for case in BAD_MSGPACK], ids=[case[0] for case in BAD_MSGPACK])
def test_a_bad_msgpack_body_is_refused(web: FlaskClient, body: bytes, param: str | None) -> None:
    error = error_of(post(web, body, "application/msgpack"), 400, "INVALID_INPUT")
    assert error.get("param") == param


def test_every_bad_item_is_listed(web: FlaskClient) -> None:
    body = b'{"items": [{"text": "a"}, {"text": null}, {"id": "x"}]}'
    error = error_of(post(web, body), 400, "INVALID_INPUT")
    assert [item["index"] for item in error["items"]] == [1, 2]
    assert [item["param"] for item in error["items"]] == ["items[1].text", "items[2].text"]


def test_a_body_over_the_limit_is_refused_unread(web: FlaskClient) -> None:
    error_of(post(web, b"x" * (4 * 2**20 + 1)), 413, "INPUT_TOO_LONG")


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "br, gzip"])
@pytest.mark.parametrize("path", [MODEL, "/v1/configs/models", "/v1/embeddings"])
def test_a_compressed_body_is_refused_as_such(web: FlaskClient, coding: str, path: str) -> None:
    response = post(web, gzip.compress(b'{"items": [{"text": "a"}]}'), path=path, **{"Content-Encoding": coding})
    assert (response.status_code, response.headers["X-SIE-Error-Code"]) == (415, "UNSUPPORTED_MEDIA_TYPE")
    assert response.json["error"]["param"] == "Content-Encoding"
    assert error_of(post(web, b"", **{"Content-Encoding": "identity"}), 400, "INVALID_INPUT")


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/xml", "multipart/form-data", "application/x-www-form-urlencoded"]
)
def test_other_content_types_are_refused(web: FlaskClient, kind: str) -> None:
    error_of(post(web, b'{"items": [{"text": "a"}]}', kind), 415, "UNSUPPORTED_MEDIA_TYPE")


@pytest.mark.parametrize(
    ("path", "nearest"),
    [("org/n", ["org/m"]), ("org/m/", ["org/m"]), ("m%00x", []), ("../x", [])],
)
def test_an_unknown_model_is_not_found_and_the_nearest_are_named(
    web: FlaskClient, path: str, nearest: list[str]
) -> None:
    error = error_of(post(web, b'{"items": [{"text": "a"}]}', path=f"/v1/encode/{path}"), 404, "MODEL_NOT_FOUND")
    assert error["nearest"] == nearest
    assert ("did you mean" in error["message"]) == bool(nearest)


def test_an_unknown_model_is_not_found_on_reading_either(web: FlaskClient) -> None:
    error_of(web.get("/v1/models/nope/nope"), 404, "MODEL_NOT_FOUND")


def test_an_operation_the_model_does_not_do_is_refused(web: FlaskClient) -> None:
    error = error_of(post(web, b'{"items": [{"text": "a"}]}', path="/v1/encode/org/rank"), 400, "INVALID_INPUT")
    assert error["param"] == "model"
    assert "score" in error["message"]


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/encode", "/v1/encode/", "/v2/x", "/v1/tasks", "/V1/ENCODE/org/m", "/v1/encode//org//m"]
)
def test_an_unknown_route_is_not_found(web: FlaskClient, path: str) -> None:
    error_of(web.post(path, json={}), 404, "NOT_FOUND")


@pytest.mark.parametrize(
    ("method", "path"),
    [("get", MODEL), ("put", MODEL), ("post", "/v1/tasks/x"), ("delete", "/v1/models"), ("post", "/healthz")],
)
def test_a_wrong_method_names_the_right_ones(web: FlaskClient, method: str, path: str) -> None:
    response = getattr(web, method)(path)
    error_of(response, 405, "METHOD_NOT_ALLOWED")
    assert response.headers["Allow"]


@pytest.mark.parametrize("wait", ["soon", "-1", "nan", "inf", "", "1e999", "1.5", "1.0", "+1"])
def test_a_wait_that_is_no_whole_number_of_seconds_is_refused(web: FlaskClient, wait: str) -> None:
    assert error_of(web.get(f"/v1/tasks/x?wait={wait}"), 400, "INVALID_INPUT")["param"] == "wait"


def test_a_task_id_that_cannot_be_one_is_not_found(web: FlaskClient) -> None:
    for task_id in ("x" * 65, "caf\u00e9", "a%7fb"):
        error_of(web.get(f"/v1/tasks/{task_id}"), 404, "TASK_NOT_FOUND")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Farmhand-Timeout", "0"),
        ("X-Farmhand-Timeout", "nan"),
        ("X-Farmhand-Timeout", "soon"),
        ("X-Farmhand-Lane", "fast"),
    ],
)
def test_a_header_that_cannot_be_followed_is_refused(web: FlaskClient, name: str, value: str) -> None:
    error = error_of(post(web, b'{"items": [{"text": "a"}]}', **{name: value}), 400, "INVALID_INPUT")
    assert error["param"] == name


def test_an_unknown_mode_is_refused(web: FlaskClient) -> None:
    error = error_of(post(web, b'{"items": [{"text": "a"}]}', path=f"{MODEL}?mode=later"), 400, "INVALID_INPUT")
    assert error["param"] == "mode"


def test_redis_away_is_a_503_that_says_when_to_come_again(web: FlaskClient) -> None:
    response = post(web, b'{"items": [{"text": "a"}]}')
    error_of(response, 503, "QUEUE_UNAVAILABLE")
    assert float(response.headers["Retry-After"]) > 0
    error_of(web.get("/v1/tasks/x"), 503, "QUEUE_UNAVAILABLE")


def test_health_and_models_do_not_need_redis(web: FlaskClient) -> None:
    assert web.get("/healthz").json == {"status": "ok"}
    response = web.get("/readyz")
    assert response.status_code == 503
    assert response.json["error"]["code"] == "NOT_READY"
    (info, _) = web.get("/v1/models").json["models"]
    assert (info["name"], info["state"], info["dims"]) == ("org/m", "available", {"dense": 2})
    assert web.get("/v1/models/org/m").json["profiles"] == {"default": {"is_default": True}}


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\tb", "<script>", 'a"b', "caf\xe9"])
def test_a_hostile_request_id_is_not_echoed(web: FlaskClient, given: str) -> None:
    echoed = web.get("/healthz", headers={"X-Request-Id": given}).headers["X-SIE-Request-ID"]
    assert echoed != given
    assert len(echoed) == 32


def test_a_sane_request_id_is_echoed_also_with_an_error(web: FlaskClient) -> None:
    headers = {"X-Request-Id": "req-1.2_3"}
    assert web.get("/healthz", headers=headers).headers["X-SIE-Request-ID"] == "req-1.2_3"
    assert web.get("/nowhere", headers=headers).headers["X-SIE-Request-ID"] == "req-1.2_3"


def test_what_breaks_inside_is_a_500_without_details(web: FlaskClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("secret")

    monkeypatch.setattr(Snapshot, "model", broken)
    response = post(web, b'{"items": [{"text": "a"}]}')
    error_of(response, 500, "INTERNAL_ERROR")
    assert "secret" not in response.text
