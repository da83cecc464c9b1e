"""How the folder of a late-interaction encoder wants to be read. No torch.

Three forms are read: ColBERT's own (the projection stands among the encoder's weights, settings in
``artifact.metadata``), PyLate's and sentence-transformers' (a chain of modules, settings beside it).
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from config_db.spec import ModelSpec
from workers.host.families.dense_folder import Folder, read_json, refusal, with_settings

EXPANSION: Final = 32
"""Tokens that ColBERT fills a query up to."""
PUNCTUATION: Final = tuple(string.punctuation)


@dataclass(frozen=True, slots=True)
class Expansion:
    """Queries are filled up to ``length`` with ``token`` (None: the mask token).

    ``is_seen``: whether other tokens attend to these. ``cuts``: whether a longer query ends there.
    """

    length: int = EXPANSION
    token: str | None = None
    is_seen: bool = False
    cuts: bool = True


@dataclass(frozen=True, slots=True)
class MultivectorFolder:
    """What the files, and over them the spec, say.

    ``layers`` are the folders of linear layers over each token; none: the projection stands in the weights of the
    encoder. A marker stands before every text, prompts come after it. ``skipped``: words whose vectors a document
    leaves out, a query too if ``skips_queries``. Where a length is None, that of ``text`` holds.
    """

    text: Folder
    layers: tuple[Path, ...] = ()
    query_marker: str = ""
    document_marker: str = ""
    query_length: int | None = None
    document_length: int | None = None
    expansion: Expansion | None = None
    skipped: tuple[str, ...] = ()
    skips_queries: bool = False
    normalize: bool = True


def read_multivector_folder(files: Path, spec: ModelSpec) -> MultivectorFolder:
    """Read the folder of a model.

    Raises:
        ModelLoadError: it asks for something this family does not do.
    """
    modules = read_json(files / "modules.json")
    shared = read_json(files / "config_sentence_transformers.json") or {}
    folder = _stanford(files) if modules is None else _chain(files, modules, shared)
    text = with_settings(files, folder.text)
    text = replace(
        text,
        prompts={**text.prompts, **spec.prompts},
        default_prompt=spec.default_prompt or text.default_prompt,
    )
    return _unmarked(_with_options(replace(folder, text=text), spec))


def _stanford(files: Path) -> MultivectorFolder:
    said = read_json(files / "artifact.metadata") or {}
    return MultivectorFolder(
        Folder(transformer=files),
        query_marker=said.get("query_token_id") or "[unused0]",
        document_marker=said.get("doc_token_id") or "[unused1]",
        document_length=said.get("doc_maxlen"),
        expansion=Expansion(said.get("query_maxlen") or EXPANSION, is_seen=bool(said.get("attend_to_mask_tokens"))),
        skipped=PUNCTUATION if said.get("mask_punctuation", True) else (),
    )


def _chain(files: Path, modules: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> MultivectorFolder:
    """A chain of modules; PyLate's own is complete without the mask and the normalisation at its end."""
    folder = _settings(shared)
    has_mask = normalizes = False
    for module in modules:
        kind, path = str(module.get("type", "")).rpartition(".")[2], files / str(module.get("path") or "")
        if kind == "Transformer":
            own = read_json(path / "sentence_bert_config.json") or {}
            folder = _lengths(replace(folder, text=replace(folder.text, transformer=path)), {**shared, **own})
        elif kind == "Dense":
            folder = replace(folder, layers=(*folder.layers, path))
        elif kind == "MultiVectorMask":
            folder, has_mask = _mask(folder, read_json(path / "config.json") or {}), True
        elif kind == "Normalize":
            normalizes = True
        else:
            raise refusal(f"its module {kind!r} is none that the multivector family runs")
    if not folder.layers:
        raise refusal("its modules hold no projection of the tokens (Dense)")
    if has_mask:
        return replace(folder, normalize=normalizes)
    words = shared.get("skiplist_words")
    return replace(folder, skipped=PUNCTUATION if words is None else tuple(words))


