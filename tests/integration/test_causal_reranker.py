"""Causal rerankers against what their pages do with transformers, and against CrossEncoder, in a process of its own."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from common.errors import ModelLoadError, RequestError
from config_db.model_folders import spec_of_directory
from config_db.spec import ModelSpec, Source
from tasks.messages import Request
from tests.rerankers import PAIRS, answer, score
from workers.host.families.causal_reranker import INSTRUCTION, PREFIX, SUFFIX, CausalRerankerFamily
from workers.host.families.pairs import PairModel
from workers.host.families.protocol import Device

KINDS = ["qwen3", "llama"]
WORDS = {"yes_token": "yes", "no_token": "no"}


def plain_spec(folder: Path, **changes: Any) -> ModelSpec:
    """A spec as the catalogue has one; the length is the tokenizer's."""
    spec = ModelSpec(
        id="org/rank",
        family="causal-reranker",
        source=Source(path=str(folder)),
        operations=("score",),
        outputs=("score",),
        precision="float32",
        options=WORDS,
    )
    return msgspec.structs.replace(spec, **changes)


def load(folder: Path, **changes: Any) -> PairModel:
    if folder.name == "plain":
        spec = plain_spec(folder, **changes)
    else:
        spec = msgspec.structs.replace(spec_of_directory(folder), **{"precision": "float32", **changes})
    return CausalRerankerFamily().load(spec, folder, Device(pass_tokens=1024))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["plain", "two-words", "one-word"])
