"""What was changed, field by field, by whom and why: the history, newest first, and what differs between two epochs.

How many rows each epoch changed, in one cheap reading, is for ``epoch_entries``.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

import msgspec
from sqlalchemy import Text, cast, exists, func, literal, select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session

from config_db.diff import Difference, differences, is_same
from config_db.past import RESTORED, contents_at
from config_db.schema import EpochRow, FarmEpoch, HistoryRow, Kind

MOST_CHANGES: Final = 100
"""So many changes of one epoch are listed; an epoch of a whole catalogue has more."""
PAGE_BYTES: Final = 4 << 20
"""What the changes on one page held before and after, at most, as JSON; the first change is told however large."""
_SECRET: Final = frozenset(("secret_sha256",))


class RowChange(msgspec.Struct, frozen=True):
    """What became of one row, field by field."""

    kind: Kind
    name: str
    action: Literal["added", "changed", "removed"]
    fields: tuple[Difference, ...]


class HistoryEntry(msgspec.Struct, frozen=True):
    """One epoch. ``changes`` are its first ``MOST_CHANGES``, ``change_count`` says how many there are."""

    epoch: int
    epoch_id: UUID
    actor: str
    reason: str
    at: datetime
    change_count: int
    changes: tuple[RowChange, ...]


class HistoryPage(msgspec.Struct, frozen=True):
    """Some epochs, newest first; the next page is that before ``before``, None: this is the last one."""

    entries: tuple[HistoryEntry, ...]
    before: int | None


def last_changed_by_others(session: Session, kind: Kind, actor: str) -> set[str]:
    """Names of the rows of a kind, deleted ones too, whose last change was not ``actor``'s."""
    last = (
        select(HistoryRow.name, EpochRow.actor)
        .join(EpochRow, EpochRow.number == HistoryRow.epoch)
        .where(HistoryRow.kind == kind)
        .ext(distinct_on(HistoryRow.name))
        .order_by(HistoryRow.name, HistoryRow.id.desc())
        .subquery()
    )
    return set(session.scalars(select(last.c.name).where(last.c.actor != actor)))


def read_history(session: Session, *, limit: int, before: int | None = None, model: str | None = None) -> HistoryPage:
    """The last epochs, newest first; fewer than ``limit`` if what they changed fills a page (``PAGE_BYTES``).

    Args:
        session: the caller's.
        limit: of how many.
        before: only epochs older than this one.
        model: only epochs that changed this model; all that they changed is told.
    """
    begins = select(FarmEpoch.history_from).scalar_subquery()
    statement = select(EpochRow).where(EpochRow.number >= begins).order_by(EpochRow.number.desc()).limit(limit)
    if before is not None:
        statement = statement.where(EpochRow.number < before)
    if model is not None:
        is_of_model = (HistoryRow.epoch == EpochRow.number, HistoryRow.kind == "model", HistoryRow.name == model)
        statement = statement.where(exists().where(*is_of_model))
    epochs = session.scalars(statement).all()
    fitting = _fitting(session, [row.number for row in epochs])
    changes = _changes_of(session, [place.id for places in fitting.values() for place in places])
    entries = tuple(
        HistoryEntry(
            epoch=row.number,
            epoch_id=row.id,
            actor=row.actor,
            reason=row.reason,
            at=row.raised_at,
            change_count=fitting[row.number][0].total if fitting[row.number] else 0,
            changes=tuple(changes.get(row.number, ())),
        )
        for row in epochs
        if row.number in fitting
    )
    is_last = len(entries) == len(epochs) < limit
    return HistoryPage(entries, None if is_last or not entries else entries[-1].epoch)


def changes_between(session: Session, old: int, new: int) -> list[RowChange]:
    """What differs between the contents of two epochs, keys apart.

    Args:
        session: of a transaction in which every statement sees the same (REPEATABLE READ).
        old: an epoch.
        new: another, earlier or later.

    Raises:
        NotFoundError: there was no such epoch.
    """
    then, now = contents_at(session, old), contents_at(session, new)
    return [
        describe(kind, name, then[kind].get(name), now[kind].get(name))
        for kind in RESTORED
        for name in sorted({*then[kind], *now[kind]})
        if not is_same(then[kind].get(name), now[kind].get(name))
    ]


def describe(kind: Kind, name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> RowChange:
    """A row as it was and is; None: it was not, or is not, there. Secrets are left out."""
    action: Literal["added", "changed", "removed"] = "changed"
    if before is None or after is None:
        action = "added" if before is None else "removed"
    found = differences(before or {}, after or {})
    return RowChange(kind, name, action, tuple(one for one in found if one.path not in _SECRET))


def _fitting(session: Session, epochs: Sequence[int]) -> dict[int, list[Any]]:
    """The changes to tell of these epochs, newest first, until the page is full; the first epoch has one at least.

    Of each: ``epoch``, ``id``, ``size`` in bytes of JSON, and ``total``, the changes of its epoch.
    """
    place = func.row_number().over(partition_by=HistoryRow.epoch, order_by=HistoryRow.id).label("place")
    total = func.count().over(partition_by=HistoryRow.epoch).label("total")
    numbered = select(HistoryRow.id, place, total).where(HistoryRow.epoch.in_(epochs)).subquery()
    sides = (func.coalesce(func.octet_length(cast(side, Text)), 0) for side in (HistoryRow.before, HistoryRow.after))
    size = sum(sides, start=literal(0)).label("size")
    first = (
        select(HistoryRow.epoch, HistoryRow.id, size, numbered.c.total)
        .join(numbered, numbered.c.id == HistoryRow.id)
        .where(numbered.c.place <= MOST_CHANGES)
        .order_by(HistoryRow.epoch.desc(), HistoryRow.id)
    )
    by_epoch: dict[int, list[Any]] = {epoch: [] for epoch in epochs}
    for row in session.execute(first):
        by_epoch[row.epoch].append(row)
    fitting: dict[int, list[Any]] = {}
    left = PAGE_BYTES
    for epoch, rows in by_epoch.items():
        if fitting and sum(row.size for row in rows) > left:
            break
        fitting[epoch] = []
        for row in rows:
            if row.size > left and fitting[epoch]:
                break
            fitting[epoch].append(row)
            left -= row.size
    return fitting


def _changes_of(session: Session, ids: Collection[int]) -> dict[int, list[RowChange]]:
    """These changes, field by field, by epoch."""
    changes: dict[int, list[RowChange]] = defaultdict(list)
    columns = (HistoryRow.epoch, HistoryRow.kind, HistoryRow.name, HistoryRow.before, HistoryRow.after)
    for row in session.execute(select(*columns).where(HistoryRow.id.in_(ids)).order_by(HistoryRow.id)):
        changes[row.epoch].append(describe(row.kind, row.name, row.before, row.after))
    return changes
