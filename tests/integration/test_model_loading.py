"""A model that is not loaded yet, or cannot be: what callers are told over HTTP, by protocol."""

import signal
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from config_db.spec import Limits
from tests.fakes.family import PLACE
from tests.live import LiveFarm, fake_spec
from tests.services import PostgresServer, RedisServer, wait_until
from tests.web import Web, start_web_of, stop_web

LOAD_S = 3.0


@pytest.fixture(scope="module")
def farm(
    redis_server: RedisServer, postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveFarm]:
    directory = tmp_path_factory.mktemp("loading")
    farm = LiveFarm(redis_server.url, postgres_server.fresh_database(), directory)
    slow = [fake_spec(name, load_ms=LOAD_S * 1000) for name in ("org/m", "org/behind", "org/openai", "org/v2")]
    quick = Limits(timeout_s=0.4)
    farm.add_models(
        *(msgspec.structs.replace(spec, limits=quick) for spec in slow),
        fake_spec("org/broken", load_fails="permanent"),
        fake_spec("org/deadly", load_fails="segfault"),
        fake_spec("org/now"),
    )
    farm.start_worker()
    yield farm
    farm.close()


@pytest.fixture(scope="module")
def web(farm: LiveFarm) -> Iterator[Web]:
    web = start_web_of(farm, EXTRA_FAMILIES=f"fake={PLACE}")
    yield web
    stop_web(web)


def state_of(web: Web, model: str) -> tuple[str, Any]:
    told = web.http.get(f"/v1/models/{model}").json()
    return told["state"], told["last_error"]


def test_a_load_that_outlasts_the_deadline_is_said_so_and_goes_on(web: Web) -> None:
    """Also to who waits behind it: the one host has no time for another model."""
    assert state_of(web, "org/m") == ("available", None)
    late = web.encode("x")
    assert (late.status_code, late.json()["error"]["code"]) == (503, "MODEL_LOADING")
    assert (late.headers["X-SIE-Error-Code"], late.headers["Retry-After"]) == ("MODEL_LOADING", "5")
    assert "'org/m' is still being loaded" in late.json()["error"]["message"]
    behind = web.http.post("/v1/encode/org/behind", json={"items": [{"text": "x"}]})
    assert (behind.status_code, behind.json()["error"]["code"]) == (503, "MODEL_LOADING")
    wait_until(lambda: state_of(web, "org/behind")[0] == "loading", 10, "the next one to be told of as loading")
    wait_until(lambda: web.encode("x").status_code == 200, 60, "the model to be loaded")
    wait_until(lambda: state_of(web, "org/m") == ("loaded", None), 10, "it to be told of as loaded")


def test_other_protocols_say_it_in_their_own_words(web: Web) -> None:
    openai = web.http.post("/v1/embeddings", json={"model": "org/openai", "input": "x"})
    error = openai.json()["error"]
    assert (openai.status_code, error["code"], error["type"]) == (503, "MODEL_LOADING", "overloaded_error")
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["x"]}
    v2 = web.http.post("/v2/models/org/v2/infer", json={"inputs": [tensor]})
    assert (v2.status_code, "still being loaded" in v2.json()["error"]) == (503, True)
    assert openai.headers["Retry-After"] == v2.headers["Retry-After"] == "5"


def test_a_model_that_cannot_be_loaded_is_no_reason_to_try_again(web: Web) -> None:
    asked = [
        web.http.post("/v1/encode/org/broken", json={"items": [{"text": "x"}]}),
        web.http.post("/v1/embeddings", json={"model": "org/broken", "input": "x"}),
    ]
    for response in asked:
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["permanent"]) == (502, "MODEL_LOAD_FAILED", True)
        assert "Retry-After" not in response.headers
    wait_until(lambda: state_of(web, "org/broken")[0] == "failed", 10, "it to be told of")
    _, last = state_of(web, "org/broken")
    assert last == {"code": "MODEL_LOAD_FAILED", "message": error["message"], "attempts": 1, "permanent": True}
    (shown,) = [one for one in web.http.get("/health").json()["models"] if one["name"] == "org/broken"]
    assert (shown["state"], shown["worker_count"]) == ("failed", 0)


def test_a_load_that_ends_its_host_is_told_of(web: Web) -> None:
    web.http.post("/v1/encode/org/deadly", json={"items": [{"text": "x"}]})
    wait_until(lambda: state_of(web, "org/deadly")[0] == "failed", 10, "it to be told of")
    _, last = state_of(web, "org/deadly")
    assert (last["code"], last["permanent"]) == ("MODEL_LOAD_FAILED", False)
    assert "ended the model process" in last["message"]


def test_a_reply_that_never_comes_is_a_504_everywhere(web: Web, farm: LiveFarm) -> None:
    """The worker is frozen: nobody can answer, and the web process ends the wait itself."""
    assert web.http.post("/v1/encode/org/now", json={"items": [{"text": "x"}]}).status_code == 200
    farm.workers[0].signal(signal.SIGSTOP)
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["x"]}
    brief = {"X-Farmhand-Timeout": "0.2"}
    asked = [
        web.http.post("/v1/encode/org/now", json={"items": [{"text": "x"}]}, headers=brief),
        web.http.post("/v1/embeddings", json={"model": "org/now", "input": "x"}, headers=brief),
        web.http.post("/v2/models/org/now/infer", json={"inputs": [tensor]}, headers=brief),
    ]
    farm.workers[0].signal(signal.SIGCONT)
    assert [response.status_code for response in asked] == [504] * 3
    assert all(int(response.headers["Retry-After"]) >= 1 for response in asked)
    assert [response.headers["X-SIE-Error-Code"] for response in asked] == ["DEADLINE_EXCEEDED"] * 3
    assert asked[1].json()["error"]["type"] == "server_error"
    assert "deadline" in asked[2].json()["error"]
