"""Tiny random adapters, made and answered for by peft itself in a process of its own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from config_db.adapters import adapter_digest
from config_db.spec import Source, plain
from tasks.messages import Request
from tests.integration.test_dense import TINY, run_python

MADE = """
import json, sys
import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sentence_transformers import SentenceTransformer
texts, wanted = json.load(open(sys.argv[1])), json.loads(sys.argv[2])
def base(folder):
    return SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": "float32"})
for folder, adapters in wanted.items():
    for seed, (name, config) in enumerate(adapters.items()):
        torch.manual_seed(100 + seed)
        made = get_peft_model(base(folder)[0].auto_model, LoraConfig(init_lora_weights=False, **config))
        made.save_pretrained(f"{folder}/../{name}")
        model = base(folder)
        model[0].auto_model = PeftModel.from_pretrained(model[0].auto_model, f"{folder}/../{name}")
        np.save(f"{folder}/../{name}.npy", model.encode(texts, batch_size=8, convert_to_numpy=True))
"""
TEXTS = [
    "a farm",
    "The quick brown fox jumps over the lazy dog.",
    "",
    *("x" * length for length in (45, 46, 47)),  # with the marks at both ends: one short of the end, at it, beyond it
    "word " * 30,
    *(f"sentence number {n} " * (n % 3 + 1) for n in range(6)),
]


KINDS = [("bert", "mean"), ("xlm-roberta", "cls"), ("modernbert", "mean"), ("qwen3", "lasttoken")]
TARGETS = {"bert": ["query", "value"], "xlm-roberta": ["query", "key", "dense"], "modernbert": ["Wqkv", "Wo"]}
NAMES = ["small", "wide", "patched", "good", "all"]
MANY = [f"many{number}" for number in range(8)]


def adapters_of(kind: str) -> dict[str, dict[str, Any]]:
    """Of different ranks, targets and scalings, so that none may be taken for another; for BERT also many alike."""
    targets = TARGETS.get(kind, ["q_proj", "v_proj", "down_proj"])
    first = targets[0]
    many = {name: {"r": 12, "lora_alpha": 16, "target_modules": targets} for name in MANY if kind == "bert"}
    return {
        "small": {"r": 2, "lora_alpha": 32, "target_modules": targets[:1]},
        "wide": {"r": 8, "lora_alpha": 16, "target_modules": targets, "use_rslora": True},
        "patched": {"r": 4, "target_modules": targets, "rank_pattern": {first: 3}, "alpha_pattern": {first: 32}},
        "good": {"r": 4, "lora_alpha": 16, "target_modules": targets},
        "all": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        **many,
    }


def make_adapted(directory: Path) -> dict[str, Path]:
    """Tiny bases, saved as sentence-transformers folders, by kind; beside each its adapters, with what peft says."""
    texts = directory / "texts.json"
    texts.write_text(json.dumps(TEXTS))
    run_python(TINY, str(directory), str(texts), json.dumps(KINDS))
    bases = {kind: directory / f"{kind}-{pooling}-{seed}" / "st" for seed, (kind, pooling) in enumerate(KINDS)}
    configs = {str(folder): adapters_of(kind) for kind, folder in bases.items()}
    run_python(MADE, str(texts), json.dumps(configs))
    return bases


def reference(folder: Path, name: str) -> npt.NDArray[np.float32]:
    """What peft says of ``TEXTS``."""
    return np.asarray(np.load(folder.parent / f"{name}.npy"))


def source(folder: Path, name: str) -> Source:
    return Source(path=str(folder.parent / name))


def digest(folder: Path, name: str) -> str:
    return adapter_digest(source(folder, name))


def asking(text: str, where: Source | None) -> Request:
    """A request as it leaves the door; ``where``: the source of its adapter."""
    return Request(items=[{"text": text}], options={} if where is None else {"lora": plain(where)})
