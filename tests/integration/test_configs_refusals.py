"""What is wrong with a request is told with the field's path, and changes nothing."""

import gzip
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.web import Web

MODELS = "/v1/configs/models"
GOOD = {"id": "good/m", "family": "dense", "source": {"hub": "org/m"}, "aliases": ["good/alias"]}


@pytest.fixture(scope="module")
def started(config_web: Web) -> Web:
    assert config_web.http.post(MODELS, json=GOOD).status_code == 201
    return config_web


@pytest.fixture
def web(started: Web) -> Iterator[Web]:
    """Whatever the test sends, the epoch is the same afterwards."""
    before = started.http.get("/v1/configs/epoch").json()
    yield started
    assert started.http.get("/v1/configs/epoch").json() == before


def with_fields(**fields: Any) -> str:
    return json.dumps({**GOOD, "id": "bad/m", "aliases": [], **fields})


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (BOMB, "anchors and aliases are not taken"),
        ("id: bad/m\nid: bad/n\n", "stands twice"),
        ('{"id": "bad/m", "id": "bad/n"}', "stands twice"),
        ('{"limits": {"max_items": 1, "max_items": 2}}', "stands twice"),
        ("x: " + "[" * 100 + "]" * 100, "nested deeper"),
        ('{"x": ' * 50_000, "nested"),
        ("id: [", "YAML"),
        ("id: bad/m\n---\nid: bad/n\n", "single document"),
        ("id: !!python/object/apply:os.system [id]", "tag"),
        (b"\xff\xfe\x00", "UTF-8"),
        ('{"id": "bad/m", "options": {"x": NaN}}', "number"),
        ('{"id": "bad/m", "description": "\\u0000"}', "NUL"),
        ('{"id": "bad/m", "description": "\\ud800"}', "half a character"),
        ("id: bad/m\noptions: {x: 99999999999999999999999999}", "number"),
        ("options: {since: !!timestamp 2024-01-01}", "tag"),
    ],
)
def test_a_document_that_cannot_be_read(web: Web, body: Any, says: str) -> None:
    refused = web.http.post(MODELS, content=body)
    assert refused.status_code == 400
    assert says in refused.json()["error"]["message"]
    assert refused.json()["detail"]["error"] == "parse_error"
    assert len(refused.content) < 5000


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (with_fields(profiles={"a": {"extends": "b"}, "b": {"extends": "a"}}), "profiles.b.extends", "circle"),
        (with_fields(profiles={"a": {"extends": "c"}}), "profiles.a.extends", "none of"),
        (with_fields(family="dens"), "family", "did you mean `dense`"),
        (with_fields(max_lenght=5), "max_lenght", "did you mean `max_length`"),
        (with_fields(limits={"max_itmes": 5}), "limits.max_itmes", "did you mean `max_items`"),
        (with_fields(profiles={"a": {"max_lenght": 5}}), "profiles.a.max_lenght", "did you mean `max_length`"),
        (with_fields(limits={"max_items": 0}), "limits.max_items", ">= 1"),
        (with_fields(dims={"dense": "wide"}), "dims.dense", "int"),
        (with_fields(source={}), "source", "exactly one"),
        (with_fields(source={"hub": "../../etc/passwd"}), "source.hub", ""),
        (with_fields(aliases=["good/m"]), "aliases", "good/m"),
        (with_fields(aliases=["good/alias"]), "aliases", "good/m"),
        (with_fields(aliases=["a/b", "a/b"]), "aliases[1]", "twice"),
        (with_fields(profiles={"../x": {}}), None, ""),
        (with_fields(profiles={f"p{at}": {} for at in range(101)}), "profiles", "100"),
        ("- a list\n", None, "mapping"),
        ("{}", "model_id", "required"),
        ('{"id": 7}', "id", "text"),
        ('{"id": "bad/m"}', "family", "required"),
        (with_fields(id="good/alias"), "id", "good/alias"),
    ],
)
def test_a_document_that_is_no_model(web: Web, body: str, param: str | None, says: str) -> None:
    refused = web.http.post(MODELS, content=body)
    assert refused.status_code == 422, refused.text
    error = refused.json()["error"]
    assert error["code"] == "INVALID_CONFIG"
    assert says in error["message"]
    assert param is None or error["param"] == param
    assert refused.json()["detail"]["error"] == "validation_error"
    assert refused.json()["detail"]["details"][0]["message"] == error["message"]


