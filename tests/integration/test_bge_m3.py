"""BGE-M3 against its three heads, each computed apart in float64 in a process of its own."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file

from common.errors import InferenceError, ModelLoadError, RequestError
from config_db.spec import Source, Trust
from tasks import codec
from tasks.messages import Request
from tests.hub import COMMIT, serving_hub
from tests.token_models import TEXTS, answer, ask, made, spec_of
from tests.weights import ask_here, contents, setup_in
from workers.host.families.bge_m3 import BgeM3Family, BgeM3Model
from workers.host.families.protocol import Device
from workers.weights.resolve import resolve

ALL = ["dense", "sparse", "multivector"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory) / "m3"


def load(folder: Path, **changes: Any) -> BgeM3Model:
    return BgeM3Family().load(spec_of(folder, "bge-m3", **changes), folder, Device(pass_tokens=160))


def reference(folder: Path, name: str) -> list[npt.NDArray[Any]]:
    with np.load(folder / f"{name}.npz") as found:
        return [found[key] for key in found.files]


def read(item: dict[str, Any], name: str) -> npt.NDArray[Any]:
    """One output; a sparse one as a whole row."""
    if name != "sparse":
        return codec.array_of(item[name]["values"])
    row = np.zeros(item["sparse"]["dims"], dtype=np.float32)
    indices = codec.array_of(item["sparse"]["indices"])
    assert indices.dtype == np.int32
    row[indices] = codec.array_of(item["sparse"]["values"])
    return row


def encode(model: BgeM3Model, texts: list[str], **rest: Any) -> list[Any]:
    (items,) = answer(model, ask(texts, **rest))
    return list(items)


@pytest.mark.parametrize("name", ALL)
def test_each_output_is_that_of_its_head_alone(tiny: Path, name: str) -> None:
    model, expected = load(tiny), reference(tiny, name)
    assert len({tuple(np.ravel(one).round(3)) for one in expected}) > len(TEXTS) // 2  # else anything would agree
    found = [read(item, name) for item in encode(model, TEXTS, output_types=ALL)]
    mirrored = [read(item, name) for item in encode(model, TEXTS[::-1], output_types=[name])][::-1]
    alone = [read(encode(model, [text], output_types=[name])[0], name) for text in TEXTS]
    for one, other, another, wanted in zip(found, mirrored, alone, expected, strict=True):
        assert one.shape == wanted.shape
        np.testing.assert_allclose(one, wanted, atol=2e-5)
        np.testing.assert_allclose(other, one, atol=1e-5)
        np.testing.assert_allclose(another, one, atol=1e-5)


def test_only_what_is_asked_for_is_given_and_computed(tiny: Path) -> None:
    model = load(tiny)
    asked: list[list[str] | None] = [["sparse"], None, ["multivector", "dense"]]
    answers = answer(model, *(ask(["a b"], output_types=one) for one in asked))
    assert [{*items[0]} for items in answers] == [{"sparse"}, {"dense"}, {"multivector", "dense"}]
    prepared = model.prepare("encode", [ask(["a b"])])
    assert model.run(prepared)[0].vectors is None
    profile = load(tiny, outputs=("sparse", "multivector"))
    assert {*encode(profile, ["a b"])[0]} == {"sparse", "multivector"}


def test_scores_are_maxsim_of_the_token_vectors(tiny: Path) -> None:
    vectors = reference(tiny, "multivector")
    items = [{"text": text, "id": f"t{n}"} for n, text in enumerate(TEXTS)]
    (ranking,) = answer(load(tiny), Request(items=items, query={"text": TEXTS[1]}), operation="score")
    expected = {f"t{n}": float((vectors[1] @ one.T).max(axis=1).sum()) for n, one in enumerate(vectors)}
    assert ranking[0]["item_id"] == "t1"
    assert {one["item_id"]: one["score"] for one in ranking} == pytest.approx(expected, rel=1e-4)


def test_dtypes_and_lengths_as_asked(tiny: Path) -> None:
    (item,) = encode(load(tiny), ["a b"], output_types=ALL, output_dtype="int8")
    assert [item[name]["dtype"] for name in ALL] == ["int8", "float32", "int8"]
    assert read(item, "dense").dtype == read(item, "multivector").dtype == np.int8
    (item,) = encode(load(tiny), ["a b"], output_types=ALL, options={"normalize": False})
    assert abs(np.linalg.norm(read(item, "dense")) - 1) > 0.1
    assert abs(np.linalg.norm(read(item, "multivector"), axis=1) - 1).max() > 0.1


def test_a_bad_request_fails_alone(tiny: Path) -> None:
    model = load(tiny)
    first, refused, last = answer(model, ask(["a"]), ask(["a"], output_types=["score"]), ask(["a"]))
    assert isinstance(refused, RequestError)
    assert refused.param == "params.output_types"
    np.testing.assert_allclose(read(first[0], "dense"), read(last[0], "dense"), atol=1e-6)
    with pytest.raises(RequestError, match="does not extract"):
        model.prepare("extract", [ask(["a"])])


def test_numbers_that_are_not_finite_are_an_error_of_their_request_alone(tiny: Path) -> None:
    model = load(tiny)
    prepared = model.prepare("encode", [ask(["a", "b"], output_types=ALL), ask(["c"])])
    raw = model.run(prepared)
    assert raw[1].weights is not None
    raw[1].weights.setflags(write=True)
    raw[1].weights[0] = np.nan
    first, second = model.finish(prepared, raw)
    assert isinstance(first, InferenceError)
    assert isinstance(second, bytes)


def test_a_model_comes_back_from_eviction_as_it_was(tiny: Path) -> None:
    family, spec = BgeM3Family(), spec_of(tiny, "bge-m3")
    first = family.load(spec, tiny, Device())
    before = [read(item, "dense") for item in encode(first, TEXTS)]
    first.close()
    again = family.load(spec, tiny, Device())
    np.testing.assert_array_equal([read(item, "dense") for item in encode(again, TEXTS)], before)


class Evil:
    """Code that reading a pickle would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


def test_weights_in_torchs_own_format_are_read_only_where_the_spec_trusts_them(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the Hub, as the model's authors publish them; they are read as numbers, and code in them is not run."""
    folder = tmp_path / "m3"
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for name in ("sparse_linear", "colbert_linear"):
        torch.save(load_file(folder / f"{name}.safetensors"), folder / f"{name}.pt")
        (folder / f"{name}.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="safetensors"):
        load(folder)
    trust = Trust(formats=("safetensors", "pickle"))
    with serving_hub() as hub:
        ask_here(hub, monkeypatch)
        hub.repositories["BAAI/tiny"] = contents(folder)
        source = Source(hub="BAAI/tiny", revision=COMMIT)
        with resolve(source, setup_in(tmp_path), formats=trust.formats) as files:
            trusting = load(files.path, trust=trust)
    for found, wanted in zip(encode(trusting, TEXTS[:4]), encode(load(tiny), TEXTS[:4]), strict=True):
        np.testing.assert_allclose(read(found, "dense"), read(wanted, "dense"), atol=1e-6)
    assert BgeM3Family().estimate_bytes(spec_of(folder, "bge-m3", trust=Trust(formats=("pickle",))), folder) > 10_000
    for name in ("pytorch_model.bin", "sparse_linear.pt"):
        torch.save({"weight": Evil()}, folder / name)
        with pytest.raises((ModelLoadError, pickle.UnpicklingError)):
            load(folder, trust=trust)
