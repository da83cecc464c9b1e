"""One tiny random model of every family, as folders and specs, and what each may be asked.

``python -m tests.every_family OUT`` makes the folders. Some models have a large vocabulary, so that it shows in a
process's memory whether they are loaded.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from config_db.model_folders import spec_of_directory
from config_db.spec import ModelSpec, Precision, Source
from tasks.messages import Request
from tasks.names import Operation

ROOT = Path(__file__).resolve().parent.parent
LARGE = ("dense", "cross-encoder", "token-classification")
"""Models whose vocabulary is larger than that of their tokenizer."""
VOCABULARY = 600_000
"""Of these: so large that glibc, even in half precision, maps their embeddings and gives them back when they go."""
TEXT = "Ada went to Paris ."
REQUESTS: dict[str, tuple[Operation, Request]] = {
    **{
        name: (Operation.ENCODE, Request(items=[{"text": TEXT}]))
        for name in ("dense", "sparse", "multivector", "bge-m3", "clip", "siglip")
    },
    **{
        name: (Operation.SCORE, Request(items=[{"text": TEXT, "id": "a"}], query={"text": "Who went to Paris ?"}))
        for name in ("cross-encoder", "causal-reranker")
    },
    **{
        name: (Operation.EXTRACT, Request(items=[{"text": TEXT, "id": "a"}], labels=["person", "city"]))
        for name in ("gliner", "gliner2", "gliclass", "nli")
    },
    "token-classification": (Operation.EXTRACT, Request(items=[{"text": TEXT, "id": "a"}])),
}
"""What each family is asked, by its name; a folder is named as its family."""


def make(out: Path) -> None:
    """Make every folder, in a process of its own."""
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.every_family", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr[-3000:]


def specs(out: Path) -> dict[str, ModelSpec]:
    """A spec for each folder, by family; those converted at their load are whole in memory."""
    found = {}
    for name in REQUESTS:
        precision: Precision = "bfloat16" if name in LARGE else "auto"
        found[name] = msgspec.structs.replace(_spec(out, name), id=f"every/{name}", precision=precision)
    return found


def _spec(out: Path, name: str) -> ModelSpec:
    """What the folder says; of some kinds it does not say how they are used."""
    source = Source(path=str(out / name))
    if name == "sparse":
        return ModelSpec(id=name, family=name, source=source, outputs=("sparse",))
    if name == "causal-reranker":
        words = {"yes_token": "yes", "no_token": "no"}
        return ModelSpec(id=name, family=name, source=source, operations=("score",), outputs=("score",), options=words)
    spec = spec_of_directory(out / name)
    assert spec.family == name
    return spec


def _tokenizer(*further: str, **special: str) -> Any:
    from tests.tiny_extractors import tokenizer

    made = tokenizer(512, *further)
    made.add_special_tokens(special)
    return made


def _save(auto: str, place: Path, kind: str = "bert", labels: tuple[str, ...] = ()) -> None:
    import transformers

    from tests.tiny_extractors import encoder

    config = encoder(kind, labels)
    made = _tokenizer("[unused0]", "[unused1]", "yes", "no", mask_token="[MASK]")  # noqa: S106 - no password
    config.vocab_size = VOCABULARY if place.name in LARGE else len(made)
    getattr(transformers, auto).from_config(config).save_pretrained(place)
    made.save_pretrained(place)


def _late_interaction(place: Path) -> None:
    """As ColBERT itself saves one: the projection among the encoder's weights."""
    import torch
    from safetensors.torch import load_file, save_file

    _save("AutoModel", place)
    weights = {f"bert.{name}": tensor for name, tensor in load_file(place / "model.safetensors").items()}
    save_file({**weights, "linear.weight": torch.randn(16, 32)}, place / "model.safetensors", {"format": "pt"})
    (place / "artifact.metadata").write_bytes(msgspec.json.encode({"query_maxlen": 16, "doc_maxlen": 40}))


def _three_heads(place: Path) -> None:
    import torch
    from safetensors.torch import save_file

    _save("AutoModel", place)
    for name, width in (("sparse_linear", 1), ("colbert_linear", 16)):
        save_file(torch.nn.Linear(32, width).state_dict(), place / f"{name}.safetensors")


def _images(out: Path) -> None:
    from tests.tiny_images import clip, save, siglip2

    for name, parts in (("clip", clip()), ("siglip", siglip2())):
        save(parts, out / name)


def _extractors(out: Path) -> None:
    from tests import tiny_extractors as tiny

    _save("AutoModelForTokenClassification", out / "token-classification", labels=("O", "B-PER", "I-PER"))
    _save("AutoModelForSequenceClassification", out / "nli", labels=("contradiction", "neutral", "entailment"))
    for build, kind, name in (
        (tiny.build_gliner, "gliner-span", "gliner"),
        (tiny.build_gliner2, "gliner2-span", "gliner2"),
        (tiny.build_gliclass, "gliclass-before", "gliclass"),
    ):
        build(out, kind)
        (out / kind).rename(out / name)


def main(out: Path) -> None:
    import torch

    torch.manual_seed(0)
    _save("AutoModel", out / "dense")
    _save("AutoModelForMaskedLM", out / "sparse")
    _late_interaction(out / "multivector")
    _three_heads(out / "bge-m3")
    _save("AutoModelForSequenceClassification", out / "cross-encoder", labels=("score",))
    _save("AutoModelForCausalLM", out / "causal-reranker", kind="qwen3")
    _images(out)
    _extractors(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
