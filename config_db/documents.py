"""Documents that people and tools write, YAML or JSON, as validated specs; whatever is wrong names the field."""

import datetime
import json
import re
from collections import Counter
from collections.abc import Collection
from math import isfinite
from typing import Any, Final, TypeVar

import msgspec
import yaml

from common.errors import BodyTooLargeError, ConfigError, DocumentError
from config_db.families import FAMILIES, left_open, misfits
from config_db.field_paths import below
from config_db.refusals import did_you_mean, refusal
from config_db.spec import MODEL_ID, ModelSpec

MAX_DOCUMENT_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 32
MAX_DIGITS: Final = 100
NODE_BYTES: Final = 8
"""A document has at most one value for so many of the bytes that it may have: each costs time, however short it is."""
MAX_VALUES: Final = 20_000
"""Values that one spec is made of: several times those of a model with as many profiles as it may have."""
_ERROR_SHOWN: Final = 500
_TEXT: Final = "tag:yaml.org,2002:str"
_NUMBERS: Final = frozenset(("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"))
T = TypeVar("T")


class _Doubled(dict[str, Any]):
    """A mapping of a JSON document in which the key ``twice`` stands twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        ((self.twice, _),) = Counter(name for name, _ in pairs).most_common(1)


def parse(raw: bytes, *, max_bytes: int = MAX_DOCUMENT_BYTES) -> Any:
    """The content of one YAML or JSON document, made of what JSON knows.

    Raises:
        BodyTooLargeError: more than ``max_bytes``.
        DocumentError: neither YAML nor JSON that can be read, a key that stands twice, anchors, nesting beyond reason,
            or a value that JSON does not know.
    """
    if len(raw) > max_bytes:
        raise BodyTooLargeError(f"a document of {len(raw)} bytes is more than the {max_bytes} that one may have")
    try:
        text = raw.decode("utf-8-sig")
        content = _parse_json(text) if text.lstrip().startswith("{") else None
        if content is None:
            content = _parse_yaml(text, most_nodes=max_bytes // NODE_BYTES)
        _check_count(content, max_bytes // NODE_BYTES)
        _check_plain(content, "", 0)
    except UnicodeDecodeError as error:
        raise DocumentError(f"the document is not UTF-8: byte {error.start}") from error
    except yaml.YAMLError as error:
        raise DocumentError(
            f"this is not YAML that can be read: {' '.join(str(error).split())[:_ERROR_SHOWN]}"
        ) from error
    except RecursionError as error:
        raise DocumentError(f"nested deeper than {MAX_DEPTH} levels") from error
    except (ValueError, OverflowError) as error:  # a date or number that YAML recognises and Python cannot hold
        raise DocumentError(f"this is not YAML that can be read: {error}") from error
    return content


def _parse_json(text: str) -> Any:
    """The content if it is JSON, else None. YAML takes most JSON, but not its escapes of letters beyond 16 bits."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_read_int)
    except json.JSONDecodeError:
        return None


def _read_int(digits: str) -> int | float:
    """Python makes no int of thousands of digits; as a float it is refused further on, where its path is known."""
    return int(digits) if len(digits) <= MAX_DIGITS else float(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    return mapping if len(mapping) == len(pairs) else _Doubled(pairs)


def _parse_yaml(text: str, *, most_nodes: int) -> Any:
    _check_events(text, most_nodes)
    loader = yaml.CSafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(node, "")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_count(content: Any, most: int) -> None:
    """DocumentError for more values than ``most``, before anything slower looks at them."""
    count, waiting = 1, [content]
    while waiting:
        part = waiting.pop()
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, (list, tuple)) else ()
        count += len(inner)
        if count > most:
            raise DocumentError(f"more than {most} values in one document")
        waiting += [one for one in inner if isinstance(one, (dict, list, tuple))]


