"""Changes of the config DB as a person reads them: what is added, what changes field by field, what goes away."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import msgspec
from msgspec import UNSET

from cli.screen import Screen
from config_db.history import RowChange, describe
from config_db.publish import Change
from config_db.schema import Kind

_SIGNS: Final = {"added": ("+", "green"), "changed": ("~", "yellow"), "removed": ("-", "red")}
_KINDS: Final[Sequence[Kind]] = ("model", "pool", "tenant", "key", "setting")


def described(changes: Iterable[Change]) -> list[RowChange]:
    """Field by field."""
    return [describe(change.kind, change.name, change.before, change.after) for change in changes]


def show(screen: Screen, changes: Sequence[RowChange]) -> None:
    """``+`` added, ``~`` changed with each field, ``-`` removed; by kind and name."""
    for line, style in _lines(_sorted(changes)):
        screen.say(line, style=style)


def planned(changes: Sequence[RowChange]) -> str:
    """How many of each there would be."""
    added, changed, removed = counts(changes)
    return f"{added} to add, {changed} to change, {removed} to remove"


def counts(changes: Sequence[RowChange]) -> tuple[int, int, int]:
    """How many are added, changed and removed."""
    actions = [change.action for change in changes]
    return actions.count("added"), actions.count("changed"), actions.count("removed")


def as_json(changes: Sequence[RowChange], **beside: int) -> str:
    """The same for programs; ``beside`` says which epochs are compared."""
    added, changed, removed = counts(changes)
    content = {
        **beside,
        "add": added,
        "change": changed,
        "remove": removed,
        "changes": msgspec.to_builtins(_sorted(changes)),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _sorted(changes: Sequence[RowChange]) -> list[RowChange]:
    return sorted(changes, key=lambda change: (_KINDS.index(change.kind), change.name))


def _lines(changes: Sequence[RowChange]) -> Iterator[tuple[str, str]]:
    for change in changes:
        sign, style = _SIGNS[change.action]
        yield f"{sign} {change.kind} {change.name}{_in_short(change)}", style
        for field in change.fields:
            if change.action == "changed":
                yield f"    {field.path}: {_shown(field.old)} -> {_shown(field.new)}", style
            elif change.action == "added" and change.kind != "model":  # of a model, a line says the most of it
                yield f"    {field.path}: {_shown(field.new)}", style


def _in_short(change: RowChange) -> str:
    """What a new model is, and where it comes from."""
    if change.kind != "model" or change.action != "added":
        return ""
    new = {field.path: field.new for field in change.fields}
    place = new.get("source.path") or new.get("source.bucket")
    if place is None:
        place = f"hub:{new.get('source.hub')}@{new.get('source.revision', 'main')}"
    return f" ({new.get('family')}, {place})"


def _shown(value: Any) -> str:
    if value is UNSET:
        return "(unset)"
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)
