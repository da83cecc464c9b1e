"""Cross-encoders against sentence-transformers' own CrossEncoder, which runs in a process of its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from common.errors import InferenceError, ModelLoadError, RequestError
from config_db.model_folders import spec_of_directory
from tasks.messages import Request
from tests.rerankers import LONGEST, PAIRS, answer, requests_of, score
from workers.host.families.cross_encoder import CrossEncoderFamily
from workers.host.families.pairs import PairModel
from workers.host.families.protocol import Device

KINDS = [
    "bert",
    "bert-untyped",
    "xlm-roberta",
    "electra",
    "distilbert",
    "mpnet",
    "deberta",
    "modernbert-cls",
    "modernbert-mean",
]


def load(folder: Path, family: CrossEncoderFamily | None = None, **changes: Any) -> PairModel:
    spec = msgspec.structs.replace(spec_of_directory(folder), **{"precision": "float32", **changes})
    return (family or CrossEncoderFamily()).load(spec, folder, Device(pass_tokens=512))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # transformers' DeBERTa
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["plain", "st"])
def test_scores_are_those_of_the_library(cross_encoders: Path, kind: str, part: str) -> None:
    reference = np.load(cross_encoders / kind / f"{part}.npy")
    assert np.ptp(reference) > 0.05  # else anything would agree
    model = load(cross_encoders / kind / part)
    np.testing.assert_allclose(score(model, PAIRS), reference, atol=1e-4)
    alone = np.array([score(model, [pair])[0] for pair in PAIRS])
    np.testing.assert_allclose(alone, reference, atol=1e-4)
    for together in (score(model, PAIRS), score(model, PAIRS[::-1])[::-1]):
        np.testing.assert_allclose(together, alone, atol=1e-5, rtol=1e-6)


def test_a_pair_that_is_turned_round_or_cut_elsewhere_would_be_seen(cross_encoders: Path) -> None:
    """The references tell a pair from its reverse, and one length from the next."""
    reference = np.load(cross_encoders / "bert" / "plain.npy")
    model = load(cross_encoders / "bert" / "plain")
    assert np.abs(score(model, [(text, query) for query, text in PAIRS]) - reference).max() > 0.05
    shorter = load(cross_encoders / "bert" / "plain", max_length=LONGEST - 1)
    assert np.abs(score(shorter, PAIRS) - reference).max() > 0.05


def test_an_instruction_stands_before_the_query(cross_encoders: Path) -> None:
    reference = np.load(cross_encoders / "bert" / "instructed.npy")
    model = load(cross_encoders / "bert" / "plain")
    np.testing.assert_allclose(score(model, PAIRS, instruction="please : "), reference, atol=1e-4)
    np.testing.assert_allclose(score(model, PAIRS, options={"instruction": "please : "}), reference, atol=1e-4)
    assert np.abs(score(model, PAIRS) - reference).max() > 0.01


def test_pairs_of_many_requests_share_passes(cross_encoders: Path) -> None:
    model = load(cross_encoders / "bert" / "plain")
    prepared = model.prepare("score", requests_of([(f"query {n}", f"item {n}") for n in range(40)]))
    assert len(prepared.passes) == 2  # of 512 tokens, 40 pairs of 18
    lengths = [one.width * len(one.rows) for one in model.prepare("score", requests_of(PAIRS)).passes]
    assert max(lengths) <= 512


def test_a_request_ranks_its_own_items_only(cross_encoders: Path) -> None:
    model = load(cross_encoders / "bert" / "st")
    texts = [text for _, text in PAIRS]
    first = Request(query={"text": "one"}, items=[{"text": text, "id": f"a{n}"} for n, text in enumerate(texts)])
    second = Request(query="two", items=texts[:5])
    together = answer(model, first, second)
    for ranking, request in zip(together, (first, second), strict=True):
        assert [one["rank"] for one in ranking] == list(range(len(request.items)))
        found = [one["score"] for one in ranking]
        assert found == sorted(found, reverse=True)
    assert {one["item_id"] for one in together[0]} == {f"a{n}" for n in range(len(texts))}
    assert {one["item_id"] for one in together[1]} == {f"item-{n}" for n in range(5)}
    scores = score(model, [("one", text) for text in texts])
    by_id = {one["item_id"]: one["score"] for one in together[0]}
    np.testing.assert_allclose([by_id[f"a{n}"] for n in range(len(texts))], scores, atol=1e-5)


def test_a_bad_request_fails_alone_and_names_the_field(cross_encoders: Path) -> None:
    model = load(cross_encoders / "bert" / "plain")
    good = Request(query={"text": "q"}, items=[{"text": "fine"}])
    bad = [
        (Request(query=None, items=["a"]), "query.text"),
        (Request(query={"text": 7}, items=["a"]), "query.text"),
        (Request(query="q", items=["a", {"text": None}, 3]), "items[1].text"),
        (Request(query="q", items=["a"], options={"instruction": 7}), "options.instruction"),
    ]
    answers = answer(model, good, *(request for request, _ in bad), good)
    for found, (_, param) in zip(answers[1:-1], bad, strict=True):
        assert isinstance(found, RequestError)
        assert found.param == param
    assert [one["index"] for one in answers[3].details["items"]] == [1, 2]
    for found in (answers[0], answers[-1]):
        assert found[0]["score"] == pytest.approx(score(model, [("q", "fine")])[0], abs=1e-5)
    with pytest.raises(RequestError, match="does not encode"):
        model.prepare("encode", [good])


def test_scores_that_are_not_finite_are_an_error_of_their_request_alone(cross_encoders: Path) -> None:
    model = load(cross_encoders / "bert" / "plain")
    prepared = model.prepare("score", [Request(query="q", items=["a", "b"]), Request(query="q", items=["c"])])
    found = model.run(prepared).clone()
    found[1] = float("nan")
    answers = model.finish(prepared, found)
    assert isinstance(answers[0], InferenceError)
    assert isinstance(answers[1], bytes)


@pytest.mark.parametrize("kind", ["bert", "modernbert-mean"])
def test_a_model_comes_back_from_eviction_as_it_was(cross_encoders: Path, kind: str) -> None:
    family = CrossEncoderFamily()
    first, second = (load(cross_encoders / kind / "plain", family) for _ in range(2))
    before = score(first, PAIRS)
    assert first.bytes >= sum(file.stat().st_size for file in (cross_encoders / kind).glob("plain/*.safetensors")) * 0.9
    first.close()
    again = load(cross_encoders / kind / "plain", family)
    np.testing.assert_array_equal(score(again, PAIRS), before)
    np.testing.assert_array_equal(score(second, PAIRS), before)


def test_the_bytes_a_model_will_take_are_told_from_its_files(cross_encoders: Path) -> None:
    folder = cross_encoders / "bert" / "plain"
    spec = msgspec.structs.replace(spec_of_directory(folder), precision="float32")
    whole = CrossEncoderFamily().estimate_bytes(spec, folder)
    assert whole == pytest.approx(load(folder).bytes, rel=0.05)
    half = msgspec.structs.replace(spec, precision="bfloat16")
    assert CrossEncoderFamily().estimate_bytes(half, folder) == pytest.approx(whole / 2, rel=0.01)
    loaded = CrossEncoderFamily().load(half, folder, Device())
    assert loaded.bytes == pytest.approx(whole / 2, rel=0.05)
    np.testing.assert_allclose(score(loaded, PAIRS), np.load(cross_encoders / "bert" / "plain.npy"), atol=0.1)


def _lose_classifier(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({name: one for name, one in weights.items() if "classifier" not in name}, folder / "model.safetensors")


def _lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _add_label(folder: Path) -> None:
    _change(folder / "config.json", id2label={"0": "no", "1": "yes"})


def _change_activation(folder: Path) -> None:
    _change(folder / "config_sentence_transformers.json", activation_fn="somewhere.Own")


def _add_module(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": 1, "name": "1", "path": "1_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))


def _change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_lose_classifier, "lack classifier"),
        (_lose_weights, "no safetensors"),
        (_cut_weights, "SafetensorError|incomplete|safetensors"),
        (_add_label, "2 labels"),
        (_change_activation, "activation"),
        (_add_module, "Dense"),
    ],
)
def test_a_folder_that_cannot_be_served_rightly_is_refused(
    spoil: Callable[[Path], None], said: str, cross_encoders: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "st"
    shutil.copytree(cross_encoders / "bert" / "st", folder)
    spec = msgspec.structs.replace(spec_of_directory(folder), precision="float32")
    spoil(folder)
    with pytest.raises(Exception, match=said) as caught:
        CrossEncoderFamily().load(spec, folder, Device())
    if spoil is not _cut_weights:  # foreign errors become a ModelLoadError in the loader
        assert isinstance(caught.value, ModelLoadError)
