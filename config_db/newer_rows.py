"""What the config DB says now: the present epoch, and the rows that are newer than what is held already."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final
from uuid import UUID

import msgspec
from sqlalchemy import (
    BigInteger,
    Connection,
    DateTime,
    Select,
    String,
    bindparam,
    cast,
    func,
    literal,
    null,
    select,
    union_all,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import aliased

from common.logs import get_logger
from config_db.access import KeySpec, PoolSpec, TenantSpec
from config_db.rows import read_row, read_row_as
from config_db.schema import ROWS, TOMBSTONE_KEPT, EpochRow, FarmEpoch, Kind, ModelRow
from config_db.snapshot import EMPTY, Snapshot

log = get_logger("config_db")

_HELD: Final = bindparam("epoch", type_=BigInteger)
PRESENT: Final = select(FarmEpoch.number, FarmEpoch.id).where(FarmEpoch.only_one == 1)
"""The poll: one row, by its primary key."""
_SINCE: Final = aliased(EpochRow)
_KEEPS_TOMBSTONES: Final = (
    select(func.greatest(func.now(), func.max(_SINCE.raised_at)) - func.min(_SINCE.raised_at) < TOMBSTONE_KEPT)
    .where(_SINCE.number >= _HELD)
    .scalar_subquery()
)
"""Whether no clock that stamped an epoch since ``epoch`` was so far from another that a tombstone may be gone."""
FIELDS: Final[Mapping[Kind, str]] = MappingProxyType(
    {"model": "models", "pool": "pools", "tenant": "tenants", "key": "keys", "setting": "settings"}
)
"""Where a snapshot holds each kind."""
UNREADABLE: Final = (msgspec.ValidationError, TypeError, ValueError)
"""What ``read_spec`` raises for content that this release cannot read."""


def _rows(kind: Kind) -> Select[Any]:
    rows = ROWS[kind]
    origin = ModelRow.origin if rows is ModelRow else cast(null(), String).label("origin")
    return select(literal(kind).label("kind"), rows.id, rows.spec, origin, rows.epoch, rows.deleted_at)


_EPOCH: Final = "epoch"
"""The kind of the row that tells the present epoch; as its content, the id that history knows for the one that is held:
none if tombstones since that may be gone already."""
_ID_THEN: Final = select(EpochRow.id).where(EpochRow.number == _HELD, _KEEPS_TOMBSTONES).scalar_subquery()
_EPOCH_ROW: Final = select(
    literal(_EPOCH).label("kind"),
    cast(FarmEpoch.id, String).label("id"),
    func.to_jsonb(cast(_ID_THEN, String), type_=JSONB).label("spec"),
    cast(null(), String).label("origin"),
    FarmEpoch.number.label("epoch"),
    cast(null(), DateTime(timezone=True)).label("deleted_at"),
).where(FarmEpoch.only_one == 1)
NEWER: Final = union_all(_EPOCH_ROW, *(_rows(kind).where(ROWS[kind].epoch > _HELD) for kind in ROWS))
"""The present epoch, and the rows of all kinds changed since ``epoch``, tombstones included: one statement, so that all
of it is of one instant without a transaction around it."""
LIVING: Final = union_all(*(_rows(kind).where(ROWS[kind].deleted_at.is_(None)) for kind in ROWS))
"""The rows of all kinds that are not deleted."""


def read_newer(connection: Connection, held: Snapshot) -> Snapshot | None:
    """The present snapshot, of what is newer than ``held``; what has not changed is the same object in both.

    None if what is held is not of the past of this very database, or so old that deletions since may be forgotten.
    """
    rows = connection.execute(NEWER, {"epoch": held.epoch}).all()
    (present,) = (row for row in rows if row.kind == _EPOCH)
    if present.spec != str(held.epoch_id):
        return None
    return _laid_over(held, (row for row in rows if row is not present), present.epoch, UUID(present.id))


def read_whole(connection: Connection) -> Snapshot:
    """The present snapshot, all of it anew.

    Args:
        connection: in a transaction in which every statement sees the same (REPEATABLE READ).
    """
    number, epoch_id = connection.execute(PRESENT).one()
    return _laid_over(EMPTY, connection.execute(LIVING), number, epoch_id)


def read_spec(kind: Kind, name: str, content: Mapping[str, Any]) -> Any:
    """The content of a row as what a snapshot holds; raises one of ``UNREADABLE`` if this release cannot read it."""
    match kind:
        case "model":
            return read_row(name, content)
        case "pool":
            return read_row_as(PoolSpec, name, content)
        case "tenant":
            return read_row_as(TenantSpec, name, content)
        case "key":
            return msgspec.convert(content, KeySpec)  # what cannot be read in full may be a restriction
        case "setting":
            return dict(content)


def _laid_over(base: Snapshot, rows: Iterable[Any], number: int, epoch_id: UUID) -> Snapshot:
    """The snapshot of an epoch: ``base`` with these rows laid over it."""
    parts: dict[str, dict[str, Any]] = {}

    def part(field: str) -> dict[str, Any]:
        if field not in parts:
            parts[field] = dict(getattr(base, field))
        return parts[field]

    for kind, name, content, origin, epoch, deleted_at in rows:
        held = part(FIELDS[kind])
        if deleted_at is not None:
            held.pop(name, None)
            if kind == "model":
                part("origins").pop(name, None)
            continue
        if kind == "model":
            part("origins")[name] = origin
        try:
            held[name] = read_spec(kind, name, content)
        except UNREADABLE as error:
            # a model goes on as it was; a key may have been restricted, so it opens nothing any more
            if kind == "key":
                held.pop(name, None)
            log.warning("row_unreadable", kind=kind, row=name, epoch=epoch, error=str(error))
    changed = {field: MappingProxyType(content) for field, content in parts.items()}
    return msgspec.structs.replace(base, epoch=number, epoch_id=epoch_id, **changed)
