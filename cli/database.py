"""The config DB as commands reach it: one session, one engine, and one line if it cannot be."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from psycopg.errors import UndefinedColumn, UndefinedTable
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import NoResultFound, OperationalError, ProgrammingError, SQLAlchemyError
from sqlalchemy.orm import Session

from common.errors import SetupError
from common.logs import configure_logs
from config_db.engine import open_engine, ping, reason, transaction

LOCK_WAIT_S: Final = 90
"""How long a command waits for another change to end: longer than a writer that is gone holds up the others
(``config_db.epochs.IDLE_S``)."""


@contextmanager
def reading(database_url: str) -> Iterator[Session]:
    """A session that sees the same epoch throughout and changes nothing; needs no right to write.

    Raises:
        SetupError: PostgreSQL does not answer, or has no schema of ours.
    """
    engine = _open(database_url)
    try:
        consistent = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        with _explained(), Session(consistent) as session:
            yield session
    finally:
        engine.dispose()


@contextmanager
def writing(database_url: str) -> Iterator[Session]:
    """A session for one change: committed at the end of the block, rolled back if the block raises.

    Raises:
        SetupError: PostgreSQL did not answer, or has no schema of ours.
        ConfigUnavailableError: PostgreSQL has gone away since, or another change does not end.
    """
    engine = _open(database_url)
    try:
        with _explained(), transaction(engine) as session:
            session.execute(select(func.set_config("lock_timeout", f"{LOCK_WAIT_S}s", True)))
            yield session
    finally:
        engine.dispose()


def _open(database_url: str) -> Engine:
    configure_logs(level="WARNING")  # to stderr: what a command prints is for other programs, too
    engine = open_engine(database_url)
    ping(engine)
    return engine


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except NoResultFound as error:
        raise SetupError("the config DB has no epoch: its schema was not made by `farmhand migrate`") from error
    except ProgrammingError as error:
        if isinstance(error.orig, (UndefinedColumn, UndefinedTable)):
            message = f"the config DB lacks this release's schema, run `farmhand migrate`: {reason(error)}"
            raise SetupError(message) from error
        raise SetupError(f"the config DB refused: {reason(error)}") from error
    except OperationalError as error:
        raise SetupError(f"PostgreSQL does not answer any more: {reason(error)}") from error
    except SQLAlchemyError as error:
        raise SetupError(f"the config DB refused: {reason(error)}") from error
