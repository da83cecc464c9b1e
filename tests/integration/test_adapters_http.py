"""Adapters through the whole farm: by name, by an allowed repository, late, unknown, and renamed."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from huggingface_hub import close_session

from config_db.adapters import SETTING
from config_db.engine import open_engine, transaction
from config_db.model_folders import spec_of_directory
from config_db.publish import Put, publish
from config_db.spec import ModelSpec, Source
from tasks import codec
from tests.hub import HIDDEN, HubStandIn, serving_hub
from tests.integration.test_dense import cosines
from tests.live import LiveFarm
from tests.lora import TEXTS, reference, source
from tests.services import PostgresServer, RedisServer, wait_until
from tests.token_lora import reference as token_reference
from tests.token_lora import source as token_source
from tests.token_models import TEXTS as TOKEN_TEXTS
from tests.token_models import spec_of
from tests.web import Web, start_web, stop_web

TEXT = TEXTS[1]
FAR = "team/far"
SERVED = [("law", "small"), ("money", "both")]
"""What adapters are called, and what they are."""


def spec_with(folder: Path, **adapters: str) -> ModelSpec:
    named = {name: source(folder, adapter) for name, adapter in adapters.items()}
    return msgspec.structs.replace(spec_of_directory(folder), id="org/base", precision="float32", adapters=named)


def token_spec(folder: Path, family: str, **adapters: str) -> ModelSpec:
    named = {name: token_source(folder, adapter) for name, adapter in adapters.items()}
    return spec_of(folder, family, id=f"org/{family}", adapters=named)


@pytest.fixture(scope="module")
def hub(adapted: dict[str, Path]) -> Iterator[HubStandIn]:
    folder = adapted["bert"].parent / "good"
    files = {
        "adapter_config.json": json.loads((folder / "adapter_config.json").read_text()),
        "adapter_model.safetensors": (folder / "adapter_model.safetensors").read_bytes(),
    }
    with pytest.MonkeyPatch.context() as patch, serving_hub() as hub:
        hub.repositories |= {FAR: files, "team/hidden": HIDDEN}
        for name, value in (("NO_PROXY", "*"), ("no_proxy", "*"), ("HF_ENDPOINT", hub.url)):
            patch.setenv(name, value)
        close_session()
        yield hub
    close_session()


@pytest.fixture(scope="module")
def farm(
    hub: HubStandIn,  # noqa: ARG001 - its address stands in the environment of the worker
    adapted: dict[str, Path],
    token_adapted: Path,
    redis_server: RedisServer,
    postgres_server: PostgresServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LiveFarm]:
    directory = tmp_path_factory.mktemp("farm")
    farm = LiveFarm(redis_server.url, postgres_server.fresh_database(), directory)
    farm.add_models(
        spec_with(adapted["bert"], law="small", money="wide"),
        token_spec(token_adapted / "free", "sparse", law="small", money="both"),
        token_spec(token_adapted / "stanford", "multivector", law="small", money="both"),
        ModelSpec(
            id="org/gliner",
            family="gliner",
            source=Source(path="/"),
            operations=("extract",),
            outputs=("json",),
            adapters={"law": Source(path="/")},
        ),
    )
    farm.start_worker(hub_cache=directory / "hub", ready=False)
    yield farm
    farm.close()


@pytest.fixture(scope="module")
def web(farm: LiveFarm) -> Iterator[Web]:
    settings = {"DATABASE_URL": farm.database_url, "CONFIG_POLL_S": "0.2"}
    web = start_web(farm.redis_url, farm.directory, (), **settings)
    wait_until(farm.workers[0].is_ready, 30, "the worker to be ready")
    yield web
    stop_web(web)


def ask(web: Web, *, timeout_s: float = 60.0, **options: Any) -> httpx.Response:
    body = {"items": [{"text": TEXT}], "params": {"options": options}}
    headers = {"X-Farmhand-Timeout": str(timeout_s)}
    return web.http.post("/v1/encode/org/base", json=body, headers=headers, timeout=60)


def vector(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return np.array([response.json()["items"][0]["dense"]["values"]])


def is_of(response: httpx.Response, folder: Path, name: str) -> bool:
    return bool(cosines(vector(response), reference(folder, name)[1:2]).min() >= 0.9999)


def test_an_adapter_is_named_by_either_option(web: Web, adapted: dict[str, Path]) -> None:
    folder = adapted["bert"]
    assert is_of(ask(web), folder, "st")
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, web, **{option: name}) for name in ("law", "money") for option in ("lora", "lora_id")]
        answers = [one.result() for one in asked]
    assert [is_of(answer, folder, "small") for answer in answers] == [True, True, False, False]
    assert [is_of(answer, folder, "wide") for answer in answers] == [False, False, True, True]
    assert is_of(ask(web, lora="law", lora_id="law"), folder, "small")
    assert is_of(ask(web, lora=None), folder, "st")


def test_sparse_requests_for_different_adapters_at_once(web: Web, token_adapted: Path) -> None:
    folder, at = token_adapted / "free", 1
    right = {name: token_reference(folder, adapter, "document")[at] for name, adapter in SERVED}

    def weights(name: str) -> Any:
        body = {"items": [{"text": TOKEN_TEXTS[at]}], "params": {"options": {"lora": name}}}
        found = web.http.post("/v1/encode/org/sparse", json=body, timeout=60).json()["items"][0]["sparse"]
        row = np.zeros(len(right[name]))
        row[found["indices"]] = found["values"]
        return row

    names = ["law", "money"] * 4
    with ThreadPoolExecutor(8) as pool:
        for name, found in zip(names, pool.map(weights, names), strict=True):
            other = right["law" if name == "money" else "money"]
            assert cosines(found[None], right[name][None])[0] >= 0.9999 > cosines(found[None], other[None])[0]


def test_scores_of_late_interaction_by_the_adapter_that_is_named(web: Web, token_adapted: Path) -> None:
    folder = token_adapted / "stanford"
    items = [{"text": text, "id": f"t{n}"} for n, text in enumerate(TOKEN_TEXTS)]
    for name, adapter in SERVED:
        body = {"query": {"text": TOKEN_TEXTS[1]}, "items": items, "options": {"lora_id": name}}
        found = {
            one["item_id"]: one["score"]
            for one in web.http.post("/v1/score/org/multivector", json=body).json()["scores"]
        }
        right = token_reference(folder, adapter, "maxsim")[1]
        np.testing.assert_allclose([found[f"t{n}"] for n in range(len(items))], right, atol=1e-3, rtol=1e-4)
    response = web.http.post("/v1/score/org/multivector", json={**body, "options": {"lora": "lawn"}})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "options.lora")


def test_a_family_that_takes_none_is_400(web: Web) -> None:
    body = {"items": [{"text": TEXT}], "params": {"labels": ["a"], "options": {"lora": "law"}}}
    response = web.http.post("/v1/extract/org/gliner", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "INVALID_INPUT", "params.options.lora")
    assert "of the family gliner, which takes no adapters" in error["message"]


@pytest.mark.parametrize(
    ("options", "param", "said"),
    [
        ({"lora": "Lawn"}, "lora", "did you mean law?"),
        ({"lora_id": "xyzzyq"}, "lora_id", "it has law, money"),
        ({"lora": 7}, "lora", "named by a string"),
        ({"lora": {"path": "/etc"}}, "lora", "named by a string"),
        ({"lora": ""}, "lora", "named by a string"),
        ({"lora": "law", "lora_id": "money"}, "lora_id", "different adapters"),
        ({"lora": "team/nobody-allowed"}, "lora", "has no adapter 'team/nobody-allowed'"),
    ],
)
def test_an_unknown_adapter_is_400(web: Web, options: dict[str, Any], param: str, said: str) -> None:
    response = ask(web, **options)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "INVALID_INPUT", f"params.options.{param}")
    assert said in error["message"]


def test_an_allowed_repository_is_fetched_while_its_requests_wait(
    web: Web, farm: LiveFarm, hub: HubStandIn, adapted: dict[str, Path]
) -> None:
    """Its first deadline passes; the base and other adapters are served meanwhile; then it is there."""
    folder, engine = adapted["bert"], open_engine(farm.database_url)
    assert ask(web, lora=FAR).status_code == 400
    hub.stalls["adapter_model.safetensors"] = 10
    with transaction(engine) as session:
        publish(session, [Put("setting", SETTING, {"patterns": ["team/*"]})], actor="test", reason="test")
    engine.dispose()
    wait_until(lambda: ask(web, lora=FAR, timeout_s=0.5).status_code != 400, 20, "the setting to be read")
    late = ask(web, lora=FAR, timeout_s=0.5)
    assert (late.status_code, late.json()["error"]["code"]) == (503, "LORA_LOADING")
    assert (late.headers["X-SIE-Error-Code"], late.headers["Retry-After"]) == ("LORA_LOADING", "1")
    assert FAR in late.json()["error"]["message"]
    with ThreadPoolExecutor(1) as pool:
        patient = pool.submit(ask, web, lora=FAR)
        assert is_of(ask(web), folder, "st")
        assert is_of(ask(web, lora="money"), folder, "wide")
        assert not patient.done()
        hub.stalls.clear()
        hub.released.set()
        assert is_of(patient.result(), folder, "good")
    assert is_of(ask(web, lora=FAR), folder, "good")
    assert [start for _, start, _ in hub.fetched].count(0) == 1, "it was fetched more than once"


def test_an_allowed_repository_that_is_not_there_is_502(web: Web, hub: HubStandIn) -> None:
    wait_until(lambda: ask(web, lora="team/hidden").status_code != 400, 20, "the setting to be read")
    response = ask(web, lora="team/hidden")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["error_class"]) == (502, "MODEL_LOAD_FAILED", "NOT_FOUND")
    assert "team/hidden" in error["message"]
    assert len([path for path in hub.asked if "team/hidden" in path]) == 1


def test_a_name_that_is_given_to_another_adapter_means_that_one(
    web: Web, farm: LiveFarm, adapted: dict[str, Path]
) -> None:
    folder = adapted["bert"]
    farm.add_models(spec_with(folder, law="patched", money="wide"))
    wait_until(lambda: is_of(ask(web, lora="law"), folder, "patched"), 20, "the new adapter")
    assert is_of(ask(web, lora="money"), folder, "wide")


def test_a_plain_celery_producer_names_an_adapter_too(farm: LiveFarm, adapted: dict[str, Path]) -> None:
    from celery import Celery

    app = Celery(broker=farm.redis_url, backend=farm.redis_url)
    app.conf.update(task_serializer="json", result_serializer="msgpack", accept_content=["json", "msgpack"])
    request = {"items": [{"text": TEXT}], "options": {"lora": "money"}}
    queue = "farm.default.cpu.standard"
    sent = app.send_task("farm.encode", args=("org/base", request), queue=queue)
    wrong = app.send_task("farm.encode", args=("org/base", {**request, "options": {"lora": "mony"}}), queue=queue)
    values = sent.get(timeout=30)["items"][0]["dense"]["values"]
    found = np.array([codec.array_of(values)])
    assert cosines(found, reference(adapted["bert"], "wide")[1:2]).min() >= 0.9999
    with pytest.raises(Exception, match="did you mean money"):
        wrong.get(timeout=30)
    app.close()
