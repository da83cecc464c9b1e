"""Every change of the config DB, of whatever kind: one transaction, one new epoch, one line of history a row.

``publish`` is the only writer of the tables that readers fetch. It locks the epoch row first, so writers queue there
and each sees what the one before has committed; the caller's commit makes all of it true at once, or none. What stood
there before, and the way back to it, is for ``past``; how long that is kept, for ``retention``.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final
from uuid import UUID

import msgspec
from sqlalchemy import func, insert, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from common.errors import ConfigError, EpochConflictError
from config_db.diff import is_same
from config_db.epochs import lock_epoch, raise_epoch
from config_db.retention import purge_some
from config_db.schema import ROWS, HistoryRow, Kind, ModelRow, Origin

CHANNEL: Final = "farmhand_epoch"
"""NOTIFY channel on which each new epoch's number is told when its transaction commits."""


class Put(msgspec.Struct, frozen=True):
    """Add or replace one row. ``spec`` is its content as plain JSON; ``origin`` is a model's."""

    kind: Kind
    name: str
    spec: dict[str, Any]
    origin: Origin = "api"


class Delete(msgspec.Struct, frozen=True):
    """Take one row away; its tombstone stays for readers."""

    kind: Kind
    name: str


class Change(msgspec.Struct, frozen=True):
    """What one row was and is; None: it was not, or is not, there."""

    kind: Kind
    name: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class Published(msgspec.Struct, frozen=True):
    """The epoch after a write; it is a new one only if there are ``changes``."""

    epoch: int
    epoch_id: UUID
    changes: tuple[Change, ...]


def publish(
    session: Session,
    writes: Iterable[Put | Delete],
    *,
    actor: str,
    reason: str,
    expected: int | None = None,
) -> Published:
    """Make the tables say what ``writes`` say, all of them or none. What already stands so is no change.

    Args:
        session: the caller's; the caller commits.
        writes: at most one a row; of two, the later counts.
        actor: who changes it, for the history.
        reason: why, for the history.
        expected: the epoch that the caller has read.

    Raises:
        EpochConflictError: something else was published since ``expected``.
        ConfigError: two models would share a name.
    """
    current = lock_epoch(session)
    check_expected(current.number, expected)
    wanted = {(write.kind, write.name): write for write in writes}
    changes = _changes(session, wanted)
    if not changes:
        return Published(current.number, current.id, ())
    if any(change.kind == "model" and change.after is not None for change in changes):
        _check_names(session, {change.name: change.after for change in changes if change.kind == "model"})
    epoch = raise_epoch(session, current, actor=actor, reason=reason)
    _write_rows(session, epoch, changes, wanted)
    session.execute(
        insert(HistoryRow),
        [
            {"epoch": epoch, "kind": change.kind, "name": change.name, "before": change.before, "after": change.after}
            for change in changes
        ],
    )
    purge_some(session, current)
    session.execute(text("select pg_notify(:channel, :epoch)"), {"channel": CHANNEL, "epoch": str(epoch)})
    return Published(epoch, current.id, tuple(changes))


def check_expected(epoch: int, expected: int | None) -> None:
    """EpochConflictError if the present epoch is not the one that a writer has read."""
    if expected is not None and epoch != expected:
        raise EpochConflictError(
            f"the config DB is at epoch {epoch}, not {expected}: read it again and repeat your change",
            details={"expected": expected, "current": epoch},
        )


def planned(session: Session, writes: Iterable[Put | Delete]) -> tuple[Change, ...]:
    """What ``publish`` would change now; nothing is written.

    Raises:
        ConfigError: as ``publish``.
    """
    changes = _changes(session, {(write.kind, write.name): write for write in writes})
    _check_names(session, {change.name: change.after for change in changes if change.kind == "model"})
    return tuple(changes)


def live(session: Session, kind: Kind, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """The content of every row of a kind that is not deleted, or of those named, by name."""
    rows = ROWS[kind]
    statement = select(rows.id, rows.spec).where(rows.deleted_at.is_(None)).order_by(rows.id)
    if names is not None:  # others are no row's, and PostgreSQL takes no text with a NUL or half a character
        statement = statement.where(rows.id.in_([name for name in names if name.isprintable()]))
    return {row.id: row.spec for row in session.execute(statement)}


def _changes(session: Session, wanted: Mapping[tuple[Kind, str], Put | Delete]) -> list[Change]:
    present = {
        kind: live(session, kind, [name for other, name in wanted if other == kind])
        for kind in {kind for kind, _ in wanted}
    }
    changes = []
    for (kind, name), write in wanted.items():
        before = present[kind].get(name)
        after = write.spec if isinstance(write, Put) else None
        if not is_same(before, after):
            changes.append(Change(kind, name, before, after))
    return changes


def _write_rows(
    session: Session, epoch: int, changes: Sequence[Change], wanted: Mapping[tuple[Kind, str], Put | Delete]
) -> None:
    for kind in {change.kind for change in changes}:
        rows = ROWS[kind]
        values: list[dict[str, Any]] = []
        gone: list[str] = []
        for change in changes:
            if change.kind != kind:
                continue
            write = wanted[kind, change.name]
            if isinstance(write, Delete):
                gone.append(change.name)
                continue
            value = {"id": change.name, "spec": change.after, "epoch": epoch, "deleted_at": None}
            values.append({**value, "origin": write.origin} if kind == "model" else value)
        if values:
            statement = upsert(rows)
            replaced = {name: statement.excluded[name] for name in values[0] if name != "id"}
            session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=replaced), values)
        if gone:
            gravestone = update(rows).where(rows.id.in_(gone)).values(epoch=epoch, deleted_at=func.clock_timestamp())
            session.execute(gravestone, execution_options={"synchronize_session": False})


def _check_names(session: Session, changed: Mapping[str, Mapping[str, Any] | None]) -> None:
    """ConfigError if an alias is another model's id or alias."""
    named: dict[str, list[str]] = {
        name: aliases or []
        for name, aliases in session.execute(
            select(ModelRow.id, ModelRow.spec["aliases"]).where(ModelRow.deleted_at.is_(None))
        )
    }
    for name, spec in changed.items():
        if spec is None:
            named.pop(name, None)
        else:
            named[name] = spec.get("aliases") or []
    owners = {name: name for name in named}
    for name, aliases in named.items():
        for alias in aliases:
            owner = owners.setdefault(alias, name)
            if owner != name:
                raise _name_taken(alias, name, owner, changed)


def _name_taken(alias: str, name: str, owner: str, changed: Mapping[str, object]) -> ConfigError:
    """What to tell whoever writes one of two models that would share a name: of the model that they write, if any."""
    if name not in changed and owner not in changed:  # rows of another release
        return ConfigError(f"model {name!r}: the alias {alias!r} is a name of model {owner!r} already")
    if name in changed or alias != owner:
        written, other = (name, owner) if name in changed else (owner, name)
        message = f"model {written!r}: the alias {alias!r} is a name of model {other!r} already"
        return ConfigError(message, param="aliases")
    return ConfigError(f"model {owner!r}: its id is an alias of model {name!r} already", param="id")
