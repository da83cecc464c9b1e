"""The epoch: one number that rises with every change, so that readers know cheaply whether they are up to date."""

from typing import Any
from uuid import uuid4

from sqlalchemy import select
from sqlalchemy.orm import Session

from common.errors import EpochConflictError
from config_db.schema import EpochRow, FarmEpoch, HistoryRow


def advance_epoch(session: Session, *, actor: str, reason: str, expected: int | None = None) -> int:
    """Lock the epoch, raise it by one and return it. Concurrent writers queue here until the caller commits.

    Raises:
        EpochConflictError: ``expected`` is given and is not the current epoch.
    """
    epoch = _locked(session)
    if expected is not None and epoch.number != expected:
        raise EpochConflictError(
            f"the config DB is at epoch {epoch.number}, not {expected}: read it again and repeat your change",
            details={"expected": expected, "current": epoch.number},
        )
    epoch.number += 1
    epoch.id = uuid4()
    session.add(EpochRow(number=epoch.number, id=epoch.id, actor=actor, reason=reason))
    session.flush()
    return epoch.number


def lock_epoch(session: Session) -> int:
    """Lock the epoch without raising it, and return it: nobody else changes anything until the caller is done."""
    return _locked(session).number


def remember(
    session: Session, *, epoch: int, kind: str, name: str, before: dict[str, Any] | None, after: dict[str, Any] | None
) -> None:
    """Append one change to the history."""
    session.add(HistoryRow(epoch=epoch, kind=kind, name=name, before=before, after=after))


def _locked(session: Session) -> FarmEpoch:
    # populate_existing: a session that had read the row before would otherwise keep the number it saw then
    return session.scalars(select(FarmEpoch).with_for_update(), execution_options={"populate_existing": True}).one()