def test_scores_are_those_of_the_library(causal_rerankers: Path, kind: str, part: str) -> None:
    reference = np.load(causal_rerankers / kind / f"{part}.npy")
    assert np.ptp(reference) > 0.05  # else anything would agree
    model = load(causal_rerankers / kind / part)
    np.testing.assert_allclose(score(model, PAIRS), reference, atol=1e-4)
    alone = np.array([score(model, [pair])[0] for pair in PAIRS])
    np.testing.assert_allclose(alone, reference, atol=1e-4)
    for together in (score(model, PAIRS), score(model, PAIRS[::-1])[::-1]):
        np.testing.assert_allclose(together, alone, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("part", ["plain", "two-words", "one-word"])
def test_an_instruction_stands_where_the_library_puts_it(causal_rerankers: Path, part: str) -> None:
    reference = np.load(causal_rerankers / "qwen3" / f"{part}-instructed.npy")
    model = load(causal_rerankers / "qwen3" / part)
    np.testing.assert_allclose(score(model, PAIRS, instruction="rate it"), reference, atol=1e-4)
    np.testing.assert_allclose(score(model, PAIRS, options={"instruction": "rate it"}), reference, atol=1e-4)
    named = load(causal_rerankers / "qwen3" / part, default_instruction="rate it")
    np.testing.assert_allclose(score(named, PAIRS), reference, atol=1e-4)
    assert np.abs(score(model, PAIRS) - reference).max() > 0.01


def test_a_template_of_the_specs_own_is_followed(causal_rerankers: Path) -> None:
    """The spec spells Qwen3's texts with the instruction written out: the scores are those of its page."""
    folder = causal_rerankers / "qwen3" / "plain"
    templates = {"query": f"<Instruct>: {INSTRUCTION}\n<Query>: {{text}}\n", "document": "<Document>: {text}"}
    model = load(folder, templates=templates, options={**WORDS, "prefix": PREFIX, "suffix": SUFFIX})
    np.testing.assert_allclose(score(model, PAIRS), np.load(folder.with_name("plain.npy")), atol=1e-4)
    (refused,) = answer(model, Request(query="q", items=["a"], instruction="rate it"))
    assert isinstance(refused, RequestError)
    assert refused.param == "instruction"


def test_texts_that_spell_slots_stay_as_they_are(causal_rerankers: Path) -> None:
    model = load(causal_rerankers / "qwen3" / "plain")
    reader: Any = model._reader
    (worded,) = reader.word(Request(query="", items=[], instruction="say {text}"), "{instruction}", ["{text}"])
    assert worded == "<Instruct>: say {text}\n<Query>: {instruction}\n<Document>: {text}"


@pytest.mark.parametrize("part", ["plain", "two-words"])
def test_a_bad_request_fails_alone(causal_rerankers: Path, part: str) -> None:
    model = load(causal_rerankers / "qwen3" / part)
    good = Request(query={"text": "q"}, items=["fine"])
    answers = answer(model, good, Request(query="q", items=[None]), Request(query=None, items=["a"]), good)
    assert [found.param for found in answers[1:3]] == ["items[0].text", "query.text"]
    for found in (answers[0], answers[3]):
        assert found[0]["score"] == pytest.approx(score(model, [("q", "fine")])[0], abs=1e-5)


def test_an_instruction_that_leaves_no_room_is_refused(causal_rerankers: Path) -> None:
    """A template that repeats the instruction after the item leaves nothing to cut."""
    model = load(causal_rerankers / "qwen3" / "two-words")
    reader: Any = model._reader
    reader._template.chat_template += "{% for m in messages if m['role'] == 'system' %}{{ m['content'] }}{% endfor %}"
    good, bad = Request(query="q", items=["a"]), Request(query="q", items=["a"], instruction="much to say " * 20)
    answers = answer(model, good, bad)
    assert isinstance(answers[0], list)
    assert isinstance(answers[1], RequestError)
    assert answers[1].param == "instruction"


def test_tied_weights_count_once(causal_rerankers: Path) -> None:
    folder = causal_rerankers / "qwen3" / "plain"
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert load(folder).bytes == pytest.approx(files, rel=0.05)
    assert CausalRerankerFamily().estimate_bytes(plain_spec(folder), folder) == pytest.approx(files, rel=0.05)


def test_a_model_comes_back_from_eviction_as_it_was(causal_rerankers: Path) -> None:
    family, folder = CausalRerankerFamily(), causal_rerankers / "qwen3" / "plain"
    model = family.load(plain_spec(folder), folder, Device())
    before = score(model, PAIRS)
    model.close()
    again = family.load(plain_spec(folder), folder, Device())
    np.testing.assert_array_equal(score(again, PAIRS), before)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"options": {}}, "by which words"),
        ({"options": {"yes_token": "yes", "no_token": "never heard"}}, "no token 'never heard'"),
        ({"options": {**WORDS, "prefix": 7}}, "no text"),
        ({"max_length": 20}, "no room"),
    ],
)
def test_a_spec_that_does_not_say_how_to_ask_is_refused(
    causal_rerankers: Path, changes: dict[str, Any], said: str
) -> None:
    """Better no score than one of a prompt that the model was not trained with."""
    with pytest.raises(ModelLoadError, match=said):
        load(causal_rerankers / "qwen3" / "plain", **changes)


def _lose_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def _lose_document(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['role'] }}{% endfor %}")


def _lose_words(folder: Path) -> None:
    (folder / "1_LogitScore" / "config.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(_lose_template, "no chat template"), (_lose_document, "leaves out"), (_lose_words, "names no tokens")],
)
def test_a_folder_that_cannot_be_served_rightly_is_refused(
    spoil: Callable[[Path], None], said: str, causal_rerankers: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "st"
    shutil.copytree(causal_rerankers / "qwen3" / "two-words", folder)
    spoil(folder)
    with pytest.raises(ModelLoadError, match=said):
        load(folder)


def test_half_precision_leaves_the_places_of_tokens_exact(causal_rerankers: Path) -> None:
    """Rotary frequencies in bfloat16 would be off by whole turns some hundred tokens into a text."""
    model = load(causal_rerankers / "qwen3" / "plain", precision="bfloat16")
    module = model._runner.module
    assert {one.dtype for one in module.parameters()} == {torch.bfloat16}
    frequencies = [one for name, one in module.named_buffers() if "inv_freq" in name]
    assert frequencies
    assert {one.dtype for one in frequencies} == {torch.float32}
    exact = np.load(causal_rerankers / "qwen3" / "plain.npy")
    assert np.median(np.abs(score(model, PAIRS) - exact)) < 0.05