def test_a_name_that_another_model_has_is_the_writer_s_fault(started: Web) -> None:
    """Whichever of the two rows the config DB finds first."""
    twins = [f"twin/{at}" for at in range(2)]
    for model in twins:
        assert started.http.put(f"{MODELS}/{model}", content=with_fields(id=model, aliases=[f"{model}a"])).is_success
    before = started.http.get("/v1/configs/epoch").json()
    for model, other in (twins, reversed(twins)):
        refused = started.http.patch(f"{MODELS}/{model}", json={"aliases": [f"{other}a"]})
        assert (refused.status_code, refused.json()["error"].get("param")) == (422, "aliases")
        assert refused.json()["error"]["message"].startswith(f"model '{model}'")
    assert started.http.get("/v1/configs/epoch").json() == before


def test_a_number_of_any_length_names_its_field(web: Web) -> None:
    refused = web.http.post(MODELS, content=with_fields(limits={"max_items": 5}).replace("5", "9" * 5000))
    assert (refused.status_code, refused.json()["error"].get("param")) == (400, "limits.max_items")


@pytest.mark.parametrize(
    "model",
    [
        "../m",
        "a/../m",
        "/etc/passwd",
        "-m",
        "a//b",
        "a/./b",
        "a/.",
        "a/",
        "a b",
        "a\nb",
        "a:b",
        "x/status",
        "status",
        "m\0",
        "é",
        "x" * 201,
    ],
)
def test_an_id_that_is_a_trick(web: Web, model: str) -> None:
    refused = web.http.post(MODELS, content=json.dumps({**GOOD, "id": model}))
    assert refused.status_code == 400
    if "\0" not in model:
        assert refused.json()["error"]["param"] == "model_id"
        assert refused.json()["detail"]["error"] == "invalid_model_id"
    assert "regex" not in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "path", ["..%2f..%2fetc", "a%00b", "a%0ab", "%2e%2e/m", "a:b", "x" * 300, "a/status/status", "%ff", "a//b"]
)
@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE"])
def test_an_address_that_is_a_trick(web: Web, method: str, path: str) -> None:
    refused = web.http.request(method, f"{MODELS}/{path}", content=json.dumps({"max_length": 3}))
    assert refused.status_code in (400, 404)
    assert refused.json()["error"]["code"] in ("INVALID_INPUT", "MODEL_NOT_FOUND", "NOT_FOUND")


@pytest.mark.parametrize("size", [(1 << 20) + 1, 2 << 20])
def test_a_document_beyond_a_mebibyte(web: Web, size: int) -> None:
    body = b"x: " + b"y" * (size - 3)
    for content in (body, iter([body])):
        refused = web.http.post(MODELS, content=content)
        assert refused.status_code == 413
        assert refused.json()["detail"]["error"] == "payload_too_large"


def test_a_compressed_document(web: Web) -> None:
    refused = web.http.post(MODELS, content=gzip.compress(with_fields().encode()), headers={"Content-Encoding": "gzip"})
    assert (refused.status_code, refused.json()["detail"]["error"]) == (415, "unsupported_media_type")


def test_no_document(web: Web) -> None:
    for content in (b"", b"  \n"):
        assert web.http.post(MODELS, content=content).status_code == 400


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("If-Match", "abc"),
        ("If-Match", '"1", "2"'),
        ("If-Match", "9" * 30),
        ("If-Match", "-1"),
        ("Idempotency-Key", "k" * 256),
        ("Idempotency-Key", "with space"),
        ("Idempotency-Key", b"\xe9"),
        ("Idempotency-Key", ""),
        ("X-Farmhand-Actor", "x" * 101),
        ("X-Farmhand-Actor", b"\xff\xfe"),
        ("X-Farmhand-Reason", "a\tb"),
        ("X-Farmhand-Reason", "x" * 501),
        ("X-Farmhand-Reason", "evil\u202etxt".encode()),
    ],
)
def test_a_hostile_header(web: Web, header: str, value: Any) -> None:
    refused = web.http.post(MODELS, content=with_fields(), headers={header: value})
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["param"] == header


@pytest.mark.parametrize(
    "query",
    [
        "history?limit=0",
        "history?limit=201",
        "history?limit=x",
        "history?before=-1",
        "history?model=..",
        "diff",
        "diff?from=x",
        "status?wait=-1",
        "status?wait=nan",
        "status?epoch=1e3",
    ],
)
def test_a_bad_query(web: Web, query: str) -> None:
    refused = web.http.get(f"/v1/configs/{query}")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"]


def test_a_method_that_is_not_there(web: Web) -> None:
    refused = web.http.put(MODELS, json={})
    assert (refused.status_code, refused.headers["Allow"]) == (405, "GET, HEAD, OPTIONS, POST")
