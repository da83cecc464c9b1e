"""Models written and read over HTTP: real gunicorn, real Postgres."""

import json
import threading
from time import monotonic
from typing import Any

import httpx
import jsonschema
import pytest
import yaml

from config_db.documents import parse
from tests.web import Web

MODELS = "/v1/configs/models"
OURS = {
    "id": "org/m",
    "family": "dense",
    "source": {"hub": "org/m", "revision": "abc"},
    "dims": {"dense": 8},
    "max_length": 512,
    "profiles": {"short": {"max_length": 64}},
}


@pytest.fixture(scope="module")
def web(config_web: Web) -> Web:
    return config_web


def epoch(web: Web) -> int:
    return int(web.http.get("/v1/configs/epoch").json()["epoch"])


def post(web: Web, document: Any, **headers: str) -> httpx.Response:
    content = document if isinstance(document, (bytes, str)) else json.dumps(document)
    return web.http.post(MODELS, content=content, headers=headers)


def test_a_model_is_added_once(web: Web) -> None:
    before = epoch(web)
    made = post(web, OURS)
    assert made.status_code == 201
    answer = made.json()
    assert answer["model_id"] == "org/m"
    assert answer["created_profiles"] == ["default", "short"]
    assert answer["existing_profiles_skipped"] == []
    assert answer["warnings"] == []
    assert answer["routable_bundles_by_profile"] == {"default": ["default"], "short": ["default"]}
    assert answer["router_id"]
    assert answer["epoch"] == before + 1
    again = post(web, yaml.safe_dump(OURS))
    assert (again.status_code, again.json()["epoch"]) == (200, before + 1)
    assert again.json()["created_profiles"] == []
    assert again.json()["existing_profiles_skipped"] == ["default", "short"]


def test_what_is_written_is_served_at_once(web: Web) -> None:
    """By the process that took it, without waiting for the poll."""
    for at in range(5):
        assert post(web, {**OURS, "id": f"at-once/{at}"}).status_code == 201
        assert web.http.get(f"/v1/models/at-once/{at}").status_code == 200


@pytest.mark.parametrize("key", ["id", "model_id", "sie_id"])
def test_the_id_has_three_names(web: Web, key: str) -> None:
    document = {name: value for name, value in OURS.items() if name != "id"}
    made = post(web, {**document, key: f"named/{key}"})
    assert (made.status_code, made.json()["model_id"]) == (201, f"named/{key}")


def test_two_different_ids_are_refused(web: Web) -> None:
    refused = post(web, {**OURS, "model_id": "org/other"})
    assert refused.status_code == 422
    assert "two ids" in refused.json()["error"]["message"]


def test_a_document_can_be_written_back(web: Web) -> None:
    post(web, {**OURS, "id": "back/m", "prompts": {"yes": "on", "query": "é: "}, "options": {"x": 1e-05, "y": [True]}})
    shown = web.http.get(f"{MODELS}/back/m")
    assert shown.headers["content-type"] == "application/x-yaml"
    assert shown.headers["etag"] == f'"{epoch(web)}"'
    back = post(web, shown.content)
    assert (back.status_code, back.json()["changed"]) == (200, False)
    put = web.http.put(f"{MODELS}/back/m", content=shown.content)
    assert (put.status_code, put.json()["changed"]) == (200, False)
    assert yaml.safe_load(shown.text)["prompts"] == {"yes": "on", "query": "é: "}


def test_profiles_are_added_and_nothing_is_changed(web: Web) -> None:
    post(web, {**OURS, "id": "grow/m"})
    more = post(web, {"model_id": "grow/m", "profiles": {"short": {"max_length": 64}, "long": {"max_length": 500}}})
    assert more.status_code == 201
    assert more.json()["created_profiles"] == ["long"]
    assert more.json()["existing_profiles_skipped"] == ["short"]
    assert more.json()["routable_bundles_by_profile"] == {"long": ["default"]}
    assert set(yaml.safe_load(web.http.get(f"{MODELS}/grow/m").text)["profiles"]) == {"short", "long"}
    before = epoch(web)
    changed = post(web, {"model_id": "grow/m", "max_length": 99, "profiles": {"short": {"max_length": 65}, "new": {}}})
    assert changed.status_code == 409
    assert changed.headers["X-SIE-Error-Code"] == "CONTENT_CONFLICT"
    detail = changed.json()["detail"]
    assert detail["error"] == "content_conflict"
    assert detail["conflicting_fields"] == ["max_length"]
    assert detail["conflicting_profiles"] == ["short"]
    assert {"field": "profiles.short.max_length", "stored": 64, "given": 65} in detail["differences"]
    assert epoch(web) == before


