"""Broken adapters: each is refused before anything is routed to it, by what is wrong with it, and leaves no trace."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ModelLoadError
from tests.integration.test_dense import encode, load
from tests.lora import TEXTS
from workers.host.families.dense import DenseModel

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
GOOD = "good"
LAYER = "base_model.model.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def base(adapted: dict[str, Path]) -> Path:
    return adapted["bert"]


@pytest.fixture(scope="module")
def model(base: Path) -> DenseModel:
    return load(base)


def config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(found | changes))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS)

    return write


def set_to(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return tensors(lambda found: found.update({f"{LAYER}.{name}": tensor}))


def pair(module: str) -> dict[str, torch.Tensor]:
    return {f"base_model.model.{module}.lora_{half}.weight": torch.zeros(4, 4) for half in "AB"}


def cut(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: len(raw) // 2])


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def to_rank_300(folder: Path) -> None:
    config(r=300)(folder)
    tensors(lambda found: found.update({name: _of_rank(one, name, 300) for name, one in found.items()}))(folder)


def _of_rank(tensor: torch.Tensor, name: str, rank: int) -> torch.Tensor:
    return torch.zeros(rank, tensor.shape[1]) if "lora_A" in name else torch.zeros(tensor.shape[0], rank)


NAN = torch.full((4, 32), 1.0).index_fill(0, torch.tensor([2]), float("nan"))
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "wrong shape of A": (set_to("lora_A.weight", torch.zeros(4, 31)), "half A .* is [4, 31]; the base wants [4, 32]"),
    "wrong shape of B": (set_to("lora_B.weight", torch.zeros(33, 4)), "half B .* is [33, 4]; the base wants [32, 4]"),
    "no matrix": (set_to("lora_A.weight", torch.zeros(4)), "are no matrices"),
    "not finite": (set_to("lora_A.weight", NAN), "numbers that are not finite"),
    "not a number": (set_to("lora_A.weight", torch.zeros(4, 32, dtype=torch.int8)), "numbers that are not finite"),
    "rank too large": (to_rank_300, "has rank 300; at most 256"),
    "rank as not said": (config(r=5), "has rank 4, but its adapter_config.json says 5"),
    "half a module": (tensors(lambda found: found.pop(f"{LAYER}.lora_B.weight")), "the half B is missing"),
    "another model's": (
        tensors(lambda found: found.update(pair("h.0"))),
        "the base has no module 'h.0'",
    ),
    "no linear layer": (
        tensors(lambda found: found.update(pair("embeddings.LayerNorm"))),
        "is a LayerNorm; only linear layers",
    ),
    "other tensors": (tensors(lambda found: found.update({"head.weight": torch.zeros(2, 2)})), "none of a plain LoRA"),
    "no tensors": (tensors(lambda found: found.clear()), "holds no tensors"),
    "a target without weights": (config(target_modules=["query", "value", "keyy"]), "names the module 'keyy'"),
    "pickle only": (to_pickle, "other formats can run code"),
    "cut off": (cut, "cut off or damaged"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "holds no adapter_model.safetensors"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "holds no adapter_config.json"),
    "config is no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "is no JSON object"),
    "another method": (config(peft_type="LOHA"), "only LORA is served"),
    "DoRA": (config(use_dora=True), "asks for DoRA"),
    "its own classifier": (config(modules_to_save=["classifier"]), "modules_to_save"),
    "biases of the base": (config(bias="all"), "would change the base's own biases"),
    "a changed base": (config(init_lora_weights="pissa_niter_4"), "trained from init_lora_weights 'pissa_niter_4'"),
    "a pattern that never ends": (config(alpha_pattern={"(a+)+$": 4}), "only names of modules"),
    "no rank": (config(r="4"), "gives no rank"),
    "no scaling": (config(lora_alpha=None), "is no number"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_refused_by_what_is_wrong(name: str, base: Path, model: DenseModel, tmp_path: Path) -> None:
    spoil, said = BROKEN[name]
    folder = tmp_path / "adapter"
    shutil.copytree(base.parent / GOOD, folder)
    spoil(folder)
    with pytest.raises(ModelLoadError) as refused:
        model.rack.hang("broken", model.rack.read(folder))
    for part in said.split(" .* "):
        assert part in refused.value.message
    assert refused.value.details == {"error_class": "CONFIG", "permanent": True}


def test_what_peft_refuses_leaves_the_others_hanging(base: Path, model: DenseModel) -> None:
    """A file that the checks let through and peft does not take."""
    good = model.rack.read(base.parent / GOOD)
    model.rack.hang(GOOD, good)
    before, plain = encode(model.rack.model, TEXTS, options={"lora": GOOD}), encode(model, TEXTS)
    short = type(good)(good.config, dict(list(good.tensors.items())[:-1]), good.ranks, good.digest)
    with pytest.raises(ModelLoadError, match="peft does not take it"):
        model.rack.hang("short", short)
    assert np.array_equal(before, encode(model.rack.model, TEXTS, options={"lora": GOOD}))
    assert np.array_equal(plain, encode(model, TEXTS))
    model.rack.hang("again", good)
    assert np.array_equal(before, encode(model.rack.model, TEXTS, options={"lora": "again"}))
    model.rack.take(GOOD)
    model.rack.take("again")
