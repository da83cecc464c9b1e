"""What has happened to the config DB: each epoch, who raised it and why, and how many rows it changed."""

from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, case, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from config_db.schema import EpochRow, FarmEpoch, HistoryRow


class EpochEntry(msgspec.Struct, frozen=True):
    """One epoch; ``at`` has a zone. The counts are rows of all kinds."""

    epoch: int
    at: datetime
    actor: str
    reason: str
    added: int
    changed: int
    removed: int


def latest_epochs(session: Session, *, limit: int) -> list[EpochEntry]:
    """The newest epochs, newest first, as far back as the history is kept."""
    was, is_there = _is_there(HistoryRow.before), _is_there(HistoryRow.after)
    begins = select(FarmEpoch.history_from).scalar_subquery()
    newest = select(EpochRow.number).where(EpochRow.number >= begins).order_by(EpochRow.number.desc()).limit(limit)
    statement = (
        select(
            EpochRow.number,
            EpochRow.raised_at,
            EpochRow.actor,
            EpochRow.reason,
            func.count(case((~was & is_there, 1))),
            func.count(case((was & is_there, 1))),
            func.count(case((was & ~is_there, 1))),
        )
        .outerjoin(HistoryRow, HistoryRow.epoch == EpochRow.number)
        .where(EpochRow.number.in_(newest))
        .group_by(EpochRow.number)
        .order_by(EpochRow.number.desc())
    )
    return [EpochEntry(*row) for row in session.execute(statement)]


def _is_there(content: InstrumentedAttribute[Any]) -> ColumnElement[bool]:
    """Whether a row was, or is, there; what is not may stand as JSON's null."""
    return func.coalesce(func.jsonb_typeof(content), "null") != "null"
