"""What a document is refused for: the path of the field, what is wrong with it, and the nearest right word."""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final

import msgspec
from msgspec import inspect

from common.errors import ConfigError
from config_db.field_paths import below, joined
from config_db.spec import PATTERNS_IN_WORDS, FieldError

MESSAGE_SHOWN: Final = 300
WORD_SHOWN: Final = 100
_UNKNOWN: Final = re.compile(r"unknown field `(.*)`", re.DOTALL)
_MISSING: Final = re.compile(r"missing required field `(\w+)`")
_NO_CHOICE: Final = re.compile(r"Invalid enum value '(.*)'", re.DOTALL)
_PATTERN: Final = re.compile(r"matching regex ('.*')$")
_WORDS: Final = {repr(pattern): words for pattern, words in PATTERNS_IN_WORDS.items()}
_STEP: Final = re.compile(r"\.?([^.\[\]]+)|\[(\d+)\]|(\[\.\.\.\])")


def refusal(error: msgspec.ValidationError, content: Any, kind: type[Any], at: str) -> ConfigError:
    """The error for ``content``, which stands at the path ``at`` and is no ``kind``."""
    what, _, where = str(error).partition(" - at ")
    is_key = where.startswith("`key`")
    found = re.search(r"`\$(.*)`$", where)
    steps = list(_steps(found[1] if found else "", content, kind))
    path = ""
    for step in steps:
        path = f"{path}[{step}]" if isinstance(step, int) else below(path, step)
    shape = _shape_at(inspect.type_info(kind), steps)
    unknown, missing, no_choice = _UNKNOWN.search(what), _MISSING.search(what), _NO_CHOICE.search(what)
    if unknown is not None:
        what = f"there is no field `{unknown[1][:WORD_SHOWN]}`{_nearest_field(unknown[1], shape)}"
        path = below(path, unknown[1])
    elif missing is not None:
        what, path = "this field is required", below(path, missing[1])
    elif no_choice is not None:
        choices = _choices(shape.key_type if is_key and isinstance(shape, inspect.DictType) else shape)
        what = f"{no_choice[1][:WORD_SHOWN]!r} is no choice{did_you_mean(no_choice[1], choices)}"
    elif isinstance(error.__cause__, FieldError):
        path = joined(path, error.__cause__.field)
    else:
        what = in_words(what)
        what = what[:1].lower() + what[1:MESSAGE_SHOWN]
    path = joined(at, path)
    return ConfigError(f"{path}: {what}" if path else what, param=path or None)


def in_words(what: str) -> str:
    """A complaint of msgspec, which shows its own patterns, in words for whoever sent the text."""
    found = _PATTERN.search(what)
    words = _WORDS.get(found[1]) if found is not None else None
    return f"Expected {words}" if words is not None else what


def did_you_mean(word: str, known: Collection[str]) -> str:
    """The nearest of what is known, or all of it, as the end of a message."""
    nearest = difflib.get_close_matches(word[:WORD_SHOWN], known, 1, 0.5)
    return f"; did you mean `{nearest[0]}`?" if nearest else (f"; known are {', '.join(known)}" if known else "")


def _nearest_field(word: str, holder: inspect.Type) -> str:
    if not isinstance(holder, inspect.StructType):
        return ""
    deeper = [
        f"{field.name}.{inner.name}"
        for field in holder.fields
        if isinstance(part := _bare(field.type), inspect.StructType)
        for inner in part.fields
        if inner.name == word
    ]
    return f"; did you mean `{deeper[0]}`?" if deeper else did_you_mean(word, [field.name for field in holder.fields])


def _choices(shape: inspect.Type) -> list[str]:
    return [str(value) for value in shape.values] if isinstance(shape, inspect.LiteralType) else []


def _steps(path: str, content: Any, kind: type[Any]) -> Iterator[str | int]:
    """The steps of msgspec's path; where it says ``[...]`` for the values of a mapping, the name of the bad one."""
    part = content
    seen: list[str | int] = []
    for field, place, _ in _STEP.findall(path):
        step = field or (int(place) if place else _bad_name(content, kind, path, seen, part))
        seen.append(step)
        part = part[step]
        yield step


def _bad_name(content: Any, kind: type[Any], path: str, seen: list[str | int], mapping: Mapping[str, Any]) -> str:
    """The name whose value alone makes for the same complaint, found by halving what it is looked for in."""
    names = list(mapping)
    while len(names) > 1:
        half = names[: len(names) // 2]
        is_there = _complains(_with(content, seen, {name: mapping[name] for name in half}), kind, path)
        names = half if is_there else names[len(half) :]
    return names[0]


def _complains(content: Any, kind: type[Any], path: str) -> bool:
    try:
        msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        return str(error).endswith(f"`${path}`")
    return False


def _with(content: Any, steps: list[str | int], part: Any) -> Any:
    """A copy of ``content`` with ``part`` in the place that the steps lead to."""
    if not steps:
        return part
    copy: Any = dict(content) if isinstance(content, Mapping) else list(content)
    copy[steps[0]] = _with(content[steps[0]], steps[1:], part)
    return copy


def _bare(shape: inspect.Type) -> inspect.Type:
    """The one type of a field besides None."""
    while isinstance(shape, (inspect.Metadata, inspect.UnionType)):
        if isinstance(shape, inspect.Metadata):
            shape = shape.type
        else:
            shape = next(part for part in shape.types if not isinstance(part, inspect.NoneType))
    return shape


def _shape_at(shape: inspect.Type, steps: list[str | int]) -> inspect.Type:
    """The type of what the steps lead to."""
    shape = _bare(shape)
    for step in steps:
        if isinstance(shape, inspect.StructType):
            shape = _bare(next(field.type for field in shape.fields if field.encode_name == step))
        elif isinstance(shape, inspect.DictType):
            shape = _bare(shape.value_type)
        elif isinstance(shape, (inspect.VarTupleType, inspect.ListType)):
            shape = _bare(shape.item_type)
    return shape
