"""Score requests that cannot be served: one error each with a code and the field, before anything is queued."""

from typing import Any

import msgspec
import pytest
from flask.testing import FlaskClient

from common.settings import WebSettings
from config_db.spec import Limits, ModelSpec, Profile, Source
from tasks.client import FarmClient
from tests.standin import StaticSnapshots
from webapp.app import create_app
from webapp.score_admission import admit_score
from webapp.wire.bodies import Item, ScoreBody

RANKS = ModelSpec(
    id="org/rank",
    family="fake",
    source=Source(path="/"),
    operations=("score",),
    outputs=("score",),
    profiles={"short": Profile(max_length=64)},
)
SPECS = (
    RANKS,
    msgspec.structs.replace(RANKS, id="org/few", limits=Limits(max_items=2)),
    ModelSpec(id="org/dense", family="fake", source=Source(path="/")),
    msgspec.structs.replace(RANKS, id="org/later", unsupported="needs code that is not run"),
)
QUERY = {"text": "a query"}
ITEMS = [{"text": "an item"}]


@pytest.fixture
def web() -> FlaskClient:
    """An application whose Redis is away: nothing that is refused may reach for it."""
    settings = WebSettings(redis_url="redis://127.0.0.1:1/0")
    client = FarmClient(settings.redis_url, queue_limit=10, result_ttl_s=60)
    return create_app(settings, StaticSnapshots(*SPECS), client).test_client()


def refused(web: FlaskClient, body: Any, model: str = "org/rank", status: int = 400) -> dict[str, Any]:
    response = web.post(f"/v1/score/{model}", json=body)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json["error"] if response.json else {}
    assert response.headers["X-SIE-Error-Code"] == error["code"]
    return error


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"items": ITEMS}, "query"),
        ({"query": "a query", "items": ITEMS}, "query"),
        ({"query": None, "items": ITEMS}, "query"),
        ({"query": {}, "items": ITEMS}, "query.text"),
        ({"query": {"text": None}, "items": ITEMS}, "query.text"),
        ({"query": {"text": 7}, "items": ITEMS}, "query.text"),
        ({"query": {"text": "a", "id": 7}, "items": ITEMS}, "query.id"),
        ({"query": {"text": "a", "id": "x" * 1001}, "items": ITEMS}, "query.id"),
        ({"query": {"text": "a", "images": [{"data": "aGk="}]}, "items": ITEMS}, "query.images"),
        ({"query": {"text": "a" * (2 * 2**20 + 1)}, "items": ITEMS}, "query.text"),
        ({"query": QUERY}, "items"),
        ({"query": QUERY, "items": []}, "items"),
        ({"query": QUERY, "items": ITEMS * 1001}, "items"),
        ({"query": QUERY, "items": "a"}, "items"),
        ({"query": QUERY, "items": ["a"]}, "items[0]"),
        ({"query": QUERY, "items": [*ITEMS, {"id": "x"}]}, "items[1].text"),
        ({"query": QUERY, "items": ITEMS, "instruction": 1}, "instruction"),
        ({"query": QUERY, "items": ITEMS, "options": []}, "options"),
        ({"query": QUERY, "items": ITEMS, "options": {"x": 2**70}}, "options.x"),
        ({"query": QUERY, "items": ITEMS, "options": {"instruction": 1}}, "options.instruction"),
        ({"query": QUERY, "items": ITEMS, "options": {"profile": "long"}}, "options.profile"),
        ({"query": QUERY, "items": ITEMS, "params": {"instruction": "x"}}, "params"),
    ],
)
def test_a_bad_request_names_its_field(web: FlaskClient, body: Any, param: str) -> None:
    error = refused(web, body)
    assert (error["code"], error.get("param")) == ("INVALID_INPUT", param)


def test_a_query_that_is_too_long_for_so_many_items_is_refused(web: FlaskClient) -> None:
    error = refused(web, {"query": {"text": "a" * (2**20)}, "items": ITEMS * 65})
    assert (error["code"], error["param"]) == ("INPUT_TOO_LONG", "query.text")


def test_pairs_are_thought_no_longer_than_the_model_reads() -> None:
    body = ScoreBody(query=Item(text="a" * 40), items=[Item(text="b" * 40), Item(text="c" * 4000)])
    settings = WebSettings(redis_url="redis://127.0.0.1:1/0")
    assert admit_score(RANKS, body, settings).tokens == 24 + 1014
    assert admit_score(msgspec.structs.replace(RANKS, max_length=128), body, settings).tokens == 24 + 128


def test_every_bad_item_is_listed(web: FlaskClient) -> None:
    error = refused(web, {"query": QUERY, "items": [{"id": "x"}, *ITEMS, {"text": None}]})
    assert [one["index"] for one in error["items"]] == [0, 2]
    assert [one["param"] for one in error["items"]] == ["items[0].text", "items[2].text"]


def test_a_model_may_take_fewer_items(web: FlaskClient) -> None:
    assert "3 items" in refused(web, {"query": QUERY, "items": ITEMS * 3}, "org/few")["message"]


def test_a_model_that_does_not_score_says_what_it_does(web: FlaskClient) -> None:
    error = refused(web, {"query": QUERY, "items": ITEMS}, "org/dense")
    assert (error["param"], error["message"]) == ("model", "model 'org/dense' does not score; it does encode")
    response = web.post("/v1/encode/org/rank", json={"items": ITEMS})
    assert response.status_code == 400
    assert "it does score" in response.text


def test_a_model_that_is_not_served(web: FlaskClient) -> None:
    assert refused(web, {"query": QUERY, "items": ITEMS}, "org/none", 404)["code"] == "MODEL_NOT_FOUND"
    assert refused(web, {"query": QUERY, "items": ITEMS}, "org/later", 501)["code"] == "MODEL_UNSUPPORTED"


@pytest.mark.parametrize("body", [b"", b"\x81", msgspec.msgpack.encode({"query": {"text": b"a"}, "items": ITEMS})])
def test_a_bad_msgpack_body_is_refused(web: FlaskClient, body: bytes) -> None:
    response = web.post("/v1/score/org/rank", data=body, content_type="application/msgpack")
    assert (response.status_code, response.headers["X-SIE-Error-Code"]) == (400, "INVALID_INPUT")
