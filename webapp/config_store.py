"""The config DB as the web tier changes it, and reads of it what no snapshot holds.

Every wait in here is a greenlet's: the process goes on serving, and gives up on a database that does not answer.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, cast

import gevent
from flask import current_app
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from common.errors import ConfigUnavailableError
from config_db.engine import RETRY_AFTER_S, open_engine, transaction
from config_db.idempotency import Answer, once

REACHED_WITHIN_S: Final = 4.0
"""A database that cannot be reached in this time, or has no connection to spare for so long, is taken to be away."""
DONE_WITHIN_S: Final = 30.0
"""The longest that one change or one reading may take."""
_EXTENSION: Final = "farmhand.config_store"


class ConfigStore:
    """Owns the connections on which views write."""

    def __init__(self, database_url: str) -> None:
        self._engine = open_engine(database_url)
        self._reading = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    @contextmanager
    def change(self) -> Iterator[Session]:
        """A session for one change: committed at the end of the block, rolled back if the block raises.

        Raises:
            ConfigUnavailableError: PostgreSQL does not answer, or other writers hold it up for too long.
        """
        with _within(DONE_WITHIN_S), transaction(self._engine) as session:
            with _within(REACHED_WITHIN_S):
                session.execute(text(f"set local lock_timeout = {int(REACHED_WITHIN_S * 1000)}"))
            yield session

    def write(self, change: Callable[[Session], Answer], *, scope: str, key: str | None, digest: bytes) -> Answer:
        """Make one change and return its answer; under an idempotency key, once.

        Args:
            change: makes it in the session that it is given.
            scope: who writes; the idempotency keys of others are other keys.
            key: the idempotency key, if there is one.
            digest: of all that makes this write the one it is.

        Raises:
            ConfigUnavailableError: as ``change``.
            IdempotencyError: the key was used for another write.
        """
        with self.change() as session:
            if key is None:
                return change(session)
            return once(session, scope=scope, key=key, request=digest, write=partial(change, session))

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session in which every statement sees the same; ConfigUnavailableError as ``change``."""
        with _within(DONE_WITHIN_S), transaction(self._reading) as session:
            with _within(REACHED_WITHIN_S):
                session.connection()
            yield session


@contextmanager
def _within(limit_s: float) -> Iterator[None]:
    """Give up on the block when it has waited too long; a connection that was waited for is not used again."""
    timeout = gevent.Timeout.start_new(limit_s)
    try:
        yield
    except (gevent.Timeout, SQLAlchemyError) as error:
        was_cut_off = isinstance(error, SQLAlchemyError) and not timeout.pending  # what the driver makes of it
        if error is not timeout and not was_cut_off:
            raise
        message = f"the config DB has not answered within {limit_s:g} s; whether a change took place is not known"
        raise ConfigUnavailableError(message, retry_after_s=RETRY_AFTER_S) from error
    finally:
        timeout.close()


def install(extensions: dict[str, Any], store: ConfigStore) -> None:
    """Make ``config_store()`` answer within the application that owns these extensions."""
    extensions[_EXTENSION] = store


def config_store() -> ConfigStore:
    """The store of the application that serves this request."""
    return cast("ConfigStore", current_app.extensions[_EXTENSION])