def _settings(shared: Mapping[str, Any]) -> MultivectorFolder:
    return MultivectorFolder(
        Folder(transformer=Path()),
        query_marker=shared.get("query_prefix") or "",
        document_marker=shared.get("document_prefix") or "",
    )


_PYLATE: Final = (
    "query_length",
    "document_length",
    "do_query_expansion",
    "attend_to_expansion_tokens",
    "attend_to_mask_tokens",
    "query_prefix",
    "document_prefix",
    "skiplist_words",
)
"""What only PyLate writes beside its modules: with any of these, queries are expanded unless it says otherwise."""


def _lengths(folder: MultivectorFolder, said: Mapping[str, Any]) -> MultivectorFolder:
    return replace(
        folder,
        query_length=said.get("query_length"),
        document_length=said.get("document_length"),
        expansion=_expansion(said),
    )


def _expansion(said: Mapping[str, Any]) -> Expansion | None:
    asked = said.get("query_expansion")
    if isinstance(asked, Mapping):
        return Expansion(
            int(asked.get("length") or EXPANSION),
            asked.get("token"),
            is_seen=bool(asked.get("attend")),
            cuts=asked.get("strategy") == "fixed",
        )
    if "query_expansion" in said or said.get("do_query_expansion") is False or not any(one in said for one in _PYLATE):
        return None
    seen = said.get("attend_to_expansion_tokens", said.get("attend_to_mask_tokens"))
    return Expansion(said.get("query_length") or EXPANSION, is_seen=bool(seen))


def _mask(folder: MultivectorFolder, config: Mapping[str, Any]) -> MultivectorFolder:
    if config.get("keep_only_token_ids"):
        raise refusal("its mask keeps only some tokens of a document, which the multivector family does not do")
    tasks = config.get("skiplist_tasks") or ["document"]
    if "document" not in tasks:
        raise refusal(f"its mask leaves words out of {', '.join(tasks)} only")
    return replace(folder, skipped=tuple(config.get("skiplist_words") or ()), skips_queries="query" in tasks)


def _with_options(folder: MultivectorFolder, spec: ModelSpec) -> MultivectorFolder:
    """The spec's own: markers, the longest query and document, whether queries are expanded."""
    options = _checked(spec)
    longest = options.get("query_max_length")
    if longest is not None:
        folder = replace(folder, query_length=longest)
        if folder.expansion is not None:
            kept = replace(folder.expansion, length=min(folder.expansion.length, longest), cuts=False)
            folder = replace(folder, expansion=kept)
    elif folder.expansion is not None and folder.expansion.cuts:
        folder = replace(folder, query_length=folder.expansion.length)
    if options.get("query_expansion") is False:
        folder = replace(folder, expansion=None)
    return replace(
        folder,
        query_marker=options.get("query_prefix", folder.query_marker),
        document_marker=options.get("document_prefix", folder.document_marker),
        document_length=spec.max_length or folder.document_length,
        normalize=folder.normalize if spec.normalize is None else spec.normalize,
    )


def _checked(spec: ModelSpec) -> Mapping[str, Any]:
    """The spec's options; ModelLoadError for one that says nothing."""
    given = {name: value for name, value in spec.options.items() if value is not None}
    longest = given.get("query_max_length", 1)
    kinds = {"query_max_length": int, "query_expansion": bool, "query_prefix": str, "document_prefix": str}
    wrong = [name for name, kind in kinds.items() if name in given and type(given[name]) is not kind]
    if wrong or longest < 1:
        name = wrong[0] if wrong else "query_max_length"
        raise refusal(f"options.{name} of its spec is {given[name]!r}, which says nothing")
    return given


def _unmarked(folder: MultivectorFolder) -> MultivectorFolder:
    """A prompt that begins with the marker says it twice; once is meant."""
    prompts = dict(folder.text.prompts)
    for name, marker in (("query", folder.query_marker), ("document", folder.document_marker)):
        if name in prompts:
            prompts[name] = prompts[name].removeprefix(marker)
    return replace(folder, text=replace(folder.text, prompts=prompts))
