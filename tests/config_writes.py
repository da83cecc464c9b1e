"""Writes of tests to the config DB, and what stands in it then."""

from typing import Any

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from config_db.engine import transaction
from config_db.epochs import epoch_now
from config_db.publish import Delete, Published, Put, live, publish
from config_db.schema import ROWS, Kind, Table

KINDS: tuple[Kind, ...] = tuple(ROWS)
Contents = dict[Kind, dict[str, dict[str, Any]]]
WHO: dict[str, Any] = {"actor": "ann", "reason": "test"}
RARELY_S = 600.0
"""A reader that polls so rarely looks only when told to."""


def write(engine: Engine, *writes: Put | Delete, expected: int | None = None) -> Published:
    with transaction(engine) as session:
        return publish(session, writes, expected=expected, **WHO)


def present(session: Session) -> Contents:
    """Everything that is live, of every kind."""
    return {kind: live(session, kind) for kind in KINDS}


def now(engine: Engine) -> tuple[int, Contents]:
    """The present epoch and contents, in one consistent reading."""
    with Session(engine.execution_options(isolation_level="REPEATABLE READ")) as session:
        return epoch_now(session)[0], present(session)


def epoch(session: Session) -> int:
    return epoch_now(session)[0]


def content(session: Session, kind: Kind, name: str) -> dict[str, Any]:
    return live(session, kind)[name]


def add(session: Session, kind: Kind, name: str, spec: dict[str, Any]) -> None:
    publish(session, [Put(kind, name, spec)], **WHO)


class Backup:
    """Every table as it stands now, to be put back later."""

    tables = tuple(table.name for table in Table.metadata.sorted_tables)

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        with transaction(engine) as session:
            session.execute(text("create schema backup"))
            for name in self.tables:
                session.execute(text(f"create table backup.{name} as table public.{name}"))

    def restore(self) -> None:
        with transaction(self.engine) as session:
            session.execute(text(f"truncate {', '.join(self.tables)}"))
            for name in self.tables:
                session.execute(text(f"insert into {name} select * from backup.{name}"))  # noqa: S608 - our own names
