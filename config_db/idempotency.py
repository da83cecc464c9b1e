"""Answers to config writes that named an idempotency key: the same write again is answered alike and done once.

The answer is written in the transaction of the change itself, so that either both stand or neither; a second writer
with the same key waits at the row until the first has ended.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Final

import msgspec
from sqlalchemy import delete, func, select, tuple_
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from common.errors import IdempotencyError
from config_db.schema import IdempotencyRow

KEPT: Final = timedelta(hours=24)
PURGED_AT_ONCE: Final = 1000


class Answer(msgspec.Struct, frozen=True):
    """An answer as it went over the wire; ``is_replayed``: it is that of an earlier write."""

    status: int
    body: bytes
    is_replayed: bool = False


def once(session: Session, *, scope: str, key: str, request: bytes, write: Callable[[], Answer]) -> Answer:
    """The answer of ``write``, which runs only if nobody wrote under this key before. An error of it is not kept.

    Args:
        session: the caller's; the caller commits.
        scope: who writes; keys of others are other keys.
        key: the idempotency key.
        request: a digest of what is asked for.
        write: makes the change in ``session``.

    Raises:
        IdempotencyError: the key was used for another request.
    """
    if not _claim(session, scope, key, request):
        return _stored(session, scope, key, request)
    answer = write()
    row = session.get_one(IdempotencyRow, (scope, key))
    row.status, row.answer = answer.status, answer.body
    _purge(session)
    return answer


def _claim(session: Session, scope: str, key: str, request: bytes) -> bool:
    """Take the key, also one whose time is over; false if it is taken. Waits for a writer that is taking it now."""
    fresh = {"request": request, "status": 0, "answer": b"", "at": func.now()}
    statement = insert(IdempotencyRow).values(scope=scope, key=key, **fresh)
    statement = statement.on_conflict_do_update(
        index_elements=["scope", "key"], set_=fresh, where=IdempotencyRow.at < func.now() - KEPT
    )
    return session.scalar(statement.returning(IdempotencyRow.key)) is not None


def _stored(session: Session, scope: str, key: str, request: bytes) -> Answer:
    row = session.get_one(IdempotencyRow, (scope, key))
    if row.request != request:
        raise IdempotencyError(
            f"the idempotency key {key!r} was used for another request: take a new one", param="Idempotency-Key"
        )
    return Answer(row.status, row.answer, is_replayed=True)


def _purge(session: Session) -> None:
    """Forget answers whose time is over, except those that some writer holds just now."""
    names = (IdempotencyRow.scope, IdempotencyRow.key)
    over = select(*names).where(IdempotencyRow.at < func.now() - KEPT).limit(PURGED_AT_ONCE)
    session.execute(delete(IdempotencyRow).where(tuple_(*names).in_(over.with_for_update(skip_locked=True))))
