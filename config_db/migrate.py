"""Bring a database to the newest schema. Any number of processes may do so at once."""

from importlib.resources import as_file, files
from typing import Final

from alembic import command
from alembic.config import Config
from sqlalchemy import text

from config_db.engine import open_engine, ping

_LOCK: Final = 0x6661726D  # any number that no other program in this database locks


def migrate(database_url: str) -> None:
    """Run every migration that is missing; one process at a time does, the others find nothing left to do.

    Raises:
        SetupError: PostgreSQL does not answer.
    """
    engine = open_engine(database_url)
    ping(engine)
    try:
        with engine.connect() as connection, as_file(files("migrations")) as scripts:
            connection.execute(text("select pg_advisory_lock(:lock)"), {"lock": _LOCK})
            connection.commit()
            config = Config()
            config.set_main_option("script_location", str(scripts))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            connection.commit()
            connection.execute(text("select pg_advisory_unlock(:lock)"), {"lock": _LOCK})
            connection.commit()
    finally:
        engine.dispose()
