"""How texts are worded for a dense model: against sentence-transformers on text that was put together by hand.

The tokenizer keeps every byte, so that a space too many or too few gives another vector.
"""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from common.errors import RequestError
from config_db.model_folders import spec_of_directory
from config_db.spec import Profile
from tasks.messages import Request
from tests.integration.test_dense import REFERENCE, answer, encode, load, run_python
from workers.host.families.dense import DenseFamily
from workers.host.families.protocol import Device

TEXTS = ["a farm", "  spaces around  ", "", "two\nlines", "{text} and {instruction}", "Ünïcödé 漢字"]
QUERY = "Instruct: {instruction}\nQuery:{text}"
DEFAULT = "Find what answers"

TINY = """
import sys
import torch, transformers
from sentence_transformers import SentenceTransformer, models
from tokenizers import Tokenizer, decoders, models as tm, pre_tokenizers, processors
out = sys.argv[1]
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
words = ["<pad>", "<end>", *alphabet]
tokenizer = Tokenizer(tm.BPE({w: n for n, w in enumerate(words)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>",
    model_max_length=128)
torch.manual_seed(7)
config = transformers.Qwen3Config(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, intermediate_size=64, initializer_range=0.5, pad_token_id=0,
    max_position_embeddings=128)
transformers.AutoModel.from_config(config).save_pretrained(out + "/plain")
fast.save_pretrained(out + "/plain")
word = models.Transformer(out + "/plain", max_seq_length=128)
parts = [word, models.Pooling(32, pooling_mode="lasttoken"), models.Normalize()]
SentenceTransformer(modules=parts, device="cpu", prompts={"query": "ask : ", "passage": "say : "}).save(out + "/st")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    run_python(TINY, str(out))
    return out / "st"


@pytest.fixture(scope="module")
def by_hand(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, npt.NDArray[np.float32]]:
    """What sentence-transformers says of ``TEXTS`` as these lines word them, without any prompt of its own."""
    wordings = {
        "plain": "{}",
        "default": f"Instruct: {DEFAULT}\nQuery:{{}}",
        "own": "Instruct: Find {{text}}\nQuery:{}",
        "empty": "Instruct: \nQuery:{}",
        "profile": "Instruct: Sort\nQuery:{}",
        "document": "<doc> {}",
        "twice": "{0} | {0}",
        "prefix": "do: {}",
        "query prompt": "ask : {}",
        "document prompt": "say : {}",
    }
    place = tmp_path_factory.mktemp("reference")
    texts = [wording.format(text) for wording in wordings.values() for text in TEXTS]
    (place / "texts.json").write_text(json.dumps(texts))
    out = place / "reference.npy"
    run_python(REFERENCE, str(folder), str(place / "texts.json"), str(out), json.dumps({"prompt": ""}))
    vectors = np.load(out).reshape(len(wordings), len(TEXTS), -1)
    return dict(zip(wordings, vectors, strict=True))


@pytest.mark.parametrize(
    ("wording", "changes", "request_"),
    [
        ("default", {"templates": {"query": QUERY}, "default_instruction": DEFAULT}, {"options": {"is_query": True}}),
        ("empty", {"templates": {"query": QUERY}}, {"options": {"is_query": True}}),
        (
            "own",
            {"templates": {"query": QUERY}, "default_instruction": DEFAULT},
            {"options": {"is_query": True}, "instruction": "Find {text}"},
        ),
        (
            "own",
            {"templates": {"query": QUERY}},
            {"options": {"is_query": True, "instruction": "Find {text}"}},
        ),
        ("plain", {"templates": {"query": QUERY}, "default_instruction": DEFAULT}, {}),
        (
            "document prompt",
            {"templates": {"query": QUERY}, "default_instruction": DEFAULT},
            {"options": {"is_query": False}},
        ),
        ("document", {"templates": {"query": QUERY, "document": "<doc> {text}"}}, {"options": {"is_query": False}}),
        ("document", {"templates": {"document": "<doc> {text}"}}, {}),
        ("query prompt", {"templates": {"document": "<doc> {text}"}}, {"options": {"is_query": True}}),
        ("twice", {"templates": {"document": "{text} | {text}"}}, {}),
        ("prefix", {"templates": {"document": "<doc> {text}"}}, {"instruction": "do: "}),
        ("plain", {}, {}),
        ("query prompt", {}, {"options": {"is_query": True}}),
        ("document prompt", {}, {"options": {"is_query": False}}),
        ("query prompt", {"default_prompt": "query"}, {}),
        ("prefix", {}, {"options": {"is_query": True}, "instruction": "do: "}),
    ],
)
def test_texts_are_worded_as_by_hand(
    folder: Path,
    by_hand: dict[str, npt.NDArray[np.float32]],
    wording: str,
    changes: dict[str, Any],
    request_: dict[str, Any],
) -> None:
    vectors = encode(load(folder, **changes), TEXTS, **request_)
    np.testing.assert_allclose(vectors, by_hand[wording], atol=1e-5)


def test_the_wordings_differ_enough_to_be_told_apart(by_hand: dict[str, npt.NDArray[np.float32]]) -> None:
    found = np.stack([vectors[0] for vectors in by_hand.values()])
    likeness = found @ found.T - np.eye(len(found))
    assert likeness.max() < 0.999


def test_a_profile_has_an_instruction_of_its_own(folder: Path, by_hand: dict[str, npt.NDArray[np.float32]]) -> None:
    base = msgspec.structs.replace(
        spec_of_directory(folder),
        precision="float32",
        templates={"query": QUERY},
        default_instruction=DEFAULT,
        profiles={"sorting": Profile(default_instruction="Sort")},
    )
    model = DenseFamily().load(base.with_profile("sorting"), folder, Device(pass_tokens=512))
    vectors = encode(model, TEXTS, options={"is_query": True})
    np.testing.assert_allclose(vectors, by_hand["profile"], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"is_query": False}])
def test_an_instruction_is_never_dropped_in_silence(folder: Path, options: dict[str, Any]) -> None:
    model = load(folder, templates={"query": QUERY, "document": "<doc> {text}"})
    good, refused = answer(model, Request(items=["a"]), Request(items=["a"], instruction="Find", options=options))
    assert isinstance(good, list)
    assert isinstance(refused, RequestError)
    assert refused.param == "params.instruction"
    assert "query" in refused.message
