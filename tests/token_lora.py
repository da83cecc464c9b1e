"""Tiny random adapters on models of more than one pooled vector a text, made and answered for by peft itself.

The bases are those of ``tests.token_models``. In a process of its own, which knows nothing of Farmhand, peft puts each
adapter on a base, and sentence-transformers runs that; BGE-M3's heads are computed there.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from config_db.spec import Source
from tests.integration.test_dense import run_python
from tests.token_models import TEXTS, made

Vectors = list[npt.NDArray[np.float32]]

_MADE = """
import json, sys
from pathlib import Path
import numpy as np
import torch, transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from sentence_transformers import MultiVectorEncoder, SparseEncoder
from torch.nn.functional import normalize
out, texts, wanted = Path(sys.argv[1]), json.load(open(sys.argv[2])), json.loads(sys.argv[3])
def transformer(model):
    return model[0].sub_modules["document"][0] if hasattr(model[0], "sub_modules") else model[0]
def save(place, found):
    np.savez(place, *[np.asarray(one, dtype=np.float32) for one in found])
def sparse(folder, adapter):
    model = SparseEncoder(str(folder), device="cpu")
    transformer(model).auto_model = PeftModel.from_pretrained(transformer(model).auto_model, adapter)
    return {kind: ask(texts, batch_size=8, convert_to_sparse_tensor=False).numpy()
        for kind, ask in (("query", model.encode_query), ("document", model.encode_document))}
def multivector(folder, adapter):
    model = MultiVectorEncoder(str(folder), device="cpu")
    transformer(model).auto_model = PeftModel.from_pretrained(transformer(model).auto_model, adapter)
    said = {"query": model.encode_query(texts, batch_size=8, convert_to_numpy=True),
        "document": model.encode_document(texts, batch_size=8, convert_to_numpy=True)}
    asked, given = model.encode_query(texts[:3]), model.encode_document(texts)
    return {**said, "maxsim": model.similarity(asked, given).numpy()}
def m3(folder, adapter):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    base = transformers.AutoModel.from_pretrained(folder)
    encoder = PeftModel.from_pretrained(base, adapter).double().eval()
    heads = [load_file(folder / f"{name}.safetensors") for name in ("sparse_linear", "colbert_linear")]
    (weigh, weigh_bias), (project, project_bias) = ((one["weight"].double(), one["bias"].double()) for one in heads)
    said = {"dense": [], "sparse": [], "multivector": []}
    for text in texts:
        read = tokenizer(text, truncation=True, max_length=48, return_tensors="pt")
        with torch.no_grad():
            states = encoder(**read).last_hidden_state[0]
        said["dense"].append(normalize(states[0], dim=0))
        said["multivector"].append(normalize(states[1:] @ project.T + project_bias, dim=-1))
        row = np.zeros(base.config.vocab_size)
        for token, weight in zip(read["input_ids"][0].tolist(), (states @ weigh.T + weigh_bias).relu()):
            if token not in tokenizer.all_special_ids:
                row[token] = max(row[token], float(weight))
        said["sparse"].append(row)
    return said
for family, bases in wanted.items():
    for base, adapters in bases.items():
        for seed, (name, config) in enumerate(adapters.items()):
            torch.manual_seed(100 + seed)
            folder, place = out / base, out / f"{base}-{name}"
            bare = (transformers.AutoModel.from_pretrained(folder) if family == "m3" else transformer(
                (SparseEncoder if family == "sparse" else MultiVectorEncoder)(str(folder), device="cpu")).auto_model)
            get_peft_model(bare, LoraConfig(init_lora_weights=False, **config)).save_pretrained(place)
            for kind, found in globals()[family](folder, place).items():
                save(place / f"{kind}.npz", found)
"""
_ENCODERS = {
    "bert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv", "Wo"],
    "xlm-roberta": ["query", "dense"],
}
_HEADS = {
    "bert": ["transform.dense", "decoder"],
    "distilbert": ["vocab_transform", "vocab_projector"],
    "modernbert": ["head.dense", "decoder"],
}
SPARSE = {"bert-sum": "bert", "free": "distilbert", "modernbert": "modernbert"}
MULTIVECTOR = {"stanford": "bert", "pylate": "bert", "moderncolbert": "modernbert"}
NAMES = ["small", "second", "both"]
"""Of every base, in the order in which they are to be hung: what the later name, the first does not touch."""


def _adapters(encoder: list[str], second: list[str]) -> dict[str, Any]:
    return {
        "small": {"r": 2, "lora_alpha": 8, "target_modules": encoder[:1]},
        "second": {"r": 4, "lora_alpha": 8, "target_modules": second},
        "both": {"r": 8, "lora_alpha": 8, "target_modules": [*encoder, *second], "use_rslora": True},
    }


def make_token_adapters(factory: pytest.TempPathFactory) -> Path:
    """The folder of ``tests.token_models``, with adapters as ``<base>-<name>`` in it."""
    out = made(factory)
    wanted = {
        "sparse": {base: _adapters(_ENCODERS[kind], _HEADS[kind]) for base, kind in SPARSE.items()},
        "multivector": {base: _adapters(_ENCODERS[kind], _ENCODERS[kind][1:]) for base, kind in MULTIVECTOR.items()},
        "m3": {"m3": _adapters(_ENCODERS["xlm-roberta"], _ENCODERS["xlm-roberta"][1:])},
    }
    run_python(_MADE, str(out), str(out / "texts.json"), json.dumps(wanted))
    return out


def reference(base: Path, name: str, kind: str) -> Vectors:
    """What peft says of ``tests.token_models.TEXTS`` with the adapter of this name on a base."""
    with np.load(adapter(base, name) / f"{kind}.npz") as found:
        said = [found[key] for key in found.files]
    assert kind == "maxsim" or len(said) == len(TEXTS)
    return said


def adapter(base: Path, name: str) -> Path:
    return base.with_name(f"{base.name}-{name}")


def source(base: Path, name: str) -> Source:
    return Source(path=str(adapter(base, name)))
