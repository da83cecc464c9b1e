"""Documents of the public form, over HTTP: what becomes of them, and what the answer says was left out."""

from typing import Any

import pytest
import yaml

from tests.web import Web

MODELS = "/v1/configs/models"
EMBEDDER = """
sie_id: {id}
hf_id: org/embedder
hf_revision: 0123abc
inputs: {{text: true, image: false, audio: false, video: false}}
tasks:
  encode:
    dense: {{dim: 1024}}
    sparse: null
    multivector: null
  score: null
  extract: null
max_sequence_length: 8192
profiles:
  default:
    max_batch_tokens: 16384
    compute_precision: bfloat16
    adapter_path: sie_server.adapters.qwen2_flash:Qwen2FlashAdapter
    adapter_options:
      loadtime: {{causal: true, trust_remote_code: true}}
      runtime:
        pooling: last
        normalize: true
        query_template: "Instruct: {{instruction}}\\nQuery: {{text}}"
        doc_template: "passage: {{text}}"
        default_instruction: find passages
  plain:
    extends: default
    adapter_options:
      runtime: {{normalize: false, output_types: [dense]}}
  banking:
    extends: default
    adapter_options:
      runtime: {{lora_id: org/banking-lora, instruction: classify}}
"""


@pytest.fixture(scope="module")
def web(config_web: Web) -> Web:
    return config_web


def shown(web: Web, model: str) -> Any:
    return yaml.safe_load(web.http.get(f"{MODELS}/{model}").text)


def test_an_embedder_of_the_public_form_becomes_ours(web: Web) -> None:
    made = web.http.post(MODELS, content=EMBEDDER.format(id="org/embedder"))
    assert made.status_code == 201, made.text
    assert made.json()["created_profiles"] == ["default", "plain"]
    assert shown(web, "org/embedder") == {
        "id": "org/embedder",
        "family": "dense",
        "source": {"hub": "org/embedder", "revision": "0123abc"},
        "dims": {"dense": 1024},
        "max_length": 8192,
        "precision": "bfloat16",
        "pooling": "last",
        "normalize": True,
        "templates": {"query": "Instruct: {instruction}\nQuery: {text}", "document": "passage: {text}"},
        "default_instruction": "find passages",
        "profiles": {"plain": {"normalize": False, "outputs": ["dense"]}},
        "adapters": {"banking": {"hub": "org/banking-lora"}},
        "limits": {"max_batch_tokens": 16384},
    }
    warnings = "\n".join(made.json()["warnings"])
    for ignored in (
        "loadtime.causal",
        "loadtime.trust_remote_code is ignored: no code of a repository is run",
        "profiles.banking is kept as the adapter",
        "banking.adapter_options.runtime.instr",
    ):
        assert ignored in warnings


def test_it_can_be_sent_again_and_grown(web: Web) -> None:
    document = EMBEDDER.format(id="org/again")
    web.http.post(MODELS, content=document)
    again = web.http.post(MODELS, content=document)
    assert (again.status_code, again.json()["changed"]) == (200, False)
    assert again.json()["existing_profiles_skipped"] == ["default", "plain"]
    grown = web.http.post(
        MODELS,
        json={"sie_id": "org/again", "profiles": {"half": {"extends": "default", "compute_precision": "float16"}}},
    )
    assert (grown.status_code, grown.json()["created_profiles"]) == (201, ["half"])
    assert shown(web, "org/again")["profiles"]["half"] == {"precision": "float16"}
    changed = web.http.post(MODELS, content=document.replace("8192", "512"))
    assert (changed.status_code, changed.json()["detail"]["conflicting_fields"]) == (409, ["max_length"])


@pytest.mark.parametrize(
    ("tasks", "adapter", "family", "operations", "outputs"),
    [
        ({"score": {}}, "bert_flash_cross_encoder:A", "cross-encoder", ["score"], ["score"]),
        (
            {"encode": {"multivector": {"dim": 96}}, "score": {}},
            "colbert:A",
            "multivector",
            ["encode", "score"],
            ["multivector"],
        ),
        ({"encode": {"sparse": {"dim": 30522}}}, "splade_flash.adapter:A", "sparse", None, ["sparse"]),
        ({"extract": {}}, "gliner:A", "gliner", ["extract"], ["json"]),
    ],
)
def test_adapters_stand_for_families(
    web: Web, tasks: Any, adapter: str, family: str, operations: list[str] | None, outputs: list[str]
) -> None:
    document = {
        "sie_id": f"by/{family}",
        "hf_id": "by/adapter",
        "tasks": tasks,
        "profiles": {"default": {"adapter_path": f"sie_server.adapters.{adapter}"}},
    }
    made = web.http.post(MODELS, json=document)
    assert made.status_code == 201, made.text
    became = shown(web, f"by/{family}")
    assert (became["family"], became.get("operations"), became["outputs"]) == (family, operations, outputs)


