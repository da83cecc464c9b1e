"""Late-interaction encoders against float64 from the plain encoder, and against sentence-transformers' own.

Both references are made in a process of their own.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from common.errors import InferenceError, ModelLoadError
from tasks import codec
from tasks.messages import Request
from tests.token_models import MULTIVECTOR, TEXTS, answer, ask, made, spec_of
from workers.host.families.multivector import MultivectorFamily, MultivectorModel
from workers.host.families.protocol import Device
from workers.host.muvera import Muvera, fixed_vector

Rows = list[npt.NDArray[Any]]
QUERY, DOCUMENT = {"is_query": True}, {"is_query": False}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory)


def load(folder: Path, **changes: Any) -> MultivectorModel:
    return MultivectorFamily().load(spec_of(folder, "multivector", **changes), folder, Device(pass_tokens=160))


def vectors(items: list[Any]) -> Rows:
    found = []
    for item in items:
        assert item.keys() == {"multivector"}
        rows = codec.array_of(item["multivector"]["values"])
        assert (item["multivector"]["num_tokens"], item["multivector"]["token_dims"]) == rows.shape
        found.append(rows)
    return found


def encode(model: MultivectorModel, texts: list[str], **rest: Any) -> Rows:
    (items,) = answer(model, ask(texts, **rest))
    return vectors(items)


def reference(folder: Path, name: str) -> Rows:
    with np.load(folder / f"{name}.npz") as found:
        return [found[key] for key in found.files]


def assert_close(found: Rows, expected: Rows, atol: float = 1e-4) -> None:
    assert [one.shape for one in found] == [one.shape for one in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


@pytest.mark.parametrize("name", ["stanford", "pylate", "moderncolbert"])
@pytest.mark.parametrize("kind", ["query", "document"])
def test_vectors_are_those_of_float64(tiny: Path, name: str, kind: str) -> None:
    expected = reference(tiny / name, kind)
    assert len({tuple(row.round(3)) for one in expected for row in one}) > len(TEXTS)  # else anything would agree
    found = encode(load(tiny / name), TEXTS, options={"is_query": kind == "query"})
    assert_close(found, expected, atol=2e-5)
    assert min((one * other).sum(axis=1).min() for one, other in zip(found, expected, strict=True)) > 0.9999


@pytest.mark.parametrize("name", MULTIVECTOR)
@pytest.mark.parametrize("kind", ["query", "document"])
def test_vectors_are_those_of_the_library(tiny: Path, name: str, kind: str) -> None:
    model, options = load(tiny / name), {"is_query": kind == "query"}
    found = encode(model, TEXTS, options=options)
    assert_close(found, reference(tiny / name, f"library-{kind}"))
    assert_close(encode(model, TEXTS[::-1], options=options)[::-1], found, atol=1e-5)
    assert_close([encode(model, [text], options=options)[0] for text in TEXTS], found, atol=1e-5)


@pytest.mark.parametrize("name", MULTIVECTOR)
def test_scores_are_maxsim_best_first(tiny: Path, name: str) -> None:
    model, expected = load(tiny / name), np.load(tiny / name / "maxsim.npy")
    items = [{"text": text, "id": f"t{n}"} for n, text in enumerate(TEXTS)]
    requests = [Request(items=items, query={"text": text}) for text in TEXTS[:3]]
    for ranking, row in zip(answer(model, *requests, operation="score"), expected, strict=True):
        assert [one["rank"] for one in ranking] == list(range(len(TEXTS)))
        scores = [one["score"] for one in ranking]
        assert scores == sorted(scores, reverse=True)
        np.testing.assert_allclose(scores, [row[int(one["item_id"][1:])] for one in ranking], atol=1e-3, rtol=1e-4)


def test_a_text_of_which_nothing_is_said_is_a_document(tiny: Path) -> None:
    model = load(tiny / "stanford")
    assert_close(encode(model, TEXTS), encode(model, TEXTS, options=DOCUMENT), atol=0)
    query, document, other = answer(model, ask(TEXTS, options=QUERY), ask(TEXTS), ask(TEXTS, options=QUERY))
    assert {len(one) for one in vectors(query)} == {16}
    assert_close(vectors(document), encode(model, TEXTS), atol=1e-5)
    assert_close(vectors(other), vectors(query), atol=0)


def test_the_spec_names_markers_and_lengths_of_its_own(tiny: Path) -> None:
    longer = load(tiny / "stanford", options={"query_max_length": 24, "query_prefix": "[unused1]"}, max_length=30)
    swapped = encode(load(tiny / "stanford", options={"document_prefix": "[unused0]"}), TEXTS)
    plain = load(tiny / "stanford")
    queries, documents = encode(longer, TEXTS, options=QUERY), encode(longer, TEXTS)
    assert {len(one) for one in queries} == {*range(16, 25)}  # filled up to 16 as the folder says, cut at 24
    assert max(len(one) for one in documents) <= 30 < max(len(one) for one in encode(plain, TEXTS))
    marked = encode(load(tiny / "stanford", options={"query_prefix": "[unused1]"}), TEXTS[:1], options=QUERY)
    assert_close([queries[0]], marked, atol=1e-6)
    assert not np.allclose(swapped[0], encode(plain, TEXTS[:1])[0], atol=1e-2)
    bare = encode(load(tiny / "stanford", options={"query_expansion": False}), ["a b"], options=QUERY)
    assert len(bare[0]) == 5


def test_vectors_have_unit_length_unless_asked_otherwise(tiny: Path) -> None:
    model = load(tiny / "pylate")
    for one in encode(model, TEXTS[:4]):
        np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1, atol=1e-6)
    longer = encode(model, TEXTS[:1], options={"normalize": False})[0]
    assert abs(np.linalg.norm(longer, axis=1) - 1).max() > 0.1
    np.testing.assert_allclose(encode(load(tiny / "pylate", normalize=False), TEXTS[:1])[0], longer, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "kind", "width"), [("float16", "<f2", 24), ("int8", "|i1", 24), ("binary", "|u1", 3)]
)
def test_output_dtypes(tiny: Path, dtype: str, kind: str, width: int) -> None:
    (items,) = answer(load(tiny / "pylate"), ask(["a b"], output_dtype=dtype))
    values = codec.array_of(items[0]["multivector"]["values"])
    told = items[0]["multivector"]
    assert (told["dtype"], told["token_dims"], values.dtype.str, values.shape) == (dtype, 24, kind, (4, width))


def test_muvera_folds_the_vectors_of_a_text_into_one(tiny: Path) -> None:
    model, way = load(tiny / "stanford"), {"num_repetitions": 30, "num_simhash_projections": 4, "projection_dim": None}
    rows = encode(model, TEXTS)
    (items,) = answer(model, ask(TEXTS, options={"muvera": way}))
    assert {*items[0]} == {"dense"}
    assert (items[0]["dense"]["dims"], items[0]["dense"]["dtype"]) == (30 * 16 * 16, "float32")
    for item, row in zip(items, rows, strict=True):
        folded = codec.array_of(item["dense"]["values"])
        np.testing.assert_allclose(folded, fixed_vector(row, Muvera(30, 4, None), is_query=False), atol=1e-5)
    (queries,) = answer(model, ask(TEXTS[:1], options={"muvera": way, "is_query": True}))
    asked = fixed_vector(encode(model, TEXTS[:1], options=QUERY)[0], Muvera(30, 4, None), is_query=True)
    np.testing.assert_allclose(codec.array_of(queries[0]["dense"]["values"]), asked, atol=1e-5)
    (both,) = answer(model, ask(TEXTS[:1], output_types=["multivector"], options={"muvera": True}))
    assert (both[0]["dense"]["dims"], both[0].keys()) == (10240, {"dense", "multivector"})


def test_a_profile_may_give_folded_vectors_only(tiny: Path) -> None:
    way = {"num_repetitions": 2, "num_simhash_projections": 3, "projection_dim": 4, "final_projection_dim": 32}
    model = load(tiny / "stanford", outputs=("dense",), options={"muvera": way})
    (items,) = answer(model, ask(TEXTS[:2], output_dtype="int8"))
    assert (items[0]["dense"]["dims"], codec.array_of(items[0]["dense"]["values"]).dtype) == (32, np.int8)


def test_a_bad_request_fails_alone_and_names_the_field(tiny: Path) -> None:
    model, good = load(tiny / "stanford"), ask(["fine"])
    wrong = [
        Request(items=["a", 1]),
        ask(["a"], output_types=["sparse"]),
        ask(["a"], options={"normalize": 1}),
        ask(["a"], options={"muvera": {"num_repetitions": 0}}),
        ask(["a"], options={"muvera": {"repetitions": 3}}),
        ask(["a"], options={"muvera": {"num_repetitions": 256, "num_simhash_projections": 10}}),
    ]
    first, *refused, last = answer(model, good, *wrong, good)
    assert [one.param for one in refused] == [
        "items[1].text",
        "params.output_types",
        "params.options.normalize",
        *["params.options.muvera"] * 3,
    ]
    assert_close([*vectors(first), *vectors(last)], encode(model, ["fine"]) * 2, atol=1e-6)
    scored, *refused = answer(
        model,
        Request(items=["a"], query="b"),
        Request(items=["a"], query={"id": "q"}),
        Request(items=["a"], query="b", options={"normalize": "no"}),
        operation="score",
    )
    assert len(scored) == 1
    assert [one.param for one in refused] == ["query.text", "options.normalize"]


def test_numbers_that_are_not_finite_are_an_error_of_their_request_alone(tiny: Path) -> None:
    model = load(tiny / "stanford")
    prepared = model.prepare("encode", [ask(["a", "b"]), ask(["c"])])
    raw = [row.copy() for row in model.run(prepared)]
    raw[1][0, 3] = np.inf
    first, second = model.finish(prepared, raw)
    assert isinstance(first, InferenceError)
    assert isinstance(second, bytes)


def test_half_precision_halves_the_bytes_and_keeps_the_direction(tiny: Path) -> None:
    whole, half = load(tiny / "moderncolbert"), load(tiny / "moderncolbert", precision="bfloat16")
    assert half.bytes < 0.6 * whole.bytes
    for options in (QUERY, DOCUMENT):
        found, expected = encode(half, TEXTS, options=options), encode(whole, TEXTS, options=options)
        assert min((one * other).sum(axis=1).min() for one, other in zip(found, expected, strict=True)) > 0.999


def test_a_model_comes_back_from_eviction_as_it_was(tiny: Path) -> None:
    family, spec = MultivectorFamily(), spec_of(tiny / "pylate", "multivector")
    first = family.load(spec, tiny / "pylate", Device())
    before = encode(first, TEXTS, options=QUERY)
    first.close()
    assert_close(encode(family.load(spec, tiny / "pylate", Device()), TEXTS, options=QUERY), before, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"query_max_length": "32"},
        {"query_max_length": 0},
        {"query_expansion": 1},
        {"query_prefix": 3},
        {"muvera": {"num_repetitions": -1}},
    ],
)
def test_options_of_a_spec_that_say_nothing_are_refused_by_name(tiny: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ModelLoadError, match=rf"{'|'.join(options)}"):
        load(tiny / "stanford", options=options)


def _without_projection(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:1]))


def _with_another_module(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps([*modules, {"path": "9", "type": "x.TokenPooling"}]))


def _with_another_activation(folder: Path) -> None:
    path = folder / "1_Dense" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "activation_function": "somewhere.Swirl"}))


def _without_safetensors(folder: Path) -> None:
    (folder / "1_Dense" / "model.safetensors").rename(folder / "1_Dense" / "pytorch_model.bin")


@pytest.mark.parametrize(
    "spoil", [_without_projection, _with_another_module, _with_another_activation, _without_safetensors]
)
def test_a_folder_that_cannot_be_served_rightly_is_refused(
    spoil: Callable[[Path], None], tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny / "pylate", folder)
    spoil(folder)
    with pytest.raises(ModelLoadError, match=r"projection|module|activation|safetensors"):
        load(folder)


def test_a_folder_of_colberts_own_without_its_projection_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny / "plain", folder)
    with pytest.raises(ModelLoadError, match=r"no projection"):
        load(folder)
