"""Adapters on models that score, against the same adapters merged into the weights by peft in a process of its own."""

import json
import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import transformers

from config_db.families import ADAPTABLE
from config_db.model_folders import spec_of_directory
from tests.integration.test_causal_reranker import plain_spec
from tests.integration.test_dense import run_python
from tests.rerankers import PAIRS, answer, requests_of, score
from workers.host.families.pairs import PairModel
from workers.host.families.protocol import Device
from workers.host.families.registry import find
from workers.host.rack import Rack

MERGED = """
import json, shutil, sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
for folder, is_causal in json.loads(sys.argv[1]).items():
    kind = AutoModelForCausalLM if is_causal else AutoModelForSequenceClassification
    for rank, name in ((2, "a"), (8, "b")):
        torch.manual_seed(rank)
        config = LoraConfig(r=rank, lora_alpha=8 * rank, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(kind.from_pretrained(folder, dtype=torch.float32), config)
        adapted.save_pretrained(f"{folder}-{name}")
        shutil.copytree(folder, f"{folder}-merged-{name}")
        adapted.merge_and_unload().save_pretrained(f"{folder}-merged-{name}")
"""
CROSS, CAUSAL = ["bert", "xlm-roberta", "distilbert", "deberta", "modernbert-mean"], ["qwen3"]


@pytest.fixture(scope="module")
def folders(cross_encoders: Path, causal_rerankers: Path) -> dict[str, Path]:
    """Bases by kind; beside each ``plain-a`` and ``plain-b``, and the base with each of them merged in."""
    found = {kind: cross_encoders / kind / "plain" for kind in CROSS}
    found |= {kind: causal_rerankers / kind / "plain" for kind in CAUSAL}
    run_python(MERGED, json.dumps({str(folder): kind in CAUSAL for kind, folder in found.items()}))
    return found


def load(folder: Path) -> Any:
    is_causal = folder.parent.name in CAUSAL
    spec = plain_spec(folder) if is_causal else spec_of_directory(folder)
    spec = msgspec.structs.replace(spec, precision="float32")
    assert spec.family in ADAPTABLE
    model = find(spec.family, {}).load(spec, folder, Device(pass_tokens=512))
    assert isinstance(model, PairModel)
    return model


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # transformers' DeBERTa
@pytest.mark.parametrize("kind", [*CROSS, *CAUSAL])
def test_scores_with_an_adapter_are_those_of_the_merged_model(folders: dict[str, Path], kind: str) -> None:
    folder = folders[kind]
    expected = {name: score(load(folder.with_name(f"plain-merged-{name}")), PAIRS) for name in "ab"}
    model = load(folder)
    before = score(model, PAIRS)
    for name in "ab":
        model.rack.hang(name, model.rack.read(folder.with_name(f"plain-{name}")))
    adapted = model.rack.model
    for name in "ab":
        assert np.abs(expected[name] - before).max() > 0.01, "an adapter that changes nothing tells nothing"
        np.testing.assert_allclose(score(adapted, PAIRS, options={"lora": name}), expected[name], atol=1e-4)
        alone = [score(adapted, [pair], options={"lora": name})[0] for pair in PAIRS]
        np.testing.assert_allclose(alone, expected[name], atol=1e-4)
    if kind != "deberta":
        mixed(adapted, expected)
    assert np.array_equal(before, score(model, PAIRS))


def mixed(adapted: Any, expected: dict[str, np.ndarray[Any, Any]]) -> None:
    """Requests for both adapters in one micro-batch, in any order."""
    wanted = [(at, name) for at in range(len(PAIRS)) for name in "ab"]
    random.Random(1).shuffle(wanted)
    requests = [requests_of([PAIRS[at]], options={"lora": name})[0] for at, name in wanted]
    found = [ranking[0]["score"] for ranking in answer(adapted, *requests)]
    np.testing.assert_allclose(found, [expected[name][at] for at, name in wanted], atol=1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_model_that_cannot_mix_is_found_out_once(folders: dict[str, Path]) -> None:
    """DeBERTa runs its layers over positions, too, which belong to nobody."""
    folder = folders["deberta"]
    model = load(folder)
    for name in "ab":
        model.rack.hang(name, model.rack.read(folder.with_name(f"plain-{name}")))
    assert model.rack.mixes
    requests = [requests_of([PAIRS[0]], options={"lora": name})[0] for name in "ab"]
    with pytest.raises(RuntimeError, match="not its pass"):
        answer(model.rack.model, *requests)
    assert not model.rack.mixes
    with pytest.raises(RuntimeError, match="one at a time"):  # whatever its shape, as a part of the same might fit
        answer(model.rack.model, *requests)


def test_types_that_are_given_tokens_before_rows_do_not_mix() -> None:
    """With as many rows as tokens nothing would tell."""
    config = transformers.XLNetConfig(vocab_size=32, d_model=16, n_layer=1, n_head=2, d_inner=16)
    rack = Rack(transformers.XLNetForSequenceClassification(config), lambda _: pytest.fail("nothing hangs"))
    assert not rack.mixes