def test_what_our_family_does_not_do_is_left_out_and_told(web: Web) -> None:
    document = {
        "sie_id": "more/than-ours",
        "hf_id": "more/than-ours",
        "inputs": {"text": True, "image": True},
        "tasks": {"encode": {"dense": {"dim": 8}, "multivector": {"dim": 4}}, "score": {}},
        "profiles": {
            "default": {"adapter_path": "sie_server.adapters.sentence_transformer:A"},
            "both": {"extends": "default", "adapter_options": {"runtime": {"output_types": ["dense", "sparse"]}}},
        },
    }
    made = web.http.post(MODELS, json=document)
    assert made.status_code == 201, made.text
    for ignored in (
        "operations score",
        "outputs multivector",
        "inputs image",
        "outputs sparse of profiles.both",
        "tasks.encode.multivector",
    ):
        assert f"{ignored} is ignored: the model's family here has none" in made.json()["warnings"]
    became = shown(web, "more/than-ours")
    assert became["dims"] == {"dense": 8}
    assert not {"operations", "outputs", "inputs"} & became.keys()


def test_an_adapter_path_may_be_the_operator_s_own(web: Web) -> None:
    document = {
        "sie_id": "own/adapter",
        "weights_path": "/models/own",
        "tasks": {"encode": {"dense": {"dim": 4}}},
        "profiles": {"default": {"adapter_path": "tests.fakes.family:FakeFamily"}},
    }
    assert web.http.post(MODELS, json=document).json()["warnings"] == []
    assert shown(web, "own/adapter")["family"] == "fake"


ADAPTERS = "sie_server.adapters"


def options(profile: str = "default", **runtime: Any) -> dict[str, Any]:
    """Profiles of which one has these options of its adapter."""
    base = {"default": {"adapter_path": f"{ADAPTERS}.bert_flash:A"}}
    said = {"extends": "default", "adapter_options": {"runtime": runtime}}
    return {"profiles": {**base, profile: {**base["default"], **said} if profile == "default" else said}}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"profiles": {"default": {"adapter_path": "sie_server.adapters.whisper:A"}}}, "profiles.default.adapter_path"),
        ({"profiles": {"default": {}}}, "profiles.default"),
        ({"profiles": None}, "profiles"),
        ({"tasks": {"generate": {}}}, "tasks"),
        ({"tasks": {"encode": {"dense": {"dim": "wide"}}}}, "tasks.encode.dense.dim"),
        ({"max_sequence_length": 0}, "max_sequence_length"),
        ({"hf_id": "../x"}, "hf_id"),
        ({"hf_revision": ".."}, "hf_revision"),
        ({"hf_id": None, "weights_path": "here"}, "weights_path"),
        ({"hf_id": None}, "hf_id"),
        (options(pooling="middle"), "profiles.default.adapter_options.runtime.pooling"),
        (options(query_template="no text"), "profiles.default.adapter_options.runtime.query_template"),
        (options(output_types="dense"), "profiles.default.adapter_options.runtime.output_types"),
        (options(output_types=5), "profiles.default.adapter_options.runtime.output_types"),
        (options(output_types=[1]), "profiles.default.adapter_options.runtime.output_types[0]"),
        (options(output_types=["dens"]), "profiles.default.adapter_options.runtime.output_types[0]"),
        (options(output_types=["sparse"]), "profiles.default.adapter_options.runtime.output_types"),
        ({"tasks": {"encode": {"sparse": {}}}}, "tasks"),
        (options(normalize="yes"), "profiles.default.adapter_options.runtime.normalize"),
        (options("v1", doc_template="no text"), "profiles.v1.adapter_options.runtime.doc_template"),
        (options("v1", lora_id="../x"), "profiles.v1.adapter_options.runtime.lora_id"),
        ({"profiles": {"v1": {"adapter_path": f"{ADAPTERS}.bert_flash:A"}}}, "profiles.default.adapter_path"),
    ],
)
def test_what_cannot_be_read_names_its_field(web: Web, change: Any, field: str) -> None:
    document = {
        "sie_id": "bad/m",
        "hf_id": "bad/m",
        "tasks": {"encode": {"dense": {"dim": 4}}},
        "profiles": {"default": {"adapter_path": "sie_server.adapters.bert_flash:A"}},
    }
    refused = web.http.post(MODELS, json={**document, **change})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, field)
    assert refused.json()["detail"]["error"] == "validation_error"
    assert refused.json()["detail"]["details"][0]["field"] == field
