"""Adapters on sparse, late-interaction and BGE-M3 encoders against peft itself, which runs in a process of its own."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ModelLoadError
from config_db.families import ADAPTABLE
from tasks import codec
from tasks.messages import Request
from tests.token_lora import MULTIVECTOR, NAMES, SPARSE, Vectors, adapter, reference
from tests.token_models import TEXTS, answer, spec_of
from workers.host.families import sparse
from workers.host.families.protocol import Device
from workers.host.families.registry import find
from workers.host.muvera import Muvera, fixed_vector

Asked = tuple[int, str, str | None]
"""A text, the kind that is wanted of it, and its adapter."""
M3 = ["dense", "sparse", "multivector"]
BASES = [*SPARSE, *MULTIVECTOR, "m3"]


def family_of(base: str) -> str:
    return "sparse" if base in SPARSE else "multivector" if base in MULTIVECTOR else "bge-m3"


def kinds_of(base: str) -> list[str]:
    return M3 if base == "m3" else ["query", "document"]


@pytest.fixture(params=BASES)
def folder(request: pytest.FixtureRequest, token_adapted: Path) -> Path:
    return token_adapted / str(request.param)


def load(folder: Path, *adapters: str) -> Any:
    """A base, with adapters under their names."""
    family = family_of(folder.name)
    assert family in ADAPTABLE
    model: Any = find(family, {}).load(spec_of(folder, family), folder, Device(pass_tokens=160))
    for name in adapters:
        model.rack.hang(name, model.rack.read(adapter(folder, name)))
    return model


def asking(asked: Asked, **options: Any) -> Request:
    at, kind, name = asked
    given = options if name is None else {**options, "lora": name}
    if kind in M3:
        return Request(items=[{"text": TEXTS[at]}], options=given, output_types=[kind])
    return Request(items=[{"text": TEXTS[at]}], options={**given, "is_query": kind == "query"})


def vectors(model: Any, wanted: Sequence[Asked]) -> Vectors:
    """What a model says, each text in a request of its own, all in one micro-batch; sparse weights as whole rows."""
    return [_vector(items[0]) for items in answer(model, *(asking(one) for one in wanted))]


def _vector(item: dict[str, Any]) -> npt.NDArray[np.float32]:
    (found,) = (item[kind] for kind in M3 if kind in item)
    if "indices" not in found:
        return codec.array_of(found["values"])
    row = np.zeros(found["dims"], dtype=np.float32)
    row[codec.array_of(found["indices"])] = codec.array_of(found["values"])
    return row


def everything(base: Path, names: Sequence[str | None]) -> list[Asked]:
    return [(at, kind, name) for name in names for kind in kinds_of(base.name) for at in range(len(TEXTS))]


def assert_agree(found: Vectors, wanted: Sequence[Asked], base: Path) -> None:
    """Cosines with what peft says are 0.9999 or more, of every vector."""
    said = {(name, kind): reference(base, str(name), kind) for _, kind, name in wanted}
    for one, (at, kind, name) in zip(found, wanted, strict=True):
        right = said[name, kind][at]
        rows = np.atleast_2d(one)[:, : right.shape[-1]]  # the encoder knows some words more than a table of weights
        assert rows.shape == np.atleast_2d(right).shape
        norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(np.atleast_2d(right), axis=1)
        close = (rows * right).sum(axis=1) >= 0.9999 * norms - 1e-9
        assert close.all(), (at, kind, name)
        np.testing.assert_allclose(rows, np.atleast_2d(right), atol=2e-4, rtol=1e-3)


def assert_same(found: Vectors, others: Vectors) -> None:
    for one, other in zip(found, others, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_each_adapter_agrees_with_peft_whoever_is_in_the_pass(folder: Path) -> None:
    model = load(folder, *NAMES)
    wanted = everything(folder, NAMES)
    plain = vectors(model, [(at, kind, None) for at, kind, _ in wanted])
    alone = [vectors(model.rack.model, [one])[0] for one in wanted]
    assert_agree(alone, wanted, folder)
    for name in NAMES:
        told = [n for n, one in enumerate(wanted) if one[2] == name and (folder.name, one[1]) != ("free", "query")]
        apart = max(np.abs(plain[n] - alone[n]).max() for n in told)
        assert apart > 0.01, "an adapter that changes nothing tells nothing"
    places = list(range(len(wanted)))
    for seed in range(2):
        random.Random(seed).shuffle(places)
        found = vectors(model.rack.model, [wanted[place] for place in places])
        assert_same(found, [alone[place] for place in places])
    assert model.rack.mixes, "they were run apart"


def test_the_base_answers_the_same_bits_before_beside_and_after(folder: Path) -> None:
    model = load(folder)
    wanted = everything(folder, [None])
    before = vectors(model, wanted)
    for name in NAMES:
        model.rack.hang(name, model.rack.read(adapter(folder, name)))
    vectors(model.rack.model, everything(folder, NAMES))
    beside = vectors(model, wanted)
    for name in NAMES:
        model.rack.take(name)
    for one, other, another in zip(before, beside, vectors(model, wanted), strict=True):
        assert np.array_equal(one, other)
        assert np.array_equal(one, another)
    model.close()


@pytest.mark.parametrize("base", MULTIVECTOR)
def test_scores_with_adapters_are_maxsim(token_adapted: Path, base: str) -> None:
    folder = token_adapted / base
    model = load(folder, *NAMES)
    items = [{"text": text, "id": f"t{n}"} for n, text in enumerate(TEXTS)]
    wanted = [(at, name) for at in range(3) for name in NAMES]
    requests = [Request(items=items, query={"text": TEXTS[at]}, options={"lora": name}) for at, name in wanted]
    for ranking, (at, name) in zip(answer(model.rack.model, *requests, operation="score"), wanted, strict=True):
        right = reference(folder, name, "maxsim")[at]
        found = {one["item_id"]: one["score"] for one in ranking}
        np.testing.assert_allclose([found[f"t{n}"] for n in range(len(TEXTS))], right, atol=1e-3, rtol=1e-4)


def test_bge_m3_scores_with_adapters(token_adapted: Path) -> None:
    folder = token_adapted / "m3"
    model = load(folder, *NAMES)
    items = [{"text": text, "id": f"t{n}"} for n, text in enumerate(TEXTS)]
    requests = [Request(items=items, query={"text": TEXTS[1]}, options={"lora": name}) for name in NAMES]
    for ranking, name in zip(answer(model.rack.model, *requests, operation="score"), NAMES, strict=True):
        said = reference(folder, name, "multivector")
        right = {f"t{n}": float((said[1] @ one.T).max(axis=1).sum()) for n, one in enumerate(said)}
        assert {one["item_id"]: one["score"] for one in ranking} == pytest.approx(right, rel=1e-4)


def test_vectors_of_an_adapter_are_folded_as_the_base_s(token_adapted: Path) -> None:
    folder, way = (
        token_adapted / "stanford",
        {"num_repetitions": 3, "num_simhash_projections": 2, "projection_dim": None},
    )
    model = load(folder, *NAMES)
    wanted: list[Asked] = [(at, "document", name) for at in range(4) for name in NAMES]
    rows = vectors(model.rack.model, wanted)
    for items, row in zip(answer(model.rack.model, *(asking(one, muvera=way) for one in wanted)), rows, strict=True):
        folded = fixed_vector(row, Muvera(3, 2, None), is_query=False)
        np.testing.assert_allclose(codec.array_of(items[0]["dense"]["values"]), folded, atol=1e-5)


@pytest.mark.parametrize("base", SPARSE)
def test_texts_of_different_adapters_are_cut_over_pieces_of_logits(
    token_adapted: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [(at, "document", name) for at in range(len(TEXTS)) for name in NAMES]
    random.Random(3).shuffle(wanted)
    monkeypatch.setattr(sparse, "LOGITS", 7 * 200)
    found = vectors(load(token_adapted / base, *NAMES).rack.model, wanted)
    assert_agree(found, wanted, token_adapted / base)


def test_a_query_that_is_looked_up_is_the_base_s(token_adapted: Path) -> None:
    """A table of weights has no layers; peft, too, leaves it as it is."""
    model = load(token_adapted / "free", *NAMES)
    wanted = [(at, kind, name) for at in range(6) for kind in ("query", "document") for name in NAMES]
    found = vectors(model.rack.model, wanted)
    plain = vectors(model, [(at, kind, None) for at, kind, _ in wanted])
    assert_agree(found, wanted, token_adapted / "free")
    for (_, kind, _), one, other in zip(wanted, found, plain, strict=True):
        assert np.array_equal(one, other) == (kind == "query")


def test_an_adapter_hung_while_the_base_runs_filled_up_queries(token_adapted: Path) -> None:
    """The base's module is copied in the middle of a pass of these, which has another attention than the others."""
    folder = token_adapted / "stanford"
    model = load(folder)
    module = model.module
    usual = module.config._attn_implementation
    module.set_attn_implementation("sdpa")
    model.rack.hang("both", model.rack.read(adapter(folder, "both")))
    module.set_attn_implementation(usual)
    assert usual != "sdpa"
    wanted = everything(folder, ["both"])
    assert_agree(vectors(model.rack.model, wanted), wanted, folder)


@pytest.mark.parametrize(("base", "layer"), [("stanford", "linear"), ("m3", "colbert_linear"), ("m3", "sparse_linear")])
def test_an_adapter_on_what_stands_beside_the_encoder_is_refused_by_name(
    token_adapted: Path, tmp_path: Path, base: str, layer: str
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter(token_adapted / base, "small"), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    added = {f"base_model.model.{layer}.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    save_file({**tensors, **added}, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    targets = [*config["target_modules"], layer]
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": targets}))
    with pytest.raises(ModelLoadError, match=f"no module '{layer}' that takes adapters") as refused:
        load(token_adapted / base).rack.read(folder)
    assert refused.value.details == {"error_class": "CONFIG", "permanent": True}
