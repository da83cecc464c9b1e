"""Sparse encoders against sentence-transformers' own SparseEncoder, which runs in a process of its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from common.errors import InferenceError, ModelLoadError, RequestError
from tasks import codec
from tasks.messages import Request
from tests.token_models import SPARSE, TEXTS, answer, ask, made, spec_of
from workers.host.families import sparse
from workers.host.families.protocol import Device
from workers.host.families.sparse import SparseFamily, SparseModel

Matrix = npt.NDArray[np.float32]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory)


def load(folder: Path, **changes: Any) -> SparseModel:
    return SparseFamily().load(spec_of(folder, "sparse", **changes), folder, Device(pass_tokens=160))


def matrix(items: list[Any]) -> Matrix:
    """Weights ``[N, words]``."""
    found = np.zeros((len(items), items[0]["sparse"]["dims"]), dtype=np.float32)
    for row, item in zip(found, items, strict=True):
        indices, values = (codec.array_of(item["sparse"][name]) for name in ("indices", "values"))
        assert (indices.dtype, values.dtype) == (np.int32, np.float32)
        assert (np.diff(indices) > 0).all()
        row[indices] = values
    return found


def encode(model: SparseModel, texts: list[str], **rest: Any) -> Matrix:
    (items,) = answer(model, ask(texts, **rest))
    return matrix(items)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("kind", ["query", "document"])
def test_weights_are_those_of_the_library(tiny: Path, name: str, kind: str) -> None:
    expected = np.load(tiny / name / f"{kind}.npy")
    assert expected.max() > 0.1  # else anything would agree
    model = load(tiny / name)
    options = {"is_query": kind == "query"}
    weights = encode(model, TEXTS, options=options)
    width = expected.shape[1]  # a table of weights knows its tokenizer's words, the encoder some more
    assert not weights[:, width:].any()
    np.testing.assert_allclose(weights[:, :width], expected, atol=1e-4)
    assert encode(model, TEXTS[::-1], options=options)[::-1] == pytest.approx(weights, abs=1e-5)
    alone = np.concatenate([encode(model, [text], options=options) for text in TEXTS])
    np.testing.assert_allclose(alone, weights, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "bert-sum"])
def test_logits_are_laid_out_piece_by_piece(tiny: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text may be cut over several pieces, and a piece hold several texts; memory is bounded by the piece."""
    expected = encode(load(tiny / name), TEXTS)
    monkeypatch.setattr(sparse, "LOGITS", 7 * 200)
    model = load(tiny / name)
    seen: list[int] = []
    laid_out = model._splade._head.logits

    def watched(states: Any) -> Any:
        seen.append(len(states))
        return laid_out(states)

    model._splade._head.logits = watched  # type: ignore[method-assign]
    np.testing.assert_allclose(encode(model, TEXTS), expected, atol=1e-5)
    assert max(seen) == 7


def test_texts_of_which_nothing_is_said_go_the_routers_default_way(tiny: Path) -> None:
    free = load(tiny / "free")
    np.testing.assert_array_equal(encode(free, TEXTS), encode(free, TEXTS, options={"is_query": False}))
    queries = encode(free, TEXTS, options={"is_query": True})
    assert not np.allclose(queries, encode(free, TEXTS))
    assert not queries[TEXTS.index("")].any()


def test_queries_and_documents_of_one_micro_batch_go_their_own_ways(tiny: Path) -> None:
    model = load(tiny / "free")
    query, document = ask(TEXTS[:4], options={"is_query": True}), ask(TEXTS[:4])
    first, second, third = answer(model, query, document, query)
    np.testing.assert_allclose(matrix(first), encode(model, TEXTS[:4], options={"is_query": True}), atol=1e-5)
    np.testing.assert_allclose(matrix(second), encode(model, TEXTS[:4]), atol=1e-5)
    np.testing.assert_array_equal(matrix(third), matrix(first))


def test_only_the_heaviest_words_are_given_where_so_many_are_asked_for(tiny: Path) -> None:
    model = load(tiny / "bert")
    whole, few = encode(model, TEXTS), encode(model, TEXTS, options={"max_active_dims": 5})
    assert ((few > 0).sum(axis=1) <= 5).all()
    for row, kept in zip(whole, few, strict=True):
        np.testing.assert_array_equal(kept[kept > 0], row[kept > 0])
        assert kept[kept > 0].min() >= np.sort(row)[-5]
    assert ((encode(load(tiny / "mpnet"), TEXTS) > 0).sum(axis=1) <= 12).all()  # as its folder says
    assert ((encode(load(tiny / "bert", options={"max_active_dims": 3}), TEXTS) > 0).sum(axis=1) <= 3).all()
    with pytest.raises(ModelLoadError, match="max_active_dims"):
        load(tiny / "bert", options={"max_active_dims": "3"})
    (refused,) = answer(model, ask(["a"], options={"max_active_dims": 0}))
    assert isinstance(refused, RequestError)
    assert refused.param == "params.options.max_active_dims"