def test_put_replaces(web: Web) -> None:
    document = {name: value for name, value in OURS.items() if name != "id"}
    made = web.http.put(f"{MODELS}/put/m", json=document)
    assert (made.status_code, made.json()["created_profiles"]) == (201, ["default", "short"])
    changed = web.http.put(f"{MODELS}/put/m", json={**document, "max_length": 128, "profiles": {}})
    assert (changed.status_code, changed.json()["changed"], changed.json()["created_profiles"]) == (200, True, [])
    shown = yaml.safe_load(web.http.get(f"{MODELS}/put/m").text)
    assert shown["max_length"] == 128
    assert "profiles" not in shown
    again = web.http.put(f"{MODELS}/put/m", json=document)
    assert (again.status_code, again.json()["created_profiles"]) == (200, ["short"])
    other = web.http.put(f"{MODELS}/put/m", json=OURS)
    assert other.status_code == 422


def test_an_alias_is_read_by_and_not_written_by(web: Web) -> None:
    post(web, {**OURS, "id": "named/m", "aliases": ["named/otherwise"]})
    assert web.http.get(f"{MODELS}/named/otherwise").status_code == 200
    for refused in (
        web.http.patch(f"{MODELS}/named/otherwise", json={"max_length": 5}),
        web.http.delete(f"{MODELS}/named/otherwise"),
    ):
        assert refused.status_code == 404
        assert "it is an alias of 'named/m'" in refused.json()["error"]["message"]


def test_patch_merges_as_rfc_7386_has_it(web: Web) -> None:
    post(web, {**OURS, "id": "patch/m", "limits": {"max_items": 4, "timeout_s": 9.5}})
    patch = {"max_length": None, "limits": {"max_items": 8}, "profiles": {"short": None, "wide": {"max_length": 99}}}
    merged = web.http.patch(f"{MODELS}/patch/m", json=patch)
    assert (merged.status_code, merged.json()["changed"], merged.json()["created_profiles"]) == (200, True, ["wide"])
    shown = yaml.safe_load(web.http.get(f"{MODELS}/patch/m").text)
    assert "max_length" not in shown
    assert shown["limits"] == {"max_items": 8, "timeout_s": 9.5}
    assert shown["profiles"] == {"wide": {"max_length": 99}}
    before = epoch(web)
    for bad, field in (({"id": "other/m"}, "id"), ({"limits": {"max_itms": 3}}, "limits.max_itms"), ([], None)):
        refused = web.http.patch(f"{MODELS}/patch/m", json=bad)
        assert refused.status_code == 422
        assert refused.json()["error"].get("param") == field
    assert web.http.patch(f"{MODELS}/not/there", json={}).status_code == 404
    assert epoch(web) == before


def test_a_deleted_model_is_gone(web: Web) -> None:
    post(web, {**OURS, "id": "gone/m"})
    deleted = web.http.delete(f"{MODELS}/gone/m")
    assert (deleted.status_code, deleted.json()["deleted"]) == (200, True)
    for asked in (web.http.get(f"{MODELS}/gone/m"), web.http.delete(f"{MODELS}/gone/m")):
        assert asked.status_code == 404
        assert asked.headers["X-SIE-Error-Code"] == "MODEL_NOT_FOUND"
        assert asked.json()["detail"]["error"] == "model_not_found"
        assert asked.json()["detail"]["model_id"] == "gone/m"
        assert asked.json()["error"]["code"] == "MODEL_NOT_FOUND"
    assert web.http.get("/v1/models/gone/m").status_code == 404


def test_models_are_listed_with_where_they_came_from(web: Web) -> None:
    post(web, {**OURS, "id": "listed/m"})
    listed = {one["model_id"]: one for one in web.http.get(MODELS).json()["models"]}
    assert listed["listed/m"] == {"model_id": "listed/m", "profiles": ["default", "short"], "source": "api"}


