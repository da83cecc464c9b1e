"""What kind of model a set of files is, told from their names and their small JSON files alone.

Knows nothing of where the files lie: ``model_folders`` asks for directories, ``hub`` for repositories. What no family
would run rightly is refused with what was seen: better no model than wrong answers.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, Final, Protocol

import msgspec

from common.errors import ModelUnsupportedError
from config_db.documents import read_model
from config_db.encoders import encoders_named
from config_db.families import FAMILIES
from config_db.spec import ModelSpec

DENSE_MODULES: Final = frozenset({"Transformer", "Pooling", "Dense", "Normalize"})
"""Modules of sentence-transformers that the dense family runs."""
READS_PICKLE: Final = frozenset({"bge-m3", "gliner"})
"""Families that read weights in torch's own format, as numbers only, where a model's spec trusts it."""
_KINDS: Final[Mapping[str, str]] = {
    "SparseEncoder": "sparse",
    "MultiVectorEncoder": "multivector",
    "ColBERT": "multivector",
}
"""Families by what sentence-transformers writes down of its own models."""
_SPARSE_MODULES: Final = frozenset({"MLMTransformer", "SpladePooling", "SparseStaticEmbedding"})
_TYPES: Final[Mapping[str, str]] = {
    "GLiClass": "gliclass",
    "extractor": "gliner2",
    "clip": "clip",
    "siglip": "siglip",
    "siglip2": "siglip",
}
"""Families by ``model_type`` of config.json."""
_REPOSITORY: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]*(/[a-zA-Z0-9][a-zA-Z0-9._-]*)?")
_UNBOUNDED: Final = 1_000_000
"""Tokenizers that know no limit name a huge one."""


class Files(Protocol):
    """The files of one model."""

    def names(self) -> Collection[str]:
        """Their paths in it, parts joined by ``/``; at least those two levels deep."""

    def json(self, name: str) -> Any:
        """The content of a JSON file, None if there is none; ModelUnsupportedError if it cannot be read."""


class Module(msgspec.Struct, frozen=True):
    """One module of a sentence-transformers model: its class's name and package, and its folder, '' for the root."""

    kind: str
    package: str
    folder: str


def named_encoders(files: Files) -> list[str]:
    """Repositories of the Hub that hold config or tokenizer of an encoder in these files."""
    config = _mapping(files, "gliner_config.json")
    names = {str(config[field]) for field in encoders_named(config, files.names())}
    if wrong := next((name for name in names if not _REPOSITORY.fullmatch(name)), None):
        raise ModelUnsupportedError(f"its gliner_config.json leaves its encoder to {wrong[:200]!r}, no Hub repository")
    return sorted(names)


def describe(files: Files, *, model_id: str, source: Mapping[str, Any]) -> ModelSpec:
    """The spec of the model that these files are; what they leave open stays open.

    Raises:
        ModelUnsupportedError: no family runs such files, or not rightly; says what was seen.
        ConfigError: the id or a number in the files is none that a model may have.
    """
    modules = _modules(files)
    encoder = next((module.folder for module in modules if module.kind.endswith(("Transformer", "CLIPModel"))), "")
    names = files.names()
    if "gliner_config.json" in names:
        family, config = "gliner", _mapping(files, "gliner_config.json")
    else:
        where = _in(encoder, "config.json")
        config = _mapping(files, where)
        if not config:
            raise ModelUnsupportedError(f"it is no model: it has no {where}")
        family = _family(files, modules, config)
    if not any(_is_weights(name, encoder) for name in names):
        raise ModelUnsupportedError(_no_weights(family, names))
    known = FAMILIES[family]
    return read_model(
        {
            "id": model_id,
            "family": family,
            "source": source,
            "operations": known.operations,
            "outputs": known.outputs,
            "inputs": known.inputs,
            "dims": _dims(family, files, modules, encoder, config),
            "max_length": _longest(family, files, encoder, config),
        }
    )


def _no_weights(family: str, names: Collection[str]) -> str:
    """Why files without safetensors are refused, and what to do where the family reads other formats, too."""
    why = "it holds no safetensors weights; other formats can run code and are not loaded"
    if family not in READS_PICKLE or not any(name.endswith((".bin", ".pt")) for name in names):
        return why
    return f"{why} unless somebody writes the model down with `trust.formats: [safetensors, pickle]`"


def _modules(files: Files) -> list[Module]:
    """The modules of a sentence-transformers model, in order; none for any other."""
    entries = files.json("modules.json")
    if entries is None:
        return []
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ModelUnsupportedError("its modules.json is not a list of modules")
    found = []
    for entry in entries:
        package, _, kind = str(entry.get("type")).rpartition(".")
        found.append(Module(kind, package.partition(".")[0], str(entry.get("path") or "").strip("/")))
    return [part for module in found for part in (_routed(files, module) if module.kind == "Router" else [module])]


def _routed(files: Files, router: Module) -> list[Module]:
    """The modules that a router sends texts through."""
    types = _mapping(files, _in(router.folder, "router_config.json")).get("types")
    parts = types.items() if isinstance(types, dict) else ()
    return [Module(str(kind).rpartition(".")[2], router.package, _in(router.folder, name)) for name, kind in parts]


