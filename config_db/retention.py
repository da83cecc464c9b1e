"""How long the past of the config DB is kept: the history by a setting, tombstones for as long as readers need them.

Every write purges some of what is due, in its own transaction and under the lock that it holds, so no janitor is needed
and a process that dies leaves nothing half purged. Of each model the last change stays for good: by it ``farmhand up``
knows what somebody else has changed, and ``auto`` what was deleted by hand. A reader whose epoch is purged reads all
anew.
"""

from datetime import timedelta
from typing import Annotated, Final

import msgspec
from sqlalchemy import delete, exists, func, or_, select
from sqlalchemy.orm import Session, aliased

from common.errors import NotFoundError
from common.logs import get_logger
from config_db.epochs import lock_epoch
from config_db.schema import ROWS, TOMBSTONE_KEPT, EpochRow, FarmEpoch, HistoryRow, SettingRow

log = get_logger("config_db")

SETTING: Final = "history.keep"
EPOCHS_AT_ONCE: Final = 200
"""A write purges at most so many epochs: more than it makes, and too few to be felt."""


class Keep(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of the setting: how old an epoch may become before it is purged."""

    days: Annotated[float, msgspec.Meta(gt=0, le=36_500)] = 90.0


def purge_some(session: Session, epoch: FarmEpoch) -> None:
    """Purge what is due, of the history at most ``EPOCHS_AT_ONCE`` epochs; ``epoch`` is locked."""
    for rows in ROWS.values():
        session.execute(delete(rows).where(rows.deleted_at < func.now() - TOMBSTONE_KEPT))
    _purge_history(session, epoch)


def prune(session: Session) -> int:
    """Purge all that is due; return the epoch with which the history now begins. The caller commits."""
    epoch = lock_epoch(session)
    begins = -1
    while begins != epoch.history_from:
        begins = epoch.history_from
        purge_some(session, epoch)
    return session.scalar(select(func.min(EpochRow.number)).where(EpochRow.number >= begins)) or 0


def check_kept(session: Session, epoch: int) -> None:
    """NotFoundError unless the history reaches back to this epoch."""
    begins = session.scalars(select(FarmEpoch.history_from)).one()
    if epoch < begins:
        message = f"the history begins with epoch {begins}: what is older, as epoch {epoch}, was purged ({SETTING})"
        raise NotFoundError(message, param="epoch")
    if session.scalar(select(EpochRow.number).where(EpochRow.number == epoch)) is None:
        raise NotFoundError(f"the history knows no epoch {epoch}", param="epoch")


def _purge_history(session: Session, epoch: FarmEpoch) -> None:
    keep = _keep(session)
    if keep is None:
        return
    oldest = (
        select(EpochRow.number, EpochRow.raised_at)
        .where(EpochRow.number >= epoch.history_from)
        .order_by(EpochRow.number)
        .limit(EPOCHS_AT_ONCE)
        .subquery()
    )
    is_due = (oldest.c.raised_at < func.now() - timedelta(days=keep.days), oldest.c.number < epoch.number)
    last = session.scalar(select(func.max(oldest.c.number)).where(*is_due))
    if last is None:
        return
    later = aliased(HistoryRow)
    is_changed_later = exists().where(
        later.kind == HistoryRow.kind, later.name == HistoryRow.name, later.id > HistoryRow.id
    )
    session.execute(
        delete(HistoryRow).where(HistoryRow.epoch <= last, or_(HistoryRow.kind != "model", is_changed_later))
    )
    is_needed = exists().where(HistoryRow.epoch == EpochRow.number)
    session.execute(delete(EpochRow).where(EpochRow.number <= last, ~is_needed))
    epoch.history_from = last + 1
    session.flush()
    log.info("history_purged", begins=epoch.history_from)


def _keep(session: Session) -> Keep | None:
    """The setting as it stands; None if it cannot be read, so that nothing is lost by a slip."""
    stands = select(SettingRow.spec).where(SettingRow.id == SETTING, SettingRow.deleted_at.is_(None))
    try:
        return msgspec.convert(session.scalar(stands) or {}, Keep)
    except msgspec.ValidationError as error:
        log.warning("setting_unreadable", setting=SETTING, error=str(error))
        return None
