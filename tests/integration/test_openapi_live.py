"""The document of the API is true: its examples succeed on a live farm, and a fuzzer finds no lie in it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import schemathesis

from tests.fakes.family import PLACE
from tests.live import LiveFarm, fake_spec
from tests.services import ROOT, PostgresServer, RedisServer
from tests.web import Web, start_web, stop_web
from webapp.openapi.inference import EMBEDDER, EXTRACTOR, RERANKER
from webapp.wire.headers import MSGPACK

EVERYTHING = "a-token-that-may-do-everything"
SERVES = "a-token-that-may-do-inference"
KEY = {"Authorization": f"Bearer {EVERYTHING}"}
DOCUMENT = json.loads((ROOT / "docs/openapi.json").read_text(encoding="utf-8"))
OPERATIONS = [(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods]
OPERATIONS.sort(key=("/v1/pools/{pool}", "delete").__eq__)
IN_MSGPACK = [
    (path, method)
    for path, method in OPERATIONS
    if MSGPACK in DOCUMENT["paths"][path][method].get("requestBody", {}).get("content", {})
]
SETTINGS = """
[parameters]
"query.wait" = 0.05
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "501", "502", "503", "504"]
[checks]
positive_data_acceptance.enabled = false
allow_header_conformance.enabled = false
[[operations]]
include-path = "/v1/configs/models/{model}/status"
checks.unsupported_method.enabled = false
"""
"""Nothing is waited for. No farm says 500 of itself. A PUT of ``x/status`` is one of the model ``x/status``, as
ids hold slashes, so other routes' methods are allowed beside those of a path.

What fits a schema may be refused all the same: schemas cannot say which models there are, and what they take.
"""


@pytest.fixture(scope="module")
def web(
    redis_server: RedisServer, postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Web]:
    directory = tmp_path_factory.mktemp("openapi")
    farm = LiveFarm(redis_server.url, postgres_server.fresh_database(), directory)
    farm.add_models(
        fake_spec(EMBEDDER),
        msgspec.structs.replace(fake_spec(RERANKER), operations=("score",), outputs=("score",)),
        msgspec.structs.replace(fake_spec(EXTRACTOR), operations=("extract",), outputs=("json",)),
    )
    farm.start_worker()
    settings = {
        "AUTH": "static",
        "AUTH_TOKENS": SERVES,
        "AUTH_ADMIN_TOKENS": EVERYTHING,
        "EXTRA_FAMILIES": f"fake={PLACE}",
    }
    web = start_web(redis_server.url, directory, (), DATABASE_URL=farm.database_url, **settings)
    yield web
    stop_web(web)
    farm.close()


@pytest.fixture(scope="module")
def schema(web: Web) -> Any:
    return schemathesis.openapi.from_dict(web.http.get("/openapi.json").json())


@pytest.fixture(scope="module")
def task_id(web: Web) -> str:
    """The one part of a path that no example can name: a task of this farm."""
    (example,) = examples_of(DOCUMENT["paths"]["/v1/encode/{model}"]["post"]["requestBody"])
    accepted = web.http.post(f"/v1/encode/{EMBEDDER}?mode=async", json=example, headers=KEY)
    assert accepted.status_code == 202
    return str(accepted.json()["task_id"])


def examples_of(body: dict[str, Any]) -> list[Any]:
    return [content["example"] for content in body["content"].values() if "example" in content]


def parameters_of(operation: dict[str, Any], place: str) -> dict[str, Any]:
    """The examples of an operation's parameters."""
    return {
        one["name"]: one["example"]
        for one in operation.get("parameters", [])
        if one["in"] == place and "example" in one
    }


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_each_example_succeeds_and_is_answered_as_described(
    web: Web, schema: Any, task_id: str, path: str, method: str
) -> None:
    """In the order of the document: a model is added before it is changed, and deleted at last; so is a pool."""
    said = DOCUMENT["paths"][path][method]
    parts = parameters_of(said, "path") | ({"task_id": task_id} if "{task_id}" in path else {})
    body = {"body": examples_of(said["requestBody"])[0]} if "requestBody" in said else {}
    case = schema[path][method].Case(
        path_parameters=parts,
        query=parameters_of(said, "query"),
        headers=KEY,
        **body,
        **({"media_type": "application/json"} if body else {}),
    )
    response = case.call(base_url=str(web.http.base_url))
    assert response.status_code in (200, 201), response.text
    case.validate_response(response)


@pytest.mark.parametrize(("path", "method"), IN_MSGPACK)
def test_each_example_may_travel_as_msgpack(web: Web, path: str, method: str) -> None:
    said = DOCUMENT["paths"][path][method]
    (example,) = examples_of(said["requestBody"])
    headers = {**KEY, "Content-Type": MSGPACK, "Accept": MSGPACK}
    place = path.format(**parameters_of(said, "path"))
    response = web.http.request(method, place, content=msgspec.msgpack.encode(example), headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == list(said["responses"]["200"]["content"])[-1]


@pytest.mark.parametrize(("which", "key"), [("--exclude-path-regex", SERVES), ("--include-path-regex", EVERYTHING)])
def test_a_fuzzer_finds_no_server_error_and_no_lie(web: Web, tmp_path: Path, which: str, key: str) -> None:
    """First the routes that serve, by a key that makes no pool by naming it; then those that change what is served."""
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    done = subprocess.run(
        [
            *(Path(sys.executable).parent / "schemathesis", "run", f"{web.http.base_url}/openapi.json"),
            *(which, "^/v1/(configs|pools)", "--header", f"Authorization: Bearer {key}"),
            *("--phases", "examples,coverage,fuzzing", "--max-examples", "4", "--seed", "1"),
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.fuzz_hooks"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_pages_show_the_document_and_load_nothing_from_elsewhere(web: Web) -> None:
    """Without a key: a browser that asks for a page sends none."""
    for place in ("/docs", "/docs/"):
        page = web.http.get(place)
        assert page.status_code == 200
        assert '"url": "/openapi.json"' in page.text
    files = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(files) > 3
    for file in files:
        assert file.startswith("/docs/"), file
        assert web.http.get(file).status_code == 200, file
    assert "http" not in page.text, "an address of elsewhere"
    assert '"validatorUrl": null' in page.text
    assert web.http.get("/openapi.json").json() == DOCUMENT
    assert web.http.get("/docs/none.js").status_code == 404