def test_the_operator_s_own_family_is_known(web: Web) -> None:
    made = post(web, {"id": "own/m", "family": "fake", "source": {"path": "/models/own"}})
    assert (made.status_code, made.json()["warnings"]) == (201, [])
    assert made.json()["routable_bundles_by_profile"] == {"default": ["default"]}


def test_a_model_that_cannot_be_served_is_kept_with_a_warning(web: Web) -> None:
    refused = {"id": "refused/m", "family": "clip", "source": {"hub": "x"}, "unsupported": "needs code of its own"}
    made = post(web, refused)
    assert made.status_code == 201
    assert "cannot be served" in made.json()["warnings"][0]
    assert made.json()["routable_bundles_by_profile"] == {"default": []}
    status = web.http.get(f"{MODELS}/refused/m/status").json()
    assert (status["no_bundles"], status["all_bundles_acked"]) == (True, False)


def test_the_schema_takes_what_the_api_takes(web: Web) -> None:
    schema = web.http.get("/v1/configs/schema").json()
    jsonschema.validate(OURS, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**OURS, "max_lenght": 1}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**OURS, "id": "org/m:profile"}, schema)
    for struct in schema["$defs"].values():
        assert struct["description"]
        assert [name for name, field in struct["properties"].items() if not field.get("description")] == []


def test_a_large_document_holds_up_nobody(web: Web) -> None:
    """Reading a megabyte of YAML takes most of a second, in which the process answers others."""
    lines = "".join(f"  p{at}: {{max_length: {at + 1}}}\n" for at in range(30_000))
    document = f"id: big/m\nfamily: dense\nsource: {{hub: big/m}}\nprofiles:\n{lines}".encode()
    assert 700_000 < len(document) < 1 << 20
    started = monotonic()
    parse(document)
    alone_s = monotonic() - started
    answered: list[httpx.Response] = []
    sender = threading.Thread(target=lambda: answered.append(post(web, document)))
    longest_s = 0.0
    with httpx.Client(base_url=f"http://127.0.0.1:{web.port}") as client:
        client.get("/healthz")
        sender.start()
        while sender.is_alive():
            started = monotonic()
            client.get("/healthz")
            longest_s = max(longest_s, monotonic() - started)
    sender.join()
    assert answered[0].status_code == 400
    assert "more than 20000 values" in answered[0].json()["error"]["message"]
    assert longest_s < alone_s / 2


@pytest.mark.parametrize("path", ["models/m", "./m", "../m", "/models/../etc", "/models/.."])
def test_a_path_that_leads_elsewhere_is_refused(web: Web, path: str) -> None:
    refused = post(web, {**OURS, "id": "led/elsewhere", "source": {"path": path}})
    assert refused.status_code in (400, 422)
    assert "source.path" in refused.text


def test_adapters_that_nobody_could_ask_for_are_warned_of(web: Web) -> None:
    adapters = {"adapters": {"law": {"hub": "org/law"}}}
    taken, in_vain = (
        post(web, {"id": f"adapters/{family}", "family": family, "source": {"hub": "org/m"}, **adapters})
        for family in ("sparse", "clip")
    )
    assert (taken.status_code, taken.json()["warnings"]) == (201, [])
    assert in_vain.status_code == 201
    assert "adapters: models of the family `clip` take none" in in_vain.json()["warnings"][0]


def test_a_path_under_no_allowed_directory_is_warned_of(web: Web) -> None:
    """The roots of ``config_web`` are /models and /more."""
    local = {**OURS, "source": {"path": "/etc"}, "adapters": {"a": {"path": "/models-not/a"}, "b": {"path": "/more/b"}}}
    made = post(web, {**local, "id": "roots/outside"})
    assert made.status_code == 201
    assert [warning.split(" lies under none")[0] for warning in made.json()["warnings"]] == [
        "source.path: /etc",
        "adapters.a.path: /models-not/a",
    ]
    inside = post(web, {**OURS, "id": "roots/inside", "source": {"path": "/models/m"}})
    assert (inside.status_code, inside.json()["warnings"]) == (201, [])