def _family(files: Files, modules: list[Module], config: Mapping[str, Any]) -> str:
    """Which family runs it; ModelUnsupportedError if none does."""
    names = files.names()
    if {"colbert_linear", "sparse_linear"} <= {name.rpartition(".")[0] for name in names}:
        return "bge-m3"
    code = config.get("auto_map")
    if isinstance(code, dict) and any(str(name).startswith("AutoModel") for name in code):
        raise ModelUnsupportedError("it needs code of its own repository (auto_map in config.json), which is not run")
    if not modules and str(config.get("model_type")) in _TYPES:
        return _TYPES[str(config.get("model_type"))]
    said = str(_mapping(files, "config_sentence_transformers.json").get("model_type"))
    if said in _KINDS:
        return _KINDS[said]
    architectures = [str(name) for name in config.get("architectures") or []]
    architecture = architectures[0] if architectures else ""
    if said == "CrossEncoder":
        return "causal-reranker" if architecture.endswith("ForCausalLM") else "cross-encoder"
    if "artifact.metadata" in names or architecture == "HF_ColBERT":
        return "multivector"
    if modules:
        return _family_of_modules(modules)
    if architecture.endswith("ForSequenceClassification"):
        return _family_of_classifier(config)
    if architecture.endswith("ForTokenClassification"):
        return "token-classification"
    if architecture.endswith("Model") or not architecture:
        return "dense"  # a plain encoder, which sentence-transformers reads as mean pooling
    seen = f"{architecture} of type {config.get('model_type')!r}"
    raise ModelUnsupportedError(f"its files do not say which family runs it: its config.json says {seen}")


def _family_of_modules(modules: list[Module]) -> str:
    kinds = [module.kind for module in modules]
    if any(module.package == "pylate" for module in modules):
        return "multivector"
    if _SPARSE_MODULES & set(kinds):
        return "sparse"
    if kinds == ["CLIPModel"]:
        return "clip"
    if "Pooling" in kinds and set(kinds) <= DENSE_MODULES:
        return "dense"
    raise ModelUnsupportedError(f"no family runs its modules: modules.json says {', '.join(kinds) or 'none'}")


def _family_of_classifier(config: Mapping[str, Any]) -> str:
    """A classifier of one label scores; one of entailment classifies by labels given in words."""
    labels = config.get("id2label")
    words = [str(word).lower() for word in labels.values()] if isinstance(labels, dict) else ["label_0", "label_1"]
    if len(words) == 1:
        return "cross-encoder"
    if any(word.startswith("entail") for word in words):
        return "nli"
    shown = ", ".join(words[:5])
    raise ModelUnsupportedError(f"no family runs a classifier of fixed labels: its config.json says {shown}")


def _dims(family: str, files: Files, modules: list[Module], encoder: str, config: Mapping[str, Any]) -> dict[str, int]:
    """Numbers in each output, where the files say."""
    layers = [module.folder for module in modules if module.kind == "Dense"]
    width = config.get("hidden_size") or config.get("d_model") or config.get("dim")
    where = _in(encoder, "config.json")
    if layers:
        where = _in(layers[-1], "config.json")
        width = _mapping(files, where).get("out_features")
    if family == "dense" and not isinstance(width, int):
        raise ModelUnsupportedError(f"its {where} names no width of the vectors")
    by_output = {
        "dense": config.get("projection_dim") if family == "clip" else width,
        "sparse": config.get("vocab_size"),
        "multivector": width if layers or family == "bge-m3" else None,
    }
    wanted = FAMILIES[family].outputs
    return {name: size for name, size in by_output.items() if name in wanted and isinstance(size, int) and size > 0}


def _longest(family: str, files: Files, encoder: str, config: Mapping[str, Any]) -> int | None:
    """Tokens a text may have, as the model's authors set it: for late interaction a document."""
    longest = config.get("max_len")  # GLiNER's name of it
    if family == "multivector":
        longest = _longest_document(files, encoder)
    if longest is None:
        longest = _mapping(files, _in(encoder, "sentence_bert_config.json")).get("max_seq_length")
    if longest is None:
        longest = _mapping(files, _in(encoder, "tokenizer_config.json")).get("model_max_length")
    return longest if isinstance(longest, int) and 0 < longest < _UNBOUNDED else None


def _longest_document(files: Files, encoder: str) -> Any:
    places = (("artifact.metadata", "doc_maxlen"), ("config_sentence_transformers.json", "document_length"))
    own = (_in(encoder, "sentence_bert_config.json"), "document_length")
    said = (_mapping(files, name).get(field) for name, field in (own, *places))
    return next((length for length in said if length is not None), None)


def _mapping(files: Files, name: str) -> Mapping[str, Any]:
    content = files.json(name)
    return content if isinstance(content, dict) else {}


def _is_weights(name: str, folder: str) -> bool:
    return name.endswith(".safetensors") and name.rpartition("/")[0] == folder


def _in(folder: str, name: str) -> str:
    return "/".join(part for part in (folder, name) if part)
