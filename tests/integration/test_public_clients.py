"""Clients of other servers, unmodified, against a whole farm: a web tier, a real worker, models of the fake family."""

import base64
from collections.abc import Iterator

import httpx
import msgspec
import numpy as np
import openai
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.fakes.family import PLACE, fake_score, fake_vector
from tests.live import LiveFarm, fake_spec
from tests.services import PostgresServer, RedisServer
from tests.web import Web, start_web, stop_web

TEXTS = ["one", "zwei", "три"]


@pytest.fixture(scope="module")
def web(
    redis_server: RedisServer, postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Web]:
    directory = tmp_path_factory.mktemp("clients")
    farm = LiveFarm(redis_server.url, postgres_server.fresh_database(), directory)
    ranks = msgspec.structs.replace(fake_spec("org/rank"), operations=("score",), outputs=("score",))
    farm.add_models(msgspec.structs.replace(fake_spec("org/m"), matryoshka=(2,)), ranks)
    farm.start_worker()
    web = start_web(redis_server.url, directory, (), DATABASE_URL=farm.database_url, EXTRA_FAMILIES=f"fake={PLACE}")
    yield web
    stop_web(web)
    farm.close()


# -- the openai client ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(web: Web) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{web.port}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("form", ["float", "base64", None])
def test_openai_embeds_texts(client: openai.OpenAI, form: str | None) -> None:
    """The client asks for base64 unless told otherwise, and unpacks it."""
    rest = {} if form is None else {"encoding_format": form}
    found = client.embeddings.create(model="org/m", input=TEXTS, **rest)  # type: ignore[arg-type]  # a parameter
    rows = [
        np.frombuffer(base64.b64decode(one.embedding), "<f4") if isinstance(one.embedding, str) else one.embedding
        for one in found.data
    ]
    assert [one.index for one in found.data] == [0, 1, 2]
    assert np.allclose(rows, [fake_vector(text) for text in TEXTS], atol=1e-6)
    assert found.model == "org/m"
    assert found.usage.prompt_tokens == found.usage.total_tokens > 0


def test_openai_embeds_one_text(client: openai.OpenAI) -> None:
    found = client.embeddings.create(model="org/m", input="alone")
    assert np.allclose([one.embedding for one in found.data], [fake_vector("alone")], atol=1e-6)


def test_openai_lists_models(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"org/m", "org/rank"}
    assert client.models.retrieve("org/m").owned_by == "farmhand"


