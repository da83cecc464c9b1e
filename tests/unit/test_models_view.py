"""``/v1/models``: what a caller learns of each model before asking anything of it."""

from typing import Any

import pytest
from flask.testing import FlaskClient

from common.settings import WebSettings
from config_db.spec import ModelSpec, Profile, Source
from tasks.client import FarmClient
from tests.standin import StaticSnapshots
from webapp.app import create_app

SPECS = (
    ModelSpec(
        id="org/m",
        family="dense",
        source=Source(hub="org/m", revision="abc"),
        aliases=("m",),
        dims={"dense": 4},
        max_length=512,
        profiles={"short": Profile(max_length=64), "query": Profile(extends="short", default_prompt="q")},
    ),
    ModelSpec(id="org/later", family="gliner", source=Source(path="/"), operations=("extract",), outputs=("json",)),
    ModelSpec(id="org/never", family="dense", source=Source(path="/"), unsupported="its code is nowhere"),
)


@pytest.fixture
def web() -> FlaskClient:
    """An application whose Redis is away."""
    settings = WebSettings(redis_url="redis://127.0.0.1:1/0")
    client = FarmClient(settings.redis_url, queue_limit=10, result_ttl_s=60)
    return create_app(settings, StaticSnapshots(*SPECS), client).test_client()


def info(web: FlaskClient, name: str) -> Any:
    response = web.get(f"/v1/models/{name}")
    assert response.status_code == 200, response.text
    return response.json


def test_profiles_are_listed_as_models_of_their_own(web: FlaskClient) -> None:
    listed: Any = web.get("/v1/models").json
    names = [one["name"] for one in listed["models"]]
    assert names == ["org/later", "org/m", "org/m:query", "org/m:short", "org/never"]
    lengths = {one["name"]: one["max_sequence_length"] for one in listed["models"]}
    assert (lengths["org/m"], lengths["org/m:query"], lengths["org/m:short"]) == (512, 64, 64)


def test_a_model_tells_its_profiles_aliases_and_revision(web: FlaskClient) -> None:
    found = info(web, "org/m")
    assert found["profiles"] == {
        "default": {"is_default": True},
        "short": {"is_default": False, "max_length": 64},
        "query": {"is_default": False, "extends": "short", "default_prompt": "q"},
    }
    assert (found["aliases"], found["revision"], found["dims"]) == (["m"], "abc", {"dense": 4})
    assert (found["state"], found["last_error"]) == ("available", None)


@pytest.mark.parametrize(("asked", "named"), [("m", "org/m"), ("org/m:default", "org/m"), ("m:short", "org/m:short")])
def test_any_name_of_a_model_shows_it_under_its_own(web: FlaskClient, asked: str, named: str) -> None:
    found = info(web, asked)
    assert (found["id"], found["name"], found["object"]) == (named, named, "model")


@pytest.mark.parametrize(("name", "reason"), [("org/never", "its code is nowhere")])
def test_a_model_that_cannot_be_served_says_why(web: FlaskClient, name: str, reason: str) -> None:
    found = info(web, name)
    assert (found["state"], found["loaded"]) == ("unsupported", False)
    error = found["last_error"]
    assert reason in error.pop("message")
    assert error == {"code": "MODEL_UNSUPPORTED", "attempts": 0, "permanent": True}
