"""``POST /v1/score`` through the whole farm: gunicorn, Redis, a real worker, and models of every family that scores."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from celery import Celery

from config_db.model_folders import spec_of_directory
from config_db.spec import ModelSpec, Profile, Source
from tasks import names
from tasks.names import Lane, queue_name
from tests.fakes.family import fake_score
from tests.live import POOL, PROFILE, LiveFarm
from tests.rerankers import PAIRS
from tests.services import PostgresServer, RedisServer
from tests.web import Web, start_web, stop_web

MSGPACK = "application/msgpack"
FAKE = ModelSpec(
    id="fake/rank",
    family="fake",
    source=Source(path="/"),
    operations=("encode", "score"),
    outputs=("dense", "score"),
    profiles={"other": Profile(options={"dim": 8})},
)


@dataclass
class Farm:
    """A running farm and what the libraries say of its models."""

    web: Web
    live: LiveFarm
    references: dict[str, Any]

    def score(self, model: str, query: Any, items: Any, **rest: Any) -> httpx.Response:
        body = {"query": query, "items": items}
        return self.web.http.post(f"/v1/score/{model}", json=body, **rest)


@pytest.fixture(scope="module")
def farm(
    redis_server: RedisServer,
    postgres_server: PostgresServer,
    cross_encoders: Path,
    causal_rerankers: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Farm]:
    directory = tmp_path_factory.mktemp("score")
    folders = {"tiny/cross": cross_encoders / "bert" / "st", "tiny/causal": causal_rerankers / "qwen3" / "two-words"}
    database_url = postgres_server.fresh_database()
    live = LiveFarm(redis_server.url, database_url, directory)
    rankers = [
        msgspec.structs.replace(spec_of_directory(folder, model_id=name), precision="float32")
        for name, folder in folders.items()
    ]
    live.add_models(FAKE, *rankers)
    live.start_worker(batch_max_items=16)
    web = start_web(redis_server.url, directory, (), DATABASE_URL=database_url, CONFIG_POLL_S="0.2")
    references = {name: np.load(f"{folder}.npy") for name, folder in folders.items()}
    yield Farm(web, live, references)
    stop_web(web)
    live.close()


def texts_of(count: int) -> list[str]:
    return [f"text {n}" for n in range(count)]


def expected(query: str, texts: list[str]) -> list[dict[str, Any]]:
    ranked = sorted(((fake_score(query, text), at) for at, text in enumerate(texts)), key=lambda one: -one[0])
    return [{"item_id": f"item-{at}", "score": score, "rank": rank} for rank, (score, at) in enumerate(ranked)]


def test_items_are_ranked_in_json(farm: Farm) -> None:
    items = [{"text": "a", "id": "first"}, {"text": "b"}, {"text": "c", "id": "third"}]
    response = farm.score("fake/rank", {"text": "which", "id": "Q"}, items)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    answer = response.json()
    assert (answer["model"], answer["query_id"]) == ("fake/rank", "Q")
    names_of = {"item-0": "first", "item-1": "item-1", "item-2": "third"}
    ranked = expected("which", ["a", "b", "c"])
    assert answer["scores"] == [{**one, "item_id": names_of[one["item_id"]]} for one in ranked]
    assert answer["usage"] == {"input_tokens": 3, "pairs": 3}
    assert set(answer["timing"]) == {"queue_ms", "tokenization_ms", "inference_ms", "postprocessing_ms", "total_ms"}
    headers = response.headers
    assert (headers["X-SIE-Units-Input-Tokens"], headers["X-SIE-Units-Pairs"]) == ("3", "3")
    assert headers["X-SIE-Model-Revision"]
    assert float(headers["X-Total-Time"]) > 0


def test_items_are_ranked_in_msgpack(farm: Farm) -> None:
    body = msgspec.msgpack.encode({"query": {"text": "q"}, "items": [{"text": one} for one in texts_of(3)]})
    headers = {"Content-Type": MSGPACK, "Accept": MSGPACK}
    response = farm.web.http.post("/v1/score/fake/rank", content=body, headers=headers)
    assert (response.status_code, response.headers["content-type"]) == (200, MSGPACK)
    answer = msgspec.msgpack.decode(response.content)
    assert answer["query_id"] is None
    assert answer["scores"] == expected("q", texts_of(3))


@pytest.mark.parametrize("count", [1, 17, 1000])
def test_a_request_larger_than_a_micro_batch_is_ranked_whole(farm: Farm, count: int) -> None:
    items = [{"text": one} for one in texts_of(count)]
    answer = farm.score("fake/rank", {"text": "q"}, items).json()
    assert answer["scores"] == expected("q", texts_of(count))
    assert answer["usage"]["pairs"] == count


def test_an_asynchronous_ranking_has_the_same_shape_everywhere(farm: Farm) -> None:
    items, query = [{"text": one} for one in texts_of(20)], {"text": "q", "id": "Q"}
    direct = farm.score("fake/rank", query, items).json()
    accepted = farm.score("fake/rank", query, items, headers={"Prefer": "respond-async"})
    assert accepted.status_code == 202
    task_id = accepted.json()["task_id"]
    view = farm.web.http.get(f"/v1/tasks/{task_id}?wait=20").json()
    assert (view["state"], view["operation"]) == ("succeeded", "score")
    packed = farm.web.http.get(f"/v1/tasks/{task_id}", headers={"Accept": MSGPACK})
    reader = Celery(backend=farm.live.redis_url, set_as_current=False)
    reader.conf.update(result_serializer="msgpack", accept_content=["msgpack"])
    stored = reader.AsyncResult(task_id).get(timeout=5)
    reader.close()
    for result in (view["result"], msgspec.msgpack.decode(packed.content)["result"], stored):
        assert result.keys() == direct.keys()
        assert {name: result[name] for name in result if name != "timing"} == {
            name: direct[name] for name in direct if name != "timing"
        }
    assert farm.live.redis.exists(names.celery_meta(task_id))


def test_a_plain_celery_producer_gets_a_ranking(farm: Farm) -> None:
    """Without names of its own for the items, of a request that is cut into micro-batches."""
    producer = Celery(broker=farm.live.redis_url, backend=farm.live.redis_url, set_as_current=False)
    producer.conf.update(
        task_serializer="msgpack", result_serializer="msgpack", accept_content=["json", "msgpack"], task_protocol=2
    )
    request = {"query": {"text": "q", "id": "Q"}, "items": [{"text": one} for one in texts_of(40)]}
    queue = queue_name(POOL, PROFILE, Lane.STANDARD)
    result = producer.send_task("farm.score", args=("fake/rank", request), queue=queue).get(timeout=15)
    assert (result["model"], result["query_id"]) == ("fake/rank", "Q")
    assert result["scores"] == expected("q", texts_of(40))
    producer.close()


def test_a_profile_may_be_asked_for(farm: Farm) -> None:
    body = {"query": {"text": "q"}, "items": [{"text": "a"}], "options": {"profile": "other"}}
    response = farm.web.http.post("/v1/score/fake/rank", json=body)
    assert response.json()["model"] == "fake/rank:other"
    ranked = {"model": "fake/rank", "query": "q", "documents": ["a"], "options": {"profile": "other"}}
    assert farm.web.http.post("/v1/rerank", json=ranked).json()["model"] == "fake/rank:other"


@pytest.mark.parametrize("model", ["tiny/cross", "tiny/causal"])
def test_many_callers_get_the_librarys_scores(farm: Farm, model: str) -> None:
    """Each its own query, all at once, in lists of their own."""

    def ask(pair: tuple[str, str]) -> float:
        query, text = pair
        response = farm.score(model, {"text": query}, [{"text": text}])
        assert response.status_code == 200, response.text
        return float(response.json()["scores"][0]["score"])

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, PAIRS))
    np.testing.assert_allclose(found, farm.references[model], atol=1e-4)


def test_a_request_that_fails_leaves_its_batch_mates_alone(farm: Farm) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda text: farm.score("fake/rank", {"text": "q"}, [{"text": text}]), ["a", "!raise", "b", "c"])
        )
    assert [answer.status_code for answer in answers] == [200, 500, 200, 200]
    assert answers[1].json()["error"]["code"] == "INFERENCE_ERROR"