def test_openai_reads_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.embeddings.create(model="org/none", input="x")
    assert (missing.value.code, missing.value.type) == ("model_not_found", "invalid_request_error")
    for wrong, param in (
        ({"input": []}, "input"),
        ({"input": [""]}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": [1, 2, 3]}, "input"),
        ({"input": [[1, 2], [3]]}, "input"),
        ({"input": "x", "dimensions": 3}, "dimensions"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x" * (2 * 2**20 + 1)}, "input[0]"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.embeddings.create(**{"model": "org/m", **wrong})  # type: ignore[arg-type]  # wrong on purpose
        assert refused.value.param == param, wrong


# -- rerank --------------------------------------------------------------------------------------------------------


def rerank(web: Web, **body: object) -> httpx.Response:
    return web.http.post("/v1/rerank", json={"model": "org/rank", "query": "q", **body})


def test_documents_are_ranked(web: Web) -> None:
    expected = sorted(((fake_score("q", text), at) for at, text in enumerate(TEXTS)), reverse=True)
    found = rerank(web, documents=TEXTS, return_documents=True).json()
    assert [(one["index"], one["document"]) for one in found["results"]] == [
        (at, {"text": TEXTS[at]}) for _, at in expected
    ]
    assert np.allclose([one["relevance_score"] for one in found["results"]], [score for score, _ in expected])
    objects = rerank(web, documents=[{"text": text} for text in TEXTS], top_n=2).json()
    assert [one["index"] for one in objects["results"]] == [at for _, at in expected[:2]]
    assert "document" not in objects["results"][0]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"documents": []}, "documents"),
        ({"documents": ["x"] * 1001}, "documents"),
        ({"documents": ["a"], "top_n": 0}, "top_n"),
        ({"documents": [3]}, "documents[0]"),
        ({"documents": ["a"], "colour": "red"}, None),
        ({"documents": ["a"], "model": "org/m"}, "model"),
    ],
)
def test_what_cannot_be_ranked_names_its_field(web: Web, body: dict[str, object], param: str | None) -> None:
    response = rerank(web, **body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    if param is not None:
        assert response.json()["error"]["param"] == param


# -- Open Inference Protocol ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def infers(web: Web) -> Iterator[triton.InferenceServerClient]:
    client = triton.InferenceServerClient(f"127.0.0.1:{web.port}")
    yield client
    client.close()


def tensor(texts: list[str], *, binary: bool) -> triton.InferInput:
    given = triton.InferInput("text", [len(texts)], "BYTES")
    given.set_data_from_numpy(np.array([text.encode() for text in texts], dtype=np.object_), binary_data=binary)
    return given


@pytest.mark.parametrize("sends", [True, False], ids=["binary in", "JSON in"])
@pytest.mark.parametrize("gets", [True, False], ids=["binary out", "JSON out"])
def test_triton_infers(infers: triton.InferenceServerClient, sends: bool, gets: bool) -> None:
    wanted = [triton.InferRequestedOutput("embedding", binary_data=gets)]
    found = infers.infer("org/m", [tensor(TEXTS, binary=sends)], outputs=wanted, request_id="7")
    assert np.allclose(found.as_numpy("embedding"), [fake_vector(text) for text in TEXTS], atol=1e-6)
    assert found.get_response()["id"] == "7"


def test_triton_sees_the_server_and_its_models(infers: triton.InferenceServerClient) -> None:
    assert infers.is_server_live()
    assert infers.is_server_ready()
    assert infers.get_server_metadata()["name"] == "farmhand"
    assert infers.is_model_ready("org/m")
    assert infers.is_model_ready("org/m", "1")
    assert not infers.is_model_ready("org/none")
    assert infers.get_model_metadata("org/m", "1")["outputs"] == [
        {"name": "embedding", "datatype": "FP32", "shape": [-1, 4]}
    ]


def test_triton_reads_errors(infers: triton.InferenceServerClient) -> None:
    for model, version, says in (("org/none", "", "org/none"), ("org/m", "2", "version"), ("org/rank", "", "encode")):
        with pytest.raises(InferenceServerException, match=says):
            infers.infer(model, [tensor(["x"], binary=True)], model_version=version)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{}",
        b'{"inputs": []}',
        b'{"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a"]}]}',
        b'{"inputs": [{"name": "text", "shape": [0], "datatype": "BYTES", "data": []}]}',
        b'{"inputs": [{"name": "text", "shape": [-1], "datatype": "BYTES", "data": ["a"]}]}',
        b'{"inputs": [{"name": "text", "shape": [1], "datatype": "FP32", "data": [1.0]}]}',
        b'{"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [1]}]}',
        b'{"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 9}}]}',
        b'{"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}], "outputs": [{"name": "b"}]}',
    ],
)
def test_what_is_not_of_the_protocol_is_one_line(web: Web, body: bytes) -> None:
    response = web.http.post("/v2/models/org/m/infer", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert isinstance(response.json()["error"], str)


@pytest.mark.parametrize("length", ["-1", "x", "99999", "\u0661"])
def test_a_hostile_length_is_refused(web: Web, length: str) -> None:
    sent = {"Inference-Header-Content-Length": length.encode()}
    assert web.http.post("/v2/models/org/m/infer", content=b"{}", headers=sent).status_code == 400


def test_elements_that_lie_about_their_length_are_refused(web: Web) -> None:
    said = b'{"inputs": [{"name": "t", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": 6}}]}'
    sent = {"Inference-Header-Content-Length": str(len(said))}
    for tail in (b"\xff\xff\xff\xffab", b"\x01\x00\x00\x00ab", b"\x02\x00\x00\x00\xff\xfe"):
        assert web.http.post("/v2/models/org/m/infer", content=said + tail, headers=sent).status_code == 400
