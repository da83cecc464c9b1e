"""The epoch: one number that rises with every change, so that readers know cheaply whether they are up to date."""

from typing import Final
from uuid import UUID, uuid4

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from config_db.schema import EpochRow, FarmEpoch

IDLE_S: Final = 60
"""A writer that holds the lock and is silent for so long is taken to be gone: its transaction is ended."""


def lock_epoch(session: Session) -> FarmEpoch:
    """Lock the epoch and return it: nobody else changes anything until the caller's transaction ends.

    It ends in any case once the caller has said nothing for ``IDLE_S``: PostgreSQL learns of a writer's power cut or
    frozen process by no other means, and everybody else would wait for its lock.
    """
    session.execute(select(func.set_config("idle_in_transaction_session_timeout", f"{IDLE_S}s", True)))
    # populate_existing: a session that had read the row before would otherwise keep the number it saw then
    return session.scalars(select(FarmEpoch).with_for_update(), execution_options={"populate_existing": True}).one()


def raise_epoch(session: Session, epoch: FarmEpoch, *, actor: str, reason: str) -> int:
    """Raise the locked epoch by one, under a random id of its own, and return its number."""
    epoch.number += 1
    epoch.id = uuid4()
    # the clock, not now(): a transaction may have begun long before it got the lock, and epochs are told in order
    at = func.clock_timestamp()
    session.add(EpochRow(number=epoch.number, id=epoch.id, actor=actor, reason=reason, raised_at=at))
    session.flush()
    return epoch.number


def epoch_now(session: Session) -> tuple[int, UUID]:
    """Number and random id of the present epoch."""
    number, epoch_id = session.execute(select(FarmEpoch.number, FarmEpoch.id)).one()
    return number, epoch_id
