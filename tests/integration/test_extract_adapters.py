"""Adapters on extractors with one of transformers' heads, against its pipelines over what peft has merged them into."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from config_db.families import ADAPTABLE
from config_db.model_folders import spec_of_directory
from tests import tiny_extractors as tiny
from tests.integration.test_dense import run_python
from tests.integration.test_extract import TRUNCATE, answers, assert_same, classes, entities, request_of
from workers.host.families.protocol import Device
from workers.host.families.registry import find

MERGED = """
import json, shutil, sys
from pathlib import Path
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
from tests import tiny_extractors as tiny
out, said = Path(sys.argv[1]), {}
tiny.build_ner(out / "ner")
tiny.build_nli(out / "nli-three", "nli-three")
for base, kind, say in (("ner", AutoModelForTokenClassification, tiny.say_ner),
        ("nli-three", AutoModelForSequenceClassification, tiny.say_nli)):
    for rank, name in ((2, "a"), (8, "b")):
        torch.manual_seed(rank)
        config = LoraConfig(r=rank, lora_alpha=4 * rank, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(kind.from_pretrained(out / base, dtype=torch.float32), config)
        adapted.save_pretrained(out / f"{base}-{name}")
        shutil.copytree(out / base, out / f"{base}-merged-{name}")
        adapted.merge_and_unload().save_pretrained(out / f"{base}-merged-{name}")
        said[f"{base}-{name}"] = say(out / f"{base}-merged-{name}")
(out / "said.json").write_text(json.dumps(said))
"""
CASES: dict[str, Mapping[str, Any]] = {"ner": tiny.NER_CASES, "nli-three": tiny.NLI_CASES}
READ = {"ner": entities, "nli-three": classes}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases; beside each its adapters; and what the pipelines say."""
    out = tmp_path_factory.mktemp("adapted-extractors")
    run_python(MERGED, str(out))
    return out


def load(folder: Path) -> Any:
    """A base with its adapters."""
    spec = spec_of_directory(folder)
    assert spec.family in ADAPTABLE
    model: Any = find(spec.family, {}).load(spec, folder, Device(pass_tokens=256))
    for name in "ab":
        model.rack.hang(name, model.rack.read(folder.with_name(f"{folder.name}-{name}")))
    return model


def found(model: Any, base: str, wanted: Sequence[tuple[int, str, str | None]]) -> list[Any]:
    """What a model finds, each text in a request of its own, all in one micro-batch."""
    requests = []
    for at, case, name in wanted:
        options = {**TRUNCATE, **CASES[base][case], **({} if name is None else {"lora": name})}
        labels = None if base == "ner" else tiny.LABELS
        requests.append(request_of([tiny.TEXTS[at]], labels=labels, options=options))
    return [READ[base](items[0]) for items in answers(model, *requests)]


@pytest.mark.parametrize("base", CASES)
def test_what_is_found_with_an_adapter_is_what_the_merged_model_finds(made: Path, base: str) -> None:
    model, said = load(made / base), json.loads((made / "said.json").read_text())
    wanted = [(at, case, name) for at in range(len(tiny.TEXTS)) for case in CASES[base] for name in "ab"]
    plain = [(at, case, None) for at, case, _ in wanted]
    before = found(model, base, plain)
    alone = [found(model.rack.model, base, [one])[0] for one in wanted]
    for one, (at, case, name) in zip(alone, wanted, strict=True):
        assert_same(one, said[f"{base}-{name}"][case][at])
    told = [said[f"{base}-a"][case][at] != said[f"{base}-b"][case][at] for at, case, _ in wanted]
    assert all(told), "adapters that say the same tell nothing"
    assert sum(one != other for one, other in zip(before, alone, strict=True)) > len(wanted) // 2
    places = list(range(len(wanted)))
    random.Random(4).shuffle(places)
    mixed = found(model.rack.model, base, [wanted[place] for place in places])
    for one, place in zip(mixed, places, strict=True):
        assert_same(one, alone[place], within=1e-5)
    assert model.rack.mixes, "they were run apart"
    assert found(model, base, plain) == before
    model.close()
