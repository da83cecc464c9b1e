"""Migrations: up and down, two at once, and with processes of the release before still at work."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, inspect
from sqlalchemy.orm import Session

from common.errors import SetupError
from config_db.engine import open_engine, transaction
from config_db.epochs import epoch_now
from config_db.migrate import migrate
from config_db.past import contents_at, rollback
from config_db.reader import SnapshotReader
from config_db.schema import Table
from config_db.spec import Limits, ModelSpec, Placement, Source
from tests.services import PostgresServer, wait_until

ROOT = Path(__file__).resolve().parents[2]
MIGRATIONS = ROOT / "migrations"


def revisions() -> list[str]:
    """All revisions, oldest first."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    return [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()][::-1]


PREVIOUS = revisions()[:-1]
"""Each that a newer migration may meet, that of the release before among them."""
OLD_SPEC: dict[str, Any] = {
    "id": "org/m",
    "family": "dense",
    "source": {"hub": "org/m", "revision": "abc"},
    "dims": {"dense": 8},
    "max_length": 512,
    "prompts": {"query": "q: "},
    "limits": {"timeout_s": 3.5, "max_items": 9},
    "pinned": True,
    "preload": True,
    "machine_profiles": ["cpu", "l4"],
    "options": {"dim": 4},
}
"""As the release before this one wrote it."""
AS_READ = ModelSpec(
    id="org/m",
    family="dense",
    source=Source(hub="org/m", revision="abc"),
    dims={"dense": 8},
    max_length=512,
    prompts={"query": "q: "},
    limits=Limits(timeout_s=3.5, max_items=9),
    placement=Placement(pinned=True, preload=True, machine_profiles=("cpu", "l4")),
    options={"dim": 4},
)


@contextmanager
def migrations(url: str) -> Iterator[Config]:
    """Alembic's commands on a database."""
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.connect() as connection:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        yield config
        connection.commit()
    engine.dispose()


@pytest.fixture(params=PREVIOUS)
def previous_url(postgres_server: PostgresServer, request: pytest.FixtureRequest) -> str:
    """A database as a release before this one made it."""
    url = postgres_server.empty_database()
    with migrations(url) as config:
        command.upgrade(config, request.param)
    return url


class PreviousRelease:
    """Speaks to the config DB with the very statements of the release before this one."""

    def __init__(self, url: str) -> None:
        self.connection = psycopg.connect(url)

    def read(self, newer_than: int = 0) -> tuple[int, dict[str, dict[str, Any]]]:
        """One poll: the epoch and the models that have changed since another."""
        with self.connection.transaction():
            self._execute("set transaction isolation level repeatable read read only")
            number, _ = self._execute("SELECT farm_epoch.number, farm_epoch.id FROM farm_epoch").fetchone()
            self._execute("SELECT epochs.id FROM epochs WHERE epochs.number = %s", newer_than)
            rows = self._execute(
                "SELECT models.id, models.spec, models.epoch, models.deleted_at FROM models WHERE models.epoch > %s",
                newer_than,
            ).fetchall()
        return number, {name: spec for name, spec, _, deleted_at in rows if deleted_at is None}

    def put(self, spec: dict[str, Any]) -> int:
        """One write of one model."""
        with self.connection.transaction():
            number, _ = self._execute("SELECT farm_epoch.number, farm_epoch.id FROM farm_epoch FOR UPDATE").fetchone()
            known = self._execute(
                "SELECT models.id, models.spec, models.epoch, models.deleted_at FROM models WHERE models.id = %s",
                spec["id"],
            ).fetchone()
            epoch_id, epoch, content = uuid4(), int(number) + 1, json.dumps(spec)
            self._execute("UPDATE farm_epoch SET number=%s, id=%s WHERE farm_epoch.only_one = 1", epoch, epoch_id)
            self._execute(
                "INSERT INTO epochs (number, id, actor, reason) VALUES (%s, %s, 'farmhand', 'up')", epoch, epoch_id
            )
            self._execute(
                "INSERT INTO history (epoch, kind, name, before, after) VALUES (%s, %s, %s, %s::JSONB, %s::JSONB)",
                epoch, "model", spec["id"], json.dumps(known[1] if known else None), content,
            )  # fmt: skip
            if known is None:
                self._execute(
                    "INSERT INTO models (id, spec, epoch, deleted_at) VALUES (%s, %s::JSONB, %s, NULL)",
                    spec["id"], content, epoch,
                )  # fmt: skip
            else:
                self._execute(
                    "UPDATE models SET spec=%s::JSONB, epoch=%s, deleted_at=NULL WHERE models.id = %s",
                    content, epoch, spec["id"],
                )  # fmt: skip
            self._execute("DELETE FROM models WHERE models.deleted_at < now() - %s::interval", "30 days")
        return epoch

    def _execute(self, statement: str, *values: Any) -> Any:
        return self.connection.execute(statement, values, prepare=True)


@pytest.fixture
def previous(previous_url: str) -> Iterator[PreviousRelease]:
    release = PreviousRelease(previous_url)
    yield release
    release.connection.close()


