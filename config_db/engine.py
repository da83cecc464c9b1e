"""Connections to the config DB."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

from psycopg.conninfo import make_conninfo
from psycopg.errors import LockNotAvailable, ReadOnlySqlTransaction
from sqlalchemy import Engine, create_engine, func, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.orm import Session

from common.errors import ConfigUnavailableError, SetupError
from common.logs import get_logger

log = get_logger("config_db")

CONNECT_TIMEOUT_S: Final = 3
SILENCE_S: Final = 10
"""A connection whose other end has vanished (power cut, partition) is given up after about this long."""
RETRY_AFTER_S: Final = 5.0
_CONNECTING: Final[Mapping[str, Any]] = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "application_name": "farmhand",
    "keepalives_idle": SILENCE_S // 2,
    "keepalives_interval": 1,
    "keepalives_count": SILENCE_S // 2,
    "tcp_user_timeout": SILENCE_S * 1000,
}


def open_engine(database_url: str) -> Engine:
    """An engine for a ``postgresql://`` URL; nothing is connected yet.

    Raises:
        SetupError: the URL is not one of PostgreSQL.
    """
    try:
        url = make_url(database_url)
    except ArgumentError:
        raise SetupError("FARMHAND_DATABASE_URL is not a URL, as postgresql://user@host/database") from None
    if url.get_backend_name() != "postgresql":
        raise SetupError(f"the config DB is a PostgreSQL, not {url.get_backend_name()!r}: see FARMHAND_DATABASE_URL")
    return create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=1,
        max_overflow=2,
        pool_pre_ping=True,
        # nothing is prepared: behind a pooler, the next transaction may find itself on another connection
        connect_args={**_CONNECTING, "prepare_threshold": None},
    )


def conninfo(engine: Engine) -> str:
    """How the driver itself is told to make a connection as this engine makes its own."""
    _, options = engine.dialect.create_connect_args(engine.url)
    said = {name: value for name, value in options.items() if isinstance(value, (str, int))}  # no Python objects
    return make_conninfo(**{**said, **_CONNECTING})


def ping(engine: Engine) -> None:
    """Ask for one number.

    Raises:
        SetupError: PostgreSQL does not answer; the message is one line.
    """
    try:
        with engine.connect() as connection:
            connection.execute(text("select 1"))
    except OperationalError as error:
        raise SetupError(f"PostgreSQL does not answer: {reason(error)}; is FARMHAND_DATABASE_URL right?") from error


@contextmanager
def transaction(engine: Engine) -> Iterator[Session]:
    """A session for one change: committed at the end of the block, rolled back if the block raises.

    Raises:
        ConfigUnavailableError: PostgreSQL does not answer, and whether a commit then took place is not known; or it is
            a standby and takes no changes; or another change kept its locks for longer than ``lock_timeout``.
    """
    try:
        with Session(engine) as session, session.begin():
            yield session
    except DBAPIError as error:
        if not is_away(error):
            raise
        event, message = (
            "config_db_away",
            "the config DB does not answer, or to readers only, so nothing can be changed",
        )
        if isinstance(error.orig, LockNotAvailable):
            event, message = (
                "config_db_busy",
                "another change of the config DB has not ended yet, so this one was given up",
            )
        log.warning(event, reason=reason(error))  # names hosts, which callers are not told
        raise ConfigUnavailableError(message, retry_after_s=RETRY_AFTER_S) from error


def time_now(session: Session) -> datetime:
    """The instant by PostgreSQL's clock, the one that all writers share."""
    now: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
    return now.astimezone(UTC)


def is_away(error: Exception) -> bool:
    """Whether an error says that PostgreSQL could not be reached or was lost, not that a statement was wrong.

    One that takes no changes, as a standby after a failover, counts as away, too: only writers come upon that.
    """
    lost = isinstance(error, DBAPIError) and (
        error.connection_invalidated or isinstance(error.orig, ReadOnlySqlTransaction)
    )
    return lost or isinstance(error, (OperationalError, InterfaceError))


def reason(error: Exception) -> str:
    """A driver's error as one line."""
    return " ".join(str(getattr(error, "orig", None) or error).split())
