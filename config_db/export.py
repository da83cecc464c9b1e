"""Specs as YAML files for version control: equal rows give equal bytes, and what is read back from them is equal.

Fields stand in the order in which their struct names them, defaults are left out, free mappings are sorted.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Final

import msgspec
import yaml

from config_db.spec import ModelSpec, plain

EDITOR_LINE: Final = "# yaml-language-server: $schema="
"""What a file begins with so that editors check it while it is written; the address or path of the schema follows."""
FOLDERS: Final[Mapping[str, str]] = {
    "dense": "dense",
    "sparse": "sparse",
    "multivector": "multivector",
    "bge-m3": "hybrid",
    "cross-encoder": "rerankers",
    "causal-reranker": "rerankers",
    "gliner": "entities",
    "gliner2": "entities",
    "token-classification": "entities",
    "gliclass": "labels",
    "nli": "labels",
    "clip": "images",
    "siglip": "images",
    "causal-lm": "generation",
    "seq2seq-lm": "generation",
    "docling": "documents",
    "document-vlm": "documents",
    "donut": "documents",
    "florence-2": "documents",
    "mineru": "documents",
    "page-multivector": "pages",
    "page-sparse": "pages",
    "vlm-embedder": "pages",
    "vlm-reranker": "pages",
    "context-pruner": "extraction",
    "extractor-union": "extraction",
    "gliformer": "extraction",
    "glirel": "extraction",
    "laya": "extraction",
    "grounding-dino": "detection",
    "owlv2": "detection",
    "sam": "detection",
    "parakeet": "speech",
    "whisper": "speech",
}
"""Where a person looks for models of each family, those of the catalogue that nothing here runs among them; models of
other families stand in a folder of its name."""
_LONGEST_NAME: Final = 200
_UNFOLDED: Final = 1 << 30
_NUMBER_ELSEWHERE: Final = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|0o[0-7]+|0x[\da-fA-F]+")
"""Text that other readers of YAML than ours take for a number, as a commit id of digits and one e."""


class _Dumper(yaml.CSafeDumper):
    """Writes each value where it stands: anchors are not read back."""

    def ignore_aliases(self, _data: Any) -> bool:
        return True


def _quoted_if_needed(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = None
    if not text.isprintable():  # line breaks and what a reader would not see, written as escapes
        style = '"'
    elif _NUMBER_ELSEWHERE.fullmatch(text):
        style = "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _on_a_line_if_plain(dumper: _Dumper, parts: Sequence[Any]) -> yaml.SequenceNode:
    is_plain = not any(isinstance(part, (Mapping, list)) for part in parts)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", parts, flow_style=is_plain)


_Dumper.add_representer(str, _quoted_if_needed)
_Dumper.add_representer(list, _on_a_line_if_plain)


def model_yaml(spec: ModelSpec, *, schema: str | None = None) -> str:
    """A model as a file of its own; ``schema`` is where editors find the JSON Schema, seen from the file."""
    first = f"{EDITOR_LINE}{schema}\n" if schema is not None else ""
    return first + to_yaml(ordered(spec))


def to_yaml(content: Any) -> str:
    """Plain content as YAML, in the order in which it stands."""
    text: str = yaml.dump(
        content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=_UNFOLDED
    )
    return text


def ordered(part: Any) -> Any:
    """A spec as plain content without defaults: fields in the order of their struct, names in alphabetical order."""
    if isinstance(part, msgspec.Struct):
        return {field: ordered(getattr(part, field)) for field in plain(part)}
    if isinstance(part, Mapping):
        return {name: ordered(part[name]) for name in sorted(part)}
    if isinstance(part, (list, tuple)):
        return [ordered(one) for one in part]
    return msgspec.to_builtins(part)


def file_paths(specs: Iterable[ModelSpec]) -> dict[str, PurePosixPath]:
    """The file of each model by its id: ``dense/<org>--<name>.yaml``, in the folders of the catalogue.

    Names that a file system without case would take for one are told apart by a digest of the id.
    """
    plainly = {
        spec.id: PurePosixPath(FOLDERS.get(spec.family, spec.family)) / spec.id.replace("/", "--") for spec in specs
    }
    taken = Counter(str(path).lower() for path in plainly.values())
    paths = {}
    for model_id, path in plainly.items():
        name = path.name
        if taken[str(path).lower()] > 1 or len(name) > _LONGEST_NAME:
            digest = hashlib.sha256(model_id.encode()).hexdigest()[:8]
            name = f"{name[:_LONGEST_NAME]}.{digest}"
        paths[model_id] = path.with_name(f"{name}.yaml")
    return paths
