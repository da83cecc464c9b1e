"""Connections to the config DB."""

from sqlalchemy import Engine, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, OperationalError

from common.errors import SetupError

CONNECT_TIMEOUT_S = 3


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
        connect_args={"connect_timeout": CONNECT_TIMEOUT_S, "application_name": "farmhand"},
    )


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


def reason(error: Exception) -> str:
    """A driver's error as one line."""
    return " ".join(str(getattr(error, "orig", None) or error).split())