@contextmanager
def reading(url: str) -> Iterator[SnapshotReader]:
    reader = SnapshotReader(url, poll_s=0.1, copy_path=None)
    reader.start()
    yield reader
    reader.stop()


def tables(connection: Connection) -> dict[str, set[str]]:
    found = inspect(connection)
    return {name: {column["name"] for column in found.get_columns(name)} for name in found.get_table_names()}


def test_every_migration_goes_up_and_down_again(postgres_server: PostgresServer) -> None:
    with migrations(postgres_server.empty_database()) as config:
        connection: Connection = config.attributes["connection"]
        steps = revisions()
        before: list[dict[str, set[str]]] = []
        for revision in steps:
            command.upgrade(config, revision)
            before.append(tables(connection))
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
        for place in range(len(steps) - 1, 0, -1):
            command.downgrade(config, "-1")
            assert tables(connection) == before[place - 1]
        command.downgrade(config, "base")
        assert set(tables(connection)) == {"alembic_version"}
        command.upgrade(config, "head")
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []


def test_migrations_are_one_line() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    scripts = ScriptDirectory.from_config(config)
    assert len(scripts.get_heads()) == 1
    assert [script.revision for script in scripts.walk_revisions()][-1] == "0001"


def test_what_the_release_before_has_written_is_read(previous_url: str, previous: PreviousRelease) -> None:
    plain_spec = {"id": "org/n", "family": "dense", "source": {"path": "/n"}}
    for spec in (OLD_SPEC | {"max_length": 1}, OLD_SPEC, plain_spec):
        epoch = previous.put(spec)
    migrate(previous_url)
    with reading(previous_url) as reader:
        assert reader.current.epoch == epoch
        assert dict(reader.current.models) == {
            "org/m": AS_READ,
            "org/n": ModelSpec(id="org/n", family="dense", source=Source(path="/n")),
        }
    engine = open_engine(previous_url)
    with transaction(engine) as session:
        assert contents_at(session, epoch - 2)["model"] == {"org/m": OLD_SPEC | {"max_length": 1}}
        rollback(session, epoch - 2, actor="ann", reason="back to what the release before wrote")
    with reading(previous_url) as reader:
        assert set(reader.current.models) == {"org/m"}
        assert reader.current.models["org/m"].max_length == 1
        assert reader.current.models["org/m"].placement == AS_READ.placement
    engine.dispose()


def test_the_release_before_works_on_after_the_migration(previous_url: str, previous: PreviousRelease) -> None:
    for _ in range(10):  # on one connection, so that its statements are prepared on the old tables
        epoch = previous.put(OLD_SPEC)
        assert previous.read() == (epoch, {"org/m": OLD_SPEC})
    migrate(previous_url)
    with reading(previous_url) as reader:
        assert previous.read() == (epoch, {"org/m": OLD_SPEC})
        changed, added = OLD_SPEC | {"preload": False}, OLD_SPEC | {"id": "org/new"}
        previous.put(changed)
        epoch = previous.put(added)
        assert previous.read(epoch - 2) == (epoch, {"org/m": changed, "org/new": added})
        wait_until(lambda: reader.current.epoch == epoch, 20, "what the release before has written")
        placed = {name: spec.placement.preload for name, spec in reader.current.models.items()}
        assert placed == {"org/m": False, "org/new": True}
    with Session(engine := open_engine(previous_url)) as session:
        assert epoch_now(session)[0] == epoch
        assert set(contents_at(session, epoch)["model"]) == {"org/m", "org/new"}
    engine.dispose()


def test_a_migration_amid_the_work_of_the_release_before(previous_url: str) -> None:
    """Readers that poll and a writer that writes, all through it: none fails, and nothing is lost."""
    is_over, errors = threading.Event(), []
    done = [0, 0, 0]

    def work(place: int, turn: Callable[[PreviousRelease], object]) -> None:
        release = PreviousRelease(previous_url)
        try:
            while not is_over.is_set():
                turn(release)
                done[place] += 1
        except Exception as error:  # noqa: BLE001 - told to the test's own thread
            errors.append(error)
        finally:
            release.connection.close()

    turns: list[Callable[[PreviousRelease], object]] = [
        lambda release: release.read(),
        lambda release: release.read(done[2]),
        lambda release: release.put(OLD_SPEC | {"max_length": done[2] + 1}),
    ]
    threads = [threading.Thread(target=work, args=(place, turn)) for place, turn in enumerate(turns)]
    for thread in threads:
        thread.start()
    wait_until(lambda: min(done) > 10 or errors, 10, "work before the migration")
    migrate(previous_url)
    before = list(done)
    wait_until(lambda: all(n > m + 10 for n, m in zip(done, before, strict=True)) or errors, 10, "work after it")
    is_over.set()
    for thread in threads:
        thread.join()
    assert errors == []
    with reading(previous_url) as reader:
        assert reader.current.epoch == 1 + done[2]
        assert reader.current.models["org/m"].max_length == done[2]


def test_a_schema_of_a_newer_release_is_left_alone(database_url: str) -> None:
    with migrations(database_url) as config:
        config.attributes["connection"].exec_driver_sql("update alembic_version set version_num = '9999'")
    with pytest.raises(SetupError, match="by a newer release"):
        migrate(database_url)
