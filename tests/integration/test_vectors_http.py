"""Sparse, multivector and BGE-M3 models over real HTTP, with a real worker."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from config_db.model_folders import spec_of_directory
from config_db.spec import Profile
from tasks import codec
from tests.live import LiveFarm
from tests.services import PostgresServer, RedisServer
from tests.token_models import TEXTS, made
from tests.web import Web, start_web, stop_web

MSGPACK = {"Content-Type": "application/msgpack", "Accept": "application/msgpack"}
MODELS = {"splade": "bert", "free": "free", "late": "stanford", "m3": "m3"}
FOLDED = Profile(
    outputs=("dense",),
    options={"muvera": {"num_repetitions": 2, "num_simhash_projections": 2, "projection_dim": 4}},
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory)


@pytest.fixture(scope="module")
def web(
    redis_server: RedisServer, postgres_server: PostgresServer, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Web]:
    """A whole farm: web tier, one worker of one host, and the models, each as its folder says."""
    directory = tmp_path_factory.mktemp("vectors")
    with closing(LiveFarm(redis_server.url, postgres_server.fresh_database(), directory)) as farm:
        for name, folder in MODELS.items():
            spec = spec_of_directory(tiny / folder, model_id=name)
            profiles = {"folded": FOLDED} if name == "late" else {}
            farm.add_models(msgspec.structs.replace(spec, precision="float32", profiles=profiles))
        farm.start_worker(batch_max_items=16)
        web = start_web(redis_server.url, directory, (), DATABASE_URL=farm.database_url)
        web.http.timeout = 90  # the first request to a family imports its library
        yield web
        stop_web(web)


def encode(web: Web, model: str, texts: list[str], **params: Any) -> list[dict[str, Any]]:
    """The results of a request in msgpack, its arrays read."""
    body = {"items": [{"text": text} for text in texts], "params": params}
    answer = web.http.post(f"/v1/encode/{model}", content=msgspec.msgpack.encode(body), headers=MSGPACK)
    assert answer.status_code == 200, answer.content
    return [
        {name: {key: _read(value) for key, value in output.items()} for name, output in item.items()}
        for item in msgspec.msgpack.decode(answer.content)["items"]
    ]


def _read(value: Any) -> Any:
    return codec.array_of(value) if codec.is_array(value) else value


@pytest.mark.parametrize(("model", "is_query"), [("splade", False), ("free", False), ("free", True)])
def test_sparse_weights_arrive_as_the_library_has_them(web: Web, tiny: Path, model: str, is_query: bool) -> None:
    """Also where the request is cut over several micro-batches."""
    expected = np.load(tiny / MODELS[model] / ("query.npy" if is_query else "document.npy"))
    items = encode(web, model, TEXTS, options={"is_query": is_query})
    assert len(items) == len(TEXTS) > 32
    for item, row in zip(items, expected, strict=True):
        sparse = item["sparse"]
        assert (sparse["dtype"], sparse["indices"].dtype, sparse["values"].dtype) == ("float32", np.int32, np.float32)
        assert sparse["dims"] >= len(row)
        found = np.zeros(sparse["dims"])
        found[sparse["indices"]] = sparse["values"]
        np.testing.assert_allclose(found[: len(row)], row, atol=1e-4)


@pytest.mark.parametrize("is_query", [True, False])
def test_a_vector_for_each_token_arrives_as_float64_has_it(web: Web, tiny: Path, is_query: bool) -> None:
    with np.load(tiny / "stanford" / ("query.npz" if is_query else "document.npz")) as found:
        expected = [found[name] for name in found.files]
    for item, rows in zip(encode(web, "late", TEXTS, options={"is_query": is_query}), expected, strict=True):
        told = item["multivector"]
        assert (told["num_tokens"], told["token_dims"], told["dtype"]) == (*rows.shape, "float32")
        np.testing.assert_allclose(told["values"], rows, atol=2e-5)


def test_three_outputs_of_one_request_in_json(web: Web, tiny: Path) -> None:
    kinds = ["dense", "sparse", "multivector"]
    body = {"items": [{"text": text, "id": f"i{n}"} for n, text in enumerate(TEXTS)], "params": {"output_types": kinds}}
    answer = web.http.post("/v1/encode/m3", json=body).json()
    assert answer["usage"]["input_tokens"] > len(TEXTS)
    with np.load(tiny / "m3" / "dense.npz") as dense, np.load(tiny / "m3" / "multivector.npz") as vectors:
        for place, item in enumerate(answer["items"]):
            assert item["id"] == f"i{place}"
            assert {*item} == {"id", *kinds}
            np.testing.assert_allclose(item["dense"]["values"], dense[f"arr_{place}"], atol=2e-5)
            rows = np.reshape(item["multivector"]["values"], (-1, 24))
            np.testing.assert_allclose(rows, vectors[f"arr_{place}"], atol=2e-5)
            assert len(item["sparse"]["indices"]) == len(item["sparse"]["values"])


def test_items_are_ranked_by_maxsim(web: Web, tiny: Path) -> None:
    items = [{"text": text, "id": f"i{n}"} for n, text in enumerate(TEXTS)]
    answer = web.http.post("/v1/score/late", json={"query": {"text": TEXTS[1], "id": "q"}, "items": items}).json()
    assert answer["query_id"] == "q"
    scores = [one["score"] for one in answer["scores"]]
    assert scores == sorted(scores, reverse=True)
    expected = np.load(tiny / "stanford" / "maxsim.npy")[1]
    np.testing.assert_allclose(scores, [expected[int(one["item_id"][1:])] for one in answer["scores"]], rtol=1e-4)
    other = web.http.post("/v1/score/m3", json={"query": {"text": TEXTS[1]}, "items": items[:5]}).json()
    assert other["scores"][0]["item_id"] == "i1"


def test_vectors_are_folded_into_one_by_option_or_by_profile(web: Web) -> None:
    by_option = encode(web, "late", TEXTS[:3], options=FOLDED.options)
    by_profile = encode(web, "late:folded", TEXTS[:3])
    for one, other in zip(by_option, by_profile, strict=True):
        assert one.keys() == other.keys() == {"dense"}
        assert one["dense"]["dims"] == 2 * 4 * 4
        np.testing.assert_allclose(one["dense"]["values"], other["dense"]["values"], atol=1e-5)
    narrow = encode(web, "late", TEXTS[:3], options=FOLDED.options, output_dtype="binary")
    assert narrow[0]["dense"]["values"].tobytes() == np.packbits(by_option[0]["dense"]["values"] > 0).tobytes()


@pytest.mark.parametrize(
    ("model", "params", "field"),
    [
        ("late", {"options": {"muvera": {"seed": "x"}}}, "params.options.muvera"),
        ("late", {"output_types": ["sparse"]}, "params.output_types[0]"),
        ("splade", {"options": {"max_active_dims": "few"}}, "params.options.max_active_dims"),
        ("m3", {"options": {"normalize": "yes"}}, "params.options.normalize"),
    ],
)
def test_a_bad_request_is_400_and_names_the_field(web: Web, model: str, params: dict[str, Any], field: str) -> None:
    answer = web.http.post(f"/v1/encode/{model}", json={"items": [{"text": "a"}], "params": params})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "INVALID_INPUT", field)


def test_families_serve_side_by_side(web: Web) -> None:
    """One host has them all resident, and answers as each does alone."""
    asked = [("splade", "sparse"), ("free", "sparse"), ("late", "multivector"), ("m3", "dense")] * 4
    alone = {model: encode(web, model, TEXTS[:3])[0][kind]["values"] for model, kind in asked[:4]}
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda one: encode(web, one[0], TEXTS[:3])[0][one[1]]["values"], asked)
        for (model, _), values in zip(asked, answers, strict=True):
            np.testing.assert_allclose(values, alone[model], atol=1e-5)