def test_half_precision_is_the_only_other_format_of_weights(tiny: Path) -> None:
    model = load(tiny / "bert")
    for dtype, kept in (("float16", "float16"), ("int8", "float32")):
        (items,) = answer(model, ask(["a b"], output_dtype=dtype))
        values = codec.array_of(items[0]["sparse"]["values"])
        assert (items[0]["sparse"]["dtype"], values.dtype) == (kept, np.dtype(kept))


def test_a_bad_request_fails_alone_and_names_the_field(tiny: Path) -> None:
    model = load(tiny / "bert")
    good = ask(["fine"])
    wrong = [
        Request(items=[{"text": "a"}, {"text": None}]),
        ask(["a"], output_types=["dense"]),
        ask(["a"], output_dtype="int4"),
    ]
    first, *refused, last = answer(model, good, *wrong, good)
    assert [one.param for one in refused] == ["items[1].text", "params.output_types", "params.output_dtype"]
    np.testing.assert_allclose(matrix(first), encode(model, ["fine"]), atol=1e-6)
    np.testing.assert_allclose(matrix(last), encode(model, ["fine"]), atol=1e-6)
    with pytest.raises(RequestError, match="does not score"):
        model.prepare("score", [good])


def test_numbers_that_are_not_finite_are_an_error_of_their_request_alone(tiny: Path) -> None:
    model = load(tiny / "bert")
    prepared = model.prepare("encode", [ask(["a", "b"]), ask(["c"])])
    raw = model.run(prepared)
    raw[1].values[0] = np.nan
    first, second = model.finish(prepared, raw)
    assert isinstance(first, InferenceError)
    assert isinstance(second, bytes)


def test_half_precision_halves_the_bytes_and_keeps_the_direction(tiny: Path) -> None:
    whole, half = load(tiny / "modernbert"), load(tiny / "modernbert", precision="bfloat16")
    assert half.bytes < 0.6 * whole.bytes
    for one, other in zip(encode(half, TEXTS), encode(whole, TEXTS), strict=True):
        assert one @ other > 0.999 * np.linalg.norm(one) * np.linalg.norm(other)


def test_a_model_comes_back_from_eviction_as_it_was(tiny: Path) -> None:
    family, spec = SparseFamily(), spec_of(tiny / "bert", "sparse")
    first = family.load(spec, tiny / "bert", Device())
    before = encode(first, TEXTS)
    assert first.bytes > sum(one.numel() * 4 for one in first._splade.encoder._encoder.module.parameters())
    first.close()
    np.testing.assert_array_equal(encode(family.load(spec, tiny / "bert", Device()), TEXTS), before)


def test_the_prompts_of_the_spec_come_before_those_of_the_folder(tiny: Path) -> None:
    model = load(tiny / "electra", prompts={"query": "why "})
    plain = load(tiny / "electra", prompts={"query": "", "document": ""})
    asked = encode(model, ["a b"], options={"is_query": True})
    np.testing.assert_allclose(asked, encode(plain, ["why a b"]), atol=1e-5)
    np.testing.assert_allclose(encode(model, ["a b"], instruction="do "), encode(plain, ["do a b"]), atol=1e-5)


def _without_head(folder: Path) -> None:
    """The weights of the encoder alone: transformers would make a head up."""
    (config,) = folder.glob("config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))


def _with_another_pooling(folder: Path) -> None:
    (folder / "1_SpladePooling" / "config.json").write_text(json.dumps({"pooling_strategy": "mean"}))


def _with_another_module(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules, {"path": "2", "type": "x.SparseAutoEncoder"}]))


def _without_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize("spoil", [_without_head, _with_another_pooling, _with_another_module, _without_safetensors])
def test_a_folder_that_cannot_be_served_rightly_is_refused(
    spoil: Callable[[Path], None], tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny / "bert", folder)
    spoil(folder)
    with pytest.raises(Exception, match=r"lack|pooling|modules|safetensors") as caught:
        load(folder)
    if spoil is not _without_safetensors:  # foreign errors become a ModelLoadError in the loader
        assert isinstance(caught.value, ModelLoadError)


def test_a_table_of_another_format_is_refused(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "free", tmp_path / "m")
    (weights,) = (tmp_path / "m").glob("query_*/model.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelLoadError, match="safetensors"):
        load(tmp_path / "m")
