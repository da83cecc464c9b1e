"""``/v1/extract`` over real HTTP, with a real worker and tiny models of every family of extractors."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from config_db.model_folders import spec_of_directory
from config_db.spec import ModelSpec, Source
from tests import tiny_extractors as tiny
from tests.live import LiveFarm
from tests.services import PostgresServer, RedisServer
from tests.web import Web, start_web, stop_web

MSGPACK = {"Content-Type": "application/msgpack", "Accept": "application/msgpack"}
MODELS = {
    "ner": "ner",
    "nli": "nli-two",
    "gliner": "gliner-span",
    "gliner2": "gliner2-span",
    "gliclass": "gliclass-before",
}


@pytest.fixture(scope="module")
def web(
    redis_server: RedisServer, postgres_server: PostgresServer, tiny_out: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Web]:
    """A whole farm: web tier, one worker of one host, and the models."""
    directory = tmp_path_factory.mktemp("extract")
    farm = LiveFarm(redis_server.url, postgres_server.fresh_database(), directory)
    ranker = ModelSpec(id="rank", family="fake", source=Source(path="/"), operations=("score",), outputs=("score",))
    farm.add_models(ranker, *(spec_of_directory(tiny_out / folder, model_id=name) for name, folder in MODELS.items()))
    farm.start_worker(batch_max_items=8)
    web = start_web(redis_server.url, directory, (), DATABASE_URL=farm.database_url)
    web.http.timeout = 90  # the first request to a family imports its library
    yield web
    stop_web(web)
    farm.close()


def params_of(name: str) -> dict[str, Any]:
    return {} if name == "ner" else {"labels": tiny.LABELS}


@pytest.mark.parametrize("name", MODELS)
def test_every_family_answers_in_both_formats(web: Web, tiny_out: Path, name: str) -> None:
    texts = [text for text in tiny.TEXTS if len(text) < 60]  # short enough for every family
    items = [{"text": text, "id": f"mine-{n}"} if n else {"text": text} for n, text in enumerate(texts)]
    body = {"items": items, "params": params_of(name)}
    plain = web.http.post(f"/v1/extract/{name}", json=body)
    assert plain.status_code == 200, plain.text
    answer = plain.json()
    packed = web.http.post(f"/v1/extract/{name}", content=msgspec.msgpack.encode(body), headers=MSGPACK)
    assert packed.headers["content-type"] == "application/msgpack"
    assert msgspec.msgpack.decode(packed.content)["items"] == answer["items"]
    assert [item["id"] for item in answer["items"]] == ["item-0", *(f"mine-{n}" for n in range(1, len(texts)))]
    found = [one for item in answer["items"] for one in (*item["entities"], *item["classifications"])]
    assert found
    assert_as_its_library(name, answer["items"], texts, json.loads((tiny_out / "said.json").read_text()))
    assert answer["model"] == name
    assert plain.headers["X-SIE-Units-Input-Tokens"] == str(answer["usage"]["input_tokens"]) != "0"
    assert set(answer["timing"]) == {"queue_ms", "tokenization_ms", "inference_ms", "postprocessing_ms", "total_ms"}


def assert_as_its_library(name: str, items: list[Any], texts: list[str], said: dict[str, Any]) -> None:
    """What each text has is what the library found in it; gliner2's form is another, and compared elsewhere."""
    if name == "gliner2":
        return
    expected = said[MODELS[name]]["simple" if name == "ner" else "plain"]
    for item, text in zip(items, texts, strict=True):
        kind = "entities" if name in ("ner", "gliner") else "classifications"
        scores = [one["score"] for one in item[kind]]
        assert scores == pytest.approx([one[1] for one in expected[tiny.TEXTS.index(text)]], abs=1e-4)


def test_an_item_at_fault_carries_its_error_in_a_200(web: Web) -> None:
    """Also where the request was cut over several micro-batches."""
    texts = ["Ada", *["x " * 100] * 9, "Paris"]
    items = web.http.post("/v1/extract/ner", json={"items": [{"text": text} for text in texts]}).json()["items"]
    assert [item["id"] for item in items] == [f"item-{n}" for n in range(len(texts))]
    assert ["error" in item for item in items] == [False, *[True] * 9, False]
    assert items[1]["error"]["code"] == "INPUT_TOO_LONG"
    assert set(items[1]["error"]) == {"code", "message"}


def test_a_task_gives_the_same_as_waiting_for_it(web: Web) -> None:
    body = {"items": [{"text": tiny.LONG}], "params": {"options": {"threshold": 0.5}}}
    now = web.http.post("/v1/extract/ner", json=body).json()
    asked = web.http.post("/v1/extract/ner", json=body, headers={"Prefer": "respond-async"})
    assert asked.status_code == 202
    task = web.http.get(f"{asked.headers['Location']}?wait=30").json()
    assert (task["state"], task["operation"]) == ("succeeded", "extract")
    assert task["result"]["items"] == now["items"]


@pytest.mark.parametrize(
    ("model", "params", "param"),
    [
        ("gliner", {}, "params.labels"),
        ("gliner", {"labels": []}, "params.labels"),
        ("gliner", {"labels": ["a", " "]}, "params.labels[1]"),
        ("gliner", {"labels": [f"label {n}" for n in range(10_000)]}, "params.labels"),
        ("gliner", {"labels": "person"}, "params.labels"),
        ("gliner", {"labels": ["a"], "options": {"threshold": "high"}}, "params.options.threshold"),
        ("gliner2", {"output_schema": {}}, "params.output_schema"),
        ("gliner2", {"output_schema": {"entities": []}}, "params.output_schema.entities"),
        ("gliner2", {"output_schema": {"persons": 1}}, "params.output_schema.persons"),
        ("nli", {"labels": ["a"], "options": {"profile": "none"}}, "params.options.profile"),
        ("rank", {"labels": ["a"]}, "model"),
    ],
)
def test_a_request_at_fault_is_refused_with_its_field(web: Web, model: str, params: Any, param: str) -> None:
    refused = web.http.post(f"/v1/extract/{model}", json={"items": [{"text": "Ada"}], "params": params})
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == (refused.headers["X-SIE-Error-Code"], param)


def test_models_say_what_they_do(web: Web) -> None:
    told = {one["name"]: one for one in web.http.get("/v1/models").json()["models"]}
    assert all(told[name]["outputs"] == ["json"] for name in MODELS)


def test_many_callers_at_once_each_get_their_own(web: Web) -> None:
    """Requests with other labels, other options and other texts share micro-batches and nothing else."""
    asked = [
        {"items": [{"text": text}], "params": {"labels": labels, "options": {"threshold": threshold}}}
        for text in tiny.TEXTS[:2]
        for labels in (tiny.LABELS, tiny.LABELS[:1], ["colour"])
        for threshold in (0.2, 0.4)
    ]
    ask = partial(web.http.post, "/v1/extract/gliner")
    alone = [ask(json=body).json()["items"] for body in asked]
    with ThreadPoolExecutor(12) as callers:
        together = [one.json()["items"] for one in callers.map(lambda body: ask(json=body), asked * 4)]
    assert len({json.dumps(one) for one in alone}) > 6
    for at, items in enumerate(together):
        assert_close(items[0]["entities"], alone[at % len(asked)][0]["entities"])


def assert_close(found: list[Any], expected: list[Any]) -> None:
    assert [{**one, "score": 0} for one in found] == [{**one, "score": 0} for one in expected]
    assert [one["score"] for one in found] == pytest.approx([one["score"] for one in expected], abs=1e-5)
