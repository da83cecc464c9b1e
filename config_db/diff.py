"""What differs between two contents of a row, field by field."""

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from config_db.field_paths import below


class Difference(msgspec.Struct, frozen=True):
    """One field that differs: its path as a document's reader would write it, as ``limits.max_items``.

    Unset: the field was not there, or is not any more; what the model's files or the defaults say holds.
    """

    path: str
    old: Any | UnsetType = UNSET
    new: Any | UnsetType = UNSET


def differences(old: Mapping[str, Any], new: Mapping[str, Any], *, at: str = "") -> list[Difference]:
    """Every field that differs, in alphabetical order of each level; mappings field by field, lists as a whole."""
    found: list[Difference] = []
    for name in sorted({*old, *new}):
        path = below(at, name)
        before, after = old.get(name, UNSET), new.get(name, UNSET)
        if all(isinstance(one, (Mapping, UnsetType)) for one in (before, after)) and (before or after):
            found += differences(before or {}, after or {}, at=path)
        elif not is_same(before, after):
            found.append(Difference(path, before, after))
    return found


def is_same(one: Any, other: Any) -> bool:
    """Whether two JSON contents say the same; unlike ``==``, true is not 1. A number is the same however it is written.

    PostgreSQL gives back a float such as 1e23 as the integer of the same digits.
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(is_same(value, other[name]) for name, value in one.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, float) and isinstance(other, int):
        return _is_written_as(one, other)
    if isinstance(one, int) and isinstance(other, float):
        return _is_written_as(other, one)
    return bool(one == other)


def _is_written_as(number: float, digits: int) -> bool:
    try:
        return number == float(digits)
    except OverflowError:
        return False
