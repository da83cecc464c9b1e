"""Specs as they stand in rows: more forgiving than documents, since another release may have written them."""

from collections.abc import Mapping
from functools import cache
from typing import Any, Final, TypeVar

import msgspec
from msgspec import inspect

from common.logs import get_logger
from config_db.families import left_open
from config_db.spec import ModelSpec

log = get_logger("config_db")
T = TypeVar("T", bound=msgspec.Struct)

_PLACED: Final = ("pinned", "preload", "machine_profiles")
"""Fields of the placement that stood at the top of a spec before there was one."""


def read_row(name: str, content: Mapping[str, Any]) -> ModelSpec:
    """A model's row as its spec. What a newer release has added is left out and named in the log.

    Raises:
        msgspec.ValidationError: the row makes no spec even so.
    """
    return read_row_as(ModelSpec, name, content)


def read_row_as(kind: type[T], name: str, content: Mapping[str, Any]) -> T:
    """Any row as a spec of its kind; fields that this release does not know are left out, however deep they stand.

    Raises:
        msgspec.ValidationError: the row makes no spec even so.
    """
    if not isinstance(content, Mapping):
        raise msgspec.ValidationError("what stands in the row is no mapping")
    content = _as_now(content) if kind is ModelSpec else content
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError:
        unknown: list[str] = []
        known = _known(content, _shape(kind), "", unknown)
        if not unknown:
            raise
        read = msgspec.convert(known, kind)
        log.warning("row_newer", kind=kind.__name__, row=name, left_out=unknown)
        return read


def read_rows(kind: type[T], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, T]:
    """The specs of many rows by name; one that this release cannot read is left out and named in the log."""
    specs = {}
    for name, content in rows.items():
        try:
            specs[name] = read_row_as(kind, name, content)
        except msgspec.ValidationError as error:
            log.warning("row_unreadable", kind=kind.__name__, row=name, error=str(error))
    return specs


def newer_fields(kind: type[msgspec.Struct], content: Mapping[str, Any]) -> list[str]:
    """Paths of the fields that this release does not know, and that the readers here leave out."""
    unknown: list[str] = []
    _known(_as_now(content) if kind is ModelSpec else content, _shape(kind), "", unknown)
    return unknown


def _as_now(content: Mapping[str, Any]) -> dict[str, Any]:
    """A model's row as this release writes it."""
    spec = dict(content)
    placed = {field: spec.pop(field) for field in _PLACED if field in spec}
    if placed and isinstance(spec.get("placement", {}), Mapping):
        spec["placement"] = {**placed, **spec.get("placement", {})}
    return {**spec, **left_open(spec)}


@cache
def _shape(kind: type[msgspec.Struct]) -> inspect.Type:
    return inspect.type_info(kind)


def _known(content: Any, shape: inspect.Type, at: str, unknown: list[str]) -> Any:
    """What ``shape`` has a place for; the path of everything else goes to ``unknown``."""
    while isinstance(shape, inspect.Metadata):
        shape = shape.type
    if isinstance(shape, inspect.UnionType):
        parts = [part for part in shape.types if isinstance(part, (inspect.StructType, inspect.DictType))]
        return _known(content, parts[0], at, unknown) if len(parts) == 1 else content
    if not isinstance(content, Mapping):
        return content
    if isinstance(shape, inspect.DictType):
        values = shape.value_type
        return {name: _known(value, values, f"{at}.{name}".lstrip("."), unknown) for name, value in content.items()}
    if not isinstance(shape, inspect.StructType):
        return content
    fields = {field.encode_name: field.type for field in shape.fields}
    unknown += [f"{at}.{name}".lstrip(".") for name in content if name not in fields]
    return {
        name: _known(value, fields[name], f"{at}.{name}".lstrip("."), unknown)
        for name, value in content.items()
        if name in fields
    }
