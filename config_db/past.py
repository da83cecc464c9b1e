"""The past of the config DB: what stood in it as of an epoch, and the way back to that."""

from collections.abc import Collection, Sequence
from typing import Any, Final, cast

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.orm import Session

from config_db.epochs import lock_epoch
from config_db.owners import belongs_in_files, check_owners
from config_db.publish import Delete, Published, Put, live, publish
from config_db.retention import check_kept
from config_db.schema import HistoryRow, Kind, ModelRow, Origin

RESTORED: Final[Sequence[Kind]] = ("setting", "tenant", "pool", "model")
"""What a rollback brings back. Never keys: one that was revoked stays so."""


def contents_at(
    session: Session, epoch: int, kinds: Sequence[Kind] = RESTORED
) -> dict[Kind, dict[str, dict[str, Any]]]:
    """What stood in the tables as of an epoch: today's rows, and of those changed since, what the first change found.

    Raises:
        NotFoundError: there was no such epoch, or the history reaches no longer back to it.
    """
    check_kept(session, epoch)
    contents = {kind: live(session, kind) for kind in kinds}
    first_since = (
        select(HistoryRow.kind, HistoryRow.name, HistoryRow.before)
        .where(HistoryRow.epoch > epoch, HistoryRow.kind.in_(list(kinds)))
        .ext(distinct_on(HistoryRow.kind, HistoryRow.name))
        .order_by(HistoryRow.kind, HistoryRow.name, HistoryRow.id)
    )
    for kind, name, before in session.execute(first_since):
        if before is None:
            contents[cast("Kind", kind)].pop(name, None)
        else:
            contents[cast("Kind", kind)][name] = before
    return contents


def rollback(session: Session, to: int, *, actor: str, reason: str, expected: int | None = None) -> Published:
    """A new epoch with the contents of an old one, as far as they are the operator's (``undoing``).

    Raises:
        NotFoundError: there was no such epoch.
        EpochConflictError: as ``publish``.
        ConfigError: a pool or a usable key would be of a tenant that is not there.
    """
    lock_epoch(session)
    published = publish(session, undoing(session, to), actor=actor, reason=reason, expected=expected)
    check_owners(session, published.changes)
    return published


def undoing(session: Session, to: int) -> list[Put | Delete]:
    """The writes that bring back the contents of an epoch; NotFoundError if there was no such epoch.

    Left as they are: keys, pools that their clients hold under leases, and models that were registered from the Hub
    since because somebody asked for them.
    """
    writes: list[Put | Delete] = []
    for kind, contents in contents_at(session, to).items():
        then = {name: content for name, content in contents.items() if belongs_in_files(kind, content)}
        now = live(session, kind)
        origins = _origins(session, {*then, *now}) if kind == "model" else {}
        for name, content in now.items():
            if not belongs_in_files(kind, content):
                then.pop(name, None)
            elif name not in then and origins.get(name) != "auto":
                writes.append(Delete(kind, name))
        writes += [Put(kind, name, content, origins.get(name, "api")) for name, content in then.items()]
    return writes


def _origins(session: Session, names: Collection[str]) -> dict[str, Origin]:
    """How models came here, deleted ones too as long as their tombstones stand."""
    rows = session.execute(select(ModelRow.id, ModelRow.origin).where(ModelRow.id.in_(names)))
    return {name: cast("Origin", origin) for name, origin in rows}
