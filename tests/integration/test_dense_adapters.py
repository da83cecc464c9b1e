"""Adapters on dense encoders against peft itself, which runs in a process of its own."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks import codec
from tasks.messages import Request
from tests.integration.test_dense import answer, cosines, encode, load
from tests.lora import KINDS, NAMES, TEXTS, reference


@pytest.fixture(params=[kind for kind, _ in KINDS])
def folder(request: pytest.FixtureRequest, adapted: dict[str, Path]) -> Path:
    return adapted[request.param]


def hang(folder: Path, *names: str) -> Any:
    """A base with adapters, under their names."""
    model = load(folder)
    for name in names:
        model.rack.hang(name, model.rack.read(folder.parent / name))
    return model


def asked(text: str, name: str) -> Request:
    return Request(items=[{"text": text}], options={"lora": name})


def vectors(model: Any, requests: list[Request]) -> np.ndarray[Any, Any]:
    return np.stack([codec.array_of(items[0]["dense"]["values"]) for items in answer(model, *requests)])


def test_each_adapter_agrees_with_peft(folder: Path) -> None:
    model = hang(folder, *NAMES)
    plain = encode(model, TEXTS)
    for name in NAMES:
        expected = reference(folder, name)
        found = encode(model.rack.model, TEXTS, options={"lora": name})
        alone = np.stack([encode(model.rack.model, [text], options={"lora": name})[0] for text in TEXTS])
        assert cosines(found, expected).min() >= 0.9999
        assert cosines(alone, expected).min() >= 0.9999
        assert cosines(plain, expected).min() < 0.99, "an adapter that changes nothing tells nothing"


def test_adapters_share_a_pass_in_any_order(folder: Path) -> None:
    model = hang(folder, *NAMES)
    expected = {name: reference(folder, name) for name in NAMES}
    alone = {name: encode(model.rack.model, TEXTS, options={"lora": name}) for name in NAMES}
    wanted = [(at, name) for at in range(len(TEXTS)) for name in NAMES]
    for seed in range(3):
        random.Random(seed).shuffle(wanted)
        found = vectors(model.rack.model, [asked(TEXTS[at], name) for at, name in wanted])
        assert cosines(found, np.stack([expected[name][at] for at, name in wanted])).min() >= 0.9999
        assert np.abs(found - np.stack([alone[name][at] for at, name in wanted])).max() <= 1e-5


def test_the_base_answers_the_same_bits_before_beside_and_after(folder: Path) -> None:
    model = load(folder)
    before = encode(model, TEXTS)
    for name in NAMES:
        model.rack.hang(name, model.rack.read(folder.parent / name))
    adapted = model.rack.model
    vectors(adapted, [asked(text, name) for text in TEXTS for name in NAMES])
    beside = encode(model, TEXTS)
    for name in NAMES:
        model.rack.take(name)
    assert np.array_equal(before, beside)
    assert np.array_equal(before, encode(model, TEXTS))


def test_an_adapter_that_left_comes_back_the_same(folder: Path) -> None:
    model = hang(folder, "small", "wide")
    first = encode(model.rack.model, TEXTS, options={"lora": "wide"})
    model.rack.take("wide")
    model.rack.hang("all", model.rack.read(folder.parent / "all"))
    model.rack.hang("wide", model.rack.read(folder.parent / "wide"))
    assert np.array_equal(first, encode(model.rack.model, TEXTS, options={"lora": "wide"}))
    assert cosines(encode(model.rack.model, TEXTS, options={"lora": "all"}), reference(folder, "all")).min() >= 0.9999
