"""Bring a database to the newest schema. Any number of processes may do so at once."""

from importlib.resources import as_file, files
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from common.errors import SetupError
from config_db.engine import open_engine, ping, reason

_LOCK: Final = 0x6661726D  # any number that no other program in this database locks


def migrate(database_url: str) -> None:
    """Run every migration that is missing; one process at a time does, the others find nothing left to do.

    Raises:
        SetupError: PostgreSQL does not answer or refuses, or its schema is of a newer release.
    """
    engine = open_engine(database_url)
    try:
        ping(engine)
        with engine.connect() as connection:
            connection.execute(text("select pg_advisory_lock(:lock)"), {"lock": _LOCK})
            connection.commit()  # the lock is the session's: it ends with the connection, whatever happens below
            _upgrade(connection)
    except CommandError as error:
        raise SetupError(f"the config DB was migrated by a newer release, start that one: {error}") from error
    except SQLAlchemyError as error:
        raise SetupError(f"the config DB cannot be migrated: {reason(error)}") from error
    finally:
        engine.dispose()


def _upgrade(connection: Connection) -> None:
    with as_file(files("migrations")) as scripts:
        config = Config()
        config.set_main_option("script_location", str(scripts).replace("%", "%%"))  # alembic interpolates it
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
    connection.commit()
