"""What kind of model a set of files is, told from names and small JSON files."""

from collections.abc import Collection
from typing import Any

import pytest

from common.errors import ModelUnsupportedError
from config_db.detect import describe
from config_db.spec import ModelSpec, Source

WEIGHTS = {"model.safetensors": None}
BERT = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 8, "vocab_size": 30}


class Files:
    """Files as a mapping: names to the content of JSON files, None for any other."""

    def __init__(self, content: dict[str, Any]) -> None:
        self._content = content

    def names(self) -> Collection[str]:
        return self._content

    def json(self, name: str) -> Any:
        return self._content.get(name)


def modules(*kinds: str) -> list[dict[str, str]]:
    """As sentence-transformers writes them: the first in the root, each other in a folder of its own."""
    return [
        {
            "type": f"sentence_transformers.models.{kind}" if "." not in kind else kind,
            "path": f"{n}_{kind}" if n else "",
        }
        for n, kind in enumerate(kinds)
    ]


def told(**files: Any) -> ModelSpec:
    content = {f"{name}.json": value for name, value in files.items()}
    return describe(Files(WEIGHTS | content), model_id="org/m", source={"hub": "org/m", "revision": "main"})


def classifier(*labels: str) -> dict[str, Any]:
    return {"architectures": ["XForSequenceClassification"], "id2label": {str(n): one for n, one in enumerate(labels)}}


@pytest.mark.parametrize(
    ("family", "files"),
    [
        ("dense", {"config": BERT}),
        ("dense", {"config": BERT, "modules": modules("Transformer", "Pooling", "Normalize")}),
        ("sparse", {"config": BERT, "modules": modules("MLMTransformer", "SpladePooling")}),
        (
            "sparse",
            {
                "config": BERT,
                "modules": modules("Router"),
                "config_sentence_transformers": {"model_type": "SparseEncoder"},
            },
        ),
        ("multivector", {"config": BERT, "modules": modules("Transformer", "pylate.models.Dense.Dense")}),
        ("multivector", {"config": {"architectures": ["HF_ColBERT"], "hidden_size": 8}}),
        ("cross-encoder", {"config": classifier("LABEL_0")}),
        (
            "causal-reranker",
            {
                "config": {"architectures": ["Qwen3ForCausalLM"]},
                "config_sentence_transformers": {"model_type": "CrossEncoder"},
            },
        ),
        ("nli", {"config": classifier("contradiction", "neutral", "ENTAILMENT")}),
        ("token-classification", {"config": {"architectures": ["BertForTokenClassification"]}}),
        ("gliner", {"gliner_config": {"max_len": 384}}),
        ("gliner2", {"config": {"model_type": "extractor"}}),
        ("gliclass", {"config": {"model_type": "GLiClass", "architectures": ["GLiClassModel"]}}),
        ("clip", {"config": {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 4}}),
        ("siglip", {"config": {"model_type": "siglip", "architectures": ["SiglipModel"]}}),
    ],
)
def test_a_family_is_told_from_the_files(family: str, files: dict[str, Any]) -> None:
    assert told(**files).family == family


def test_bge_m3_is_told_from_its_heads() -> None:
    heads = {"colbert_linear.pt": None, "sparse_linear.pt": None}
    files = Files(WEIGHTS | heads | {"config.json": BERT, "modules.json": modules("Transformer", "Pooling")})
    spec = describe(files, model_id="org/m", source={"hub": "org/m"})
    assert (spec.family, spec.dims) == ("bge-m3", {"dense": 8, "sparse": 30, "multivector": 8})


def test_a_router_is_looked_into() -> None:
    types = {"query_0_SparseStaticEmbedding": "st.SparseStaticEmbedding", "document_0_Transformer": "st.Transformer"}
    files = {
        "modules.json": modules("Router"),
        "router_config.json": {"types": types},
        "document_0_Transformer/config.json": BERT,
        "document_0_Transformer/model.safetensors": None,
        "document_0_Transformer/tokenizer_config.json": {"model_max_length": 64},
    }
    spec = describe(Files(files), model_id="org/m", source={"hub": "org/m"})
    assert (spec.family, spec.dims, spec.max_length) == ("sparse", {"sparse": 30}, 64)


def test_a_clip_model_of_sentence_transformers_lies_in_a_folder_of_its_own() -> None:
    files = {
        "modules.json": [{"type": "sentence_transformers.models.CLIPModel", "path": "0_CLIPModel"}],
        "0_CLIPModel/config.json": {"model_type": "clip", "projection_dim": 4},
        "0_CLIPModel/model.safetensors": None,
        "0_CLIPModel/tokenizer_config.json": {"model_max_length": 77},
    }
    spec = describe(Files(files), model_id="org/m", source={"hub": "org/m"})
    assert (spec.family, spec.inputs, spec.dims, spec.max_length) == ("clip", ("text", "image"), {"dense": 4}, 77)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("artifact.metadata", {"doc_maxlen": 180}),
        ("config_sentence_transformers.json", {"document_length": 180}),
        ("sentence_bert_config.json", {"document_length": 180, "max_seq_length": 512}),
    ],
)
def test_the_length_of_late_interaction_is_a_documents(name: str, content: dict[str, Any]) -> None:
    config = {"architectures": ["HF_ColBERT"], "hidden_size": 8}
    files = {"config.json": config, "tokenizer_config.json": {"model_max_length": 512}, name: content}
    assert describe(Files(WEIGHTS | files), model_id="org/m", source={"hub": "org/m"}).max_length == 180


@pytest.mark.parametrize(
    ("seen", "files"),
    [
        ("no config.json", {}),
        ("LlamaForCausalLM", {"config": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}}),
        ("BertForMaskedLM", {"config": {**BERT, "architectures": ["BertForMaskedLM"]}}),
        ("positive, negative", {"config": classifier("positive", "negative")}),
        ("Transformer, CNN", {"config": BERT, "modules": modules("Transformer", "CNN")}),
        ("auto_map", {"config": {**BERT, "auto_map": {"AutoConfig": "a.B", "AutoModel": "a.C"}}}),
        ("no width", {"config": {"architectures": ["BertModel"]}}),
        ("not a list", {"config": BERT, "modules": {"a": 1}}),
    ],
)
def test_what_no_family_runs_is_refused_with_what_was_seen(seen: str, files: dict[str, Any]) -> None:
    with pytest.raises(ModelUnsupportedError, match=seen):
        told(**files)


def test_weights_that_are_not_safetensors_are_refused() -> None:
    files = Files({"config.json": BERT, "pytorch_model.bin": None, "onnx/model.safetensors": None})
    with pytest.raises(ModelUnsupportedError, match="no safetensors"):
        describe(files, model_id="org/m", source={"hub": "org/m"})


def test_width_and_length_are_what_the_files_say() -> None:
    spec = told(
        config=BERT,
        modules=modules("Transformer", "Pooling", "Dense"),
        sentence_bert_config={"max_seq_length": 256},
        tokenizer_config={"model_max_length": 512},
        **{"2_Dense/config": {"out_features": 3}},
    )
    assert (spec.dims, spec.max_length, spec.source) == ({"dense": 3}, 256, Source(hub="org/m", revision="main"))