def _check_plain(value: Any, path: str, depth: int) -> None:
    """DocumentError unless a value is made of what JSON and PostgreSQL can hold."""
    what = None
    if depth > MAX_DEPTH:
        what = f"nested deeper than {MAX_DEPTH} levels"
    elif isinstance(value, str):
        if "\0" in value or not _is_unicode(value):
            what = "a text that holds a NUL or half a character"
    elif isinstance(value, _Doubled):
        path, what = below(path, value.twice), "this key stands twice"
    elif isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise DocumentError(f"{path or 'the document'}: a key is text: quote it", param=path or None)
            _check_plain(name, path, depth)
            _check_plain(inner, below(path, name), depth + 1)
    elif isinstance(value, (list, tuple)):
        for at, inner in enumerate(value):
            _check_plain(inner, f"{path}[{at}]", depth + 1)
    elif isinstance(value, float):
        what = None if isfinite(value) and abs(value) < 2**63 else "not a number that JSON knows, below 2^63"
    elif isinstance(value, int):
        what = None if -(2**63) <= value < 2**63 else "a number beyond 64 bits"
    elif isinstance(value, datetime.date):
        what = "JSON knows no dates: put it in quotes"
    elif value is not None:
        what = f"a {type(value).__name__}, which JSON does not know"
    if what is not None:
        raise DocumentError(f"{path}: {what}" if path else what, param=path or None)


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _check_events(text: str, most_nodes: int) -> None:
    """Look at the events first: nothing recursive has run on them yet."""
    depth = nodes = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.NodeEvent):
            nodes += 1
            if event.anchor is not None:
                raise DocumentError(f"{_line(event)}: anchors and aliases are not taken: write it out")
            if nodes > most_nodes:
                raise DocumentError(f"{_line(event)}: more than {most_nodes} values in one document")
            if isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)) and event.tag is not None:
                raise DocumentError(f"{_line(event)}: tags are not taken: leave out {event.tag[:100]!r}")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            if depth > MAX_DEPTH:
                raise DocumentError(f"{_line(event)}: nested deeper than {MAX_DEPTH} levels")


def _check_node(node: yaml.Node, path: str) -> None:
    """DocumentError for keys that are no text or stand twice, and for numbers that take long to read."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.tag != _TEXT:
                raise DocumentError(f"{_line(key)}: the key {_shown(key)} is not text: quote it", param=path or None)
            inner = below(path, key.value)
            if key.value in seen:
                raise DocumentError(f"{inner}: this key stands twice, again in {_line(key)}", param=inner)
            seen.add(key.value)
            _check_node(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for at, value in enumerate(node.value):
            _check_node(value, f"{path}[{at}]")
    elif node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
        raise DocumentError(f"{path}: a number of more than {MAX_DIGITS} digits", param=path or None)


def _shown(key: yaml.Node) -> str:
    return repr(key.value[:100]) if isinstance(key, yaml.ScalarNode) else "here"


def _line(part: yaml.Event | yaml.Node) -> str:
    return f"line {part.start_mark.line + 1}" if part.start_mark is not None else "the document"


def read_model(document: Any, *, families: Collection[str] = ()) -> ModelSpec:
    """A model's document as its spec.

    Args:
        document: what ``parse`` gave, or any JSON content.
        families: names of the operator's own families besides the built-in ones.

    Raises:
        ConfigError: not a model; ``param`` is the field's path.
    """
    if not isinstance(document, dict):
        raise ConfigError("a model is a mapping of fields")
    spec = convert({**document, **left_open(document)}, ModelSpec)
    if not re.fullmatch(MODEL_ID, spec.id):
        raise ConfigError(f"id: {spec.id!r} holds a colon, which is kept for profiles", param="id")
    is_known = spec.family in FAMILIES or spec.family in families
    if not is_known and spec.unsupported is None:  # what is not served may be of a kind that nothing here runs
        known = sorted({*FAMILIES, *families})
        raise ConfigError(f"family: there is no {spec.family!r}{did_you_mean(spec.family, known)}", param="family")
    for field, is_wanted, why in (
        ("trust.remote_code", spec.trust.remote_code, "Farmhand runs no code of a repository: leave this out"),
        ("placement.sharing", not spec.placement.sharing, "models share devices: set workers aside with a pool"),
    ):
        if is_wanted:
            raise ConfigError(f"{field}: {why}", param=field)
    _check_lists(spec)
    for field, named, does in misfits(spec):
        raise ConfigError(f"{field}: the family `{spec.family}` has {', '.join(does)}, not {named!r}", param=field)
    return spec


def _check_lists(spec: ModelSpec) -> None:
    """ConfigError where a list of what a model does is empty or names one thing twice."""
    lists = {field: getattr(spec, field) for field in ("operations", "outputs", "inputs")}
    for name, profile in spec.profiles.items():
        if profile.outputs is not None:
            lists[f"{below('profiles', name)}.outputs"] = profile.outputs
    for field, named in lists.items():
        if len(set(named)) != len(named) or not named:
            raise ConfigError(f"{field}: names at least one, and none twice", param=field)


def convert(content: Any, kind: type[T], *, at: str = "") -> T:
    """Plain content as a struct of a spec; ConfigError with the field's path, below ``at``, if it is none."""
    _check_count(content, MAX_VALUES)
    _check_plain(content, at, 0)
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise refusal(error, content, kind, at) from error
