"""Model documents in the form that public SIE servers take, read as documents of ours.

Nothing is guessed: what has no counterpart here is left out and named in a warning.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, get_args

import msgspec

from common.errors import ConfigError
from config_db.documents import convert
from config_db.families import FAMILIES
from config_db.field_paths import below, joined, leads_to
from config_db.spec import DEFAULT_PROFILE, Input, Name, Operation, Output, Positive, Precision

_OURS: Final = frozenset(("family", "source"))
_THEIRS: Final = frozenset(("hf_id", "hf_revision", "tasks", "max_sequence_length", "weights_path"))
_THEIRS_IN_PROFILES: Final = frozenset(("adapter_path", "adapter_options", "compute_precision", "max_batch_tokens"))

_FAMILIES: Final[Mapping[str, tuple[str, ...]]] = {
    "dense": (
        "bert_flash",
        "modernbert_flash",
        "nomic_flash",
        "pytorch_embedding",
        "qwen2_flash",
        "rope_flash",
        "sentence_transformer",
        "xlm_roberta_flash",
    ),
    "bge-m3": ("bge_m3", "bge_m3_flag", "bge_m3_flash"),
    "sparse": ("gte_sparse_flash", "splade_flash"),
    "multivector": ("colbert", "colbert_modernbert_flash", "colbert_rotary_flash"),
    "cross-encoder": (
        "bert_flash_cross_encoder",
        "cross_encoder",
        "jina_flash_cross_encoder",
        "modernbert_flash_cross_encoder",
    ),
    "causal-reranker": ("native_causal_cross_encoder", "qwen2_flash_cross_encoder"),
    "gliner": ("gliner", "gliner_bi"),
    "gliner2": ("gliner2",),
    "gliclass": ("gliclass",),
    "nli": ("nli_classification", "nli_classification_flash"),
    "clip": ("clip",),
    "siglip": ("siglip",),
}
"""Our families by the modules of the adapters that run the same models there."""
_BY_ADAPTER: Final = {adapter: family for family, adapters in _FAMILIES.items() for adapter in adapters}

_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "default_instruction": ("default_instruction",),
    "doc_prefix": ("options", "document_prefix"),
    "doc_template": ("templates", "document"),
    "hypothesis_template": ("options", "hypothesis_template"),
    "lora_id": ("lora_id",),
    "multi_label": ("options", "multi_label"),
    "no_token": ("options", "no_token"),
    "normalize": ("normalize",),
    "output_types": ("outputs",),
    "pooling": ("pooling",),
    "query_max_length": ("options", "query_max_length"),
    "query_prefix": ("options", "query_prefix"),
    "query_template": ("templates", "query"),
    "threshold": ("options", "threshold"),
    "yes_token": ("options", "yes_token"),
}
"""Where what the options of adapters say stands in a document of ours; ``lora_id`` makes an adapter of its own."""

_ORIGINS: Final[Mapping[str, str]] = {
    "family": "profiles.default.adapter_path",
    "source": "hf_id",
    "source.hub": "hf_id",
    "source.revision": "hf_revision",
    "source.path": "weights_path",
    "operations": "tasks",
    "outputs": "tasks",
    "dims": "tasks.encode",
    "max_length": "max_sequence_length",
}
"""Where in a document of the public form the content of ours stands, always."""

_WORDS: Final = {"operations": get_args(Operation), "outputs": get_args(Output), "inputs": get_args(Input)}

_NO_PLACES: Final[Mapping[str, str]] = MappingProxyType({})


class Translated(msgspec.Struct, frozen=True):
    """A document of ours, perhaps only some fields of one, and what of the original is not in it.

    ``origins`` hold where in the original a field's content stood, by its path in ours.
    """

    fields: dict[str, Any]
    warnings: tuple[str, ...]
    origins: dict[str, str]


class _Width(msgspec.Struct):
    dim: Positive | None = None


class _Encode(msgspec.Struct):
    dense: _Width | None = None
    sparse: _Width | None = None
    multivector: _Width | None = None


class _Tasks(msgspec.Struct):
    encode: _Encode | None = None
    score: dict[str, Any] | None = None
    extract: dict[str, Any] | None = None
    generate: dict[str, Any] | None = None


class _Options(msgspec.Struct):
    loadtime: dict[str, Any] | None = None
    runtime: dict[str, Any] | None = None


class _Profile(msgspec.Struct):
    extends: Name | None = None
    adapter_path: str | None = None
    adapter_options: _Options | None = None
    compute_precision: Precision | None = None
    max_batch_tokens: Positive | None = None


class _Model(msgspec.Struct):
    profiles: dict[Name, _Profile]
    hf_id: str | None = None
    hf_revision: str | None = None
    weights_path: str | None = None
    inputs: dict[str, bool] | None = None
    tasks: _Tasks | None = None
    max_sequence_length: Positive | None = None


def is_sie(document: Mapping[str, Any]) -> bool:
    """Whether a document that names a model is of the public form rather than ours."""
    if not _OURS.isdisjoint(document):
        return False
    profiles = document.get("profiles")
    parts = profiles.values() if isinstance(profiles, dict) else ()
    return not _THEIRS.isdisjoint(document) or any(
        isinstance(part, dict) and not _THEIRS_IN_PROFILES.isdisjoint(part) for part in parts
    )


def translate(document: Mapping[str, Any], *, places: Mapping[str, str] = _NO_PLACES) -> Translated:
    """What a document of the public form says, in our fields, without the model's id.

    Args:
        document: the content, the key of the id taken out.
        places: the operator's own families, ``module:Class`` by name: an ``adapter_path`` may name one, too.

    Raises:
        ConfigError: not of that form, or run by an adapter that no family here stands for.
    """
    model = convert(document, _Model)
    warnings = [*_unknown(document, _Model, "")]
    for name, part in document["profiles"].items():
        warnings += _unknown(part, _Profile, f"profiles.{name}")
    fields: dict[str, Any] = {}
    origins = dict(_ORIGINS)
    if model.inputs:
        fields["inputs"] = [name for name, is_taken in model.inputs.items() if is_taken]
    if model.max_sequence_length is not None:
        fields["max_length"] = model.max_sequence_length
    fields |= _source(model) | _tasks(model.tasks, warnings) | _profiles(model.profiles, places, warnings, origins)
    _narrow(fields, warnings)
    return Translated(fields, tuple(warnings), origins)


def in_their_words(error: ConfigError, origins: Mapping[str, str]) -> ConfigError:
    """What was wrong with the translation, told of the original: its path, as far as one is known."""
    path = error.param or ""
    ours = max((one for one in origins if leads_to(one, path)), key=len, default=None)
    if ours is None or not error.message.startswith(path):
        return error
    theirs = origins[ours] + path[len(ours) :]
    return ConfigError(theirs + error.message[len(path) :], param=theirs, details=error.details)


def _narrow(fields: dict[str, Any], warnings: list[str]) -> None:
    """Leave out what the family does not do: there the model's adapter does more than our family.

    What no family does stays, and so does what would leave nothing: it is refused where the model is read.
    """
    family = FAMILIES.get(fields.get("family") or "")
    if family is None:
        return
    for field, does in family.does.items():
        _narrow_one(fields, field, does, warnings, "")
    for name, profile in fields.get("profiles", {}).items():
        _narrow_one(profile, "outputs", family.outputs, warnings, f" of profiles.{name}")
    dims = fields.get("dims", {})
    for output in [one for one in dims if one not in family.outputs]:
        del dims[output]
        warnings.append(_ignored(f"tasks.encode.{output}", "the model's family here has none"))


def _narrow_one(part: dict[str, Any], field: str, does: Sequence[str], warnings: list[str], of: str) -> None:
    named = part.get(field)
    if not isinstance(named, list) or not all(one in _WORDS[field] for one in named):
        return
    beyond = [one for one in named if one not in does]
    if beyond and len(beyond) < len(named):
        part[field] = [one for one in named if one in does]
        warnings.append(_ignored(f"{field} {', '.join(beyond)}{of}", "the model's family here has none"))


def _source(model: _Model) -> dict[str, Any]:
    if model.hf_id is None:
        return {"source": {"path": model.weights_path}} if model.weights_path is not None else {}
    source = {"hub": model.hf_id, "revision": model.hf_revision}
    return {"source": {name: value for name, value in source.items() if value is not None}}


def _tasks(tasks: _Tasks | None, warnings: list[str]) -> dict[str, Any]:
    if tasks is None:
        return {}
    operations: list[str] = []
    outputs: list[str] = []
    dims: dict[str, int] = {}
    if tasks.encode is not None:
        operations.append("encode")
        for output in tasks.encode.__struct_fields__:
            width: _Width | None = getattr(tasks.encode, output)
            if width is not None:
                outputs.append(output)
                dims |= {output: width.dim} if width.dim is not None else {}
    if tasks.score is not None:
        operations.append("score")
        outputs += ["score"] if tasks.encode is None else []
    if tasks.extract is not None:
        operations.append("extract")
        outputs.append("json")
    if tasks.generate is not None:
        warnings.append(_ignored("tasks.generate", "generation is not served here"))
    if not operations:
        raise ConfigError("tasks: none of encode, score and extract is named", param="tasks")
    return {"operations": operations, "outputs": outputs, "dims": dims}


def _profiles(
    profiles: Mapping[str, _Profile], places: Mapping[str, str], warnings: list[str], origins: dict[str, str]
) -> dict[str, Any]:
    """The default profile is the model itself; the others are profiles of it, or adapters if they name a LoRA."""
    fields: dict[str, Any] = {}
    families = {name: _family(name, profile, places) for name, profile in profiles.items()}
    base = families.get(DEFAULT_PROFILE)
    for name, profile in profiles.items():
        at = f"profiles.{name}"
        said = _read_options(name, profile, warnings, origins)
        lora = said.pop("lora_id", None)
        if name == DEFAULT_PROFILE:
            fields |= said | _itself(profile, base)
            if lora is not None:
                warnings.append(_ignored(f"{at}.adapter_options.runtime.lora_id", "the model itself runs without one"))
        elif lora is not None:
            fields.setdefault("adapters", {})[name] = {"hub": lora}
            warnings.append(f"{at} is kept as the adapter `{name}` of the model, not as a profile")
        elif None not in (base, families[name]) and base != families[name]:
            warnings.append(_ignored(at, f"it is run by the family `{families[name]}`, and the model by `{base}`"))
        else:
            fields.setdefault("profiles", {})[name] = _variant(profile, said, at, warnings)
    return fields


def _itself(profile: _Profile, family: str | None) -> dict[str, Any]:
    limits = {"max_batch_tokens": profile.max_batch_tokens} if profile.max_batch_tokens is not None else {}
    return {"family": family} | ({"limits": limits} if limits else {})


def _variant(profile: _Profile, said: dict[str, Any], at: str, warnings: list[str]) -> dict[str, Any]:
    """A profile of ours, which says nothing of what only a whole model has."""
    if profile.max_batch_tokens is not None:
        warnings.append(_ignored(f"{at}.max_batch_tokens", "limits are the model's"))
    if profile.extends is None:
        warnings.append(f"{at}: what it leaves open is as the model has it")
        return said
    return {"extends": profile.extends} | said


def _family(name: str, profile: _Profile, places: Mapping[str, str]) -> str | None:
    """The family that an adapter stands for; None for a profile that takes the adapter of the one it extends."""
    at = f"profiles.{name}"
    if profile.adapter_path is None:
        if profile.extends is None or name == DEFAULT_PROFILE:
            raise ConfigError(f"{at}: a profile has an adapter_path or extends another that has one", param=at)
        return None
    own = {place: family for family, place in places.items()}
    module = profile.adapter_path.partition(":")[0].removesuffix(".adapter").rpartition(".")[2]
    family = own.get(profile.adapter_path) or _BY_ADAPTER.get(module)
    if family is None:
        shown = profile.adapter_path[:200]
        raise ConfigError(f"{at}.adapter_path: no family here runs what {shown!r} runs", param=f"{at}.adapter_path")
    return family


def _read_options(name: str, profile: _Profile, warnings: list[str], origins: dict[str, str]) -> dict[str, Any]:
    """The options of a profile's adapter as fields of ours; ``lora_id`` stays as it is."""
    theirs, ours = f"profiles.{name}", "" if name == DEFAULT_PROFILE else below("profiles", name)
    fields: dict[str, Any] = {}
    if profile.compute_precision is not None:
        fields["precision"] = profile.compute_precision
    given = profile.adapter_options or _Options()
    for kind, options in (("loadtime", given.loadtime or {}), ("runtime", given.runtime or {})):
        for option, value in options.items():
            at, place = f"{theirs}.adapter_options.{kind}.{option}", _OPTIONS.get(option)
            if option == "trust_remote_code" and value:
                warnings.append(_ignored(at, "no code of a repository is run"))
            elif value is not None and place is None:
                warnings.append(_ignored(at, "it has no counterpart"))
            elif value is not None and place is not None:
                _put(fields, place, value)
                origins[f"{below('adapters', name)}.hub" if option == "lora_id" else joined(ours, ".".join(place))] = at
    return fields


def _put(fields: dict[str, Any], place: Sequence[str], value: Any) -> None:
    *outer, name = place
    for part in outer:
        fields = fields.setdefault(part, {})
    fields[name] = value


def _unknown(part: Any, kind: type[msgspec.Struct], at: str) -> Iterable[str]:
    for name in part if isinstance(part, dict) else ():
        if name not in kind.__struct_fields__:
            yield _ignored(f"{at}.{name}"[:200].lstrip("."), "it has no counterpart")


def _ignored(path: str, why: str) -> str:
    return f"{path} is ignored: {why}"
