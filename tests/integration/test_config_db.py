"""The config DB on a real PostgreSQL: writers, epochs, readers, and what they do when it is away."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, select, text
from sqlalchemy.orm import Session

from common.errors import EpochConflictError, ModelNotFoundError, SetupError
from config_db.catalog import apply_models
from config_db.engine import open_engine
from config_db.epochs import lock_epoch, raise_epoch
from config_db.migrate import migrate
from config_db.reader import SnapshotReader
from config_db.schema import EpochRow, FarmEpoch, HistoryRow, ModelRow, Table
from config_db.spec import ModelSpec, Source
from tests.services import PostgresServer, wait_until

StartReader = Callable[..., SnapshotReader]


def spec(name: str, **rest: object) -> ModelSpec:
    return ModelSpec(id=name, family="fake", source=Source(path="/"), options=dict(rest))


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    made = open_engine(database_url)
    yield made
    made.dispose()


@pytest.fixture
def start_reader(database_url: str) -> Iterator[StartReader]:
    started: list[SnapshotReader] = []

    def start(url: str = database_url, copy_path: Path | None = None) -> SnapshotReader:
        reader = SnapshotReader(url, poll_s=0.1, copy_path=copy_path)
        started.append(reader)
        reader.start()
        return reader

    yield start
    for reader in started:
        reader.stop()


def publish(engine: Engine, *specs: ModelSpec, prune: bool = False, expected: int | None = None) -> int:
    with Session(engine) as session, session.begin():
        return apply_models(session, specs, actor="ann", reason="test", prune=prune, expected=expected)


def test_a_change_reaches_a_reader_within_a_poll(engine: Engine, start_reader: StartReader) -> None:
    reader = start_reader()
    seen: list[int] = []
    reader.subscribe(lambda snapshot: seen.append(snapshot.epoch))
    epoch = publish(engine, spec("a"), spec("b"))
    wait_until(lambda: reader.current.epoch == epoch, 2, "the new epoch")
    assert set(reader.current.models) == {"a", "b"}
    wait_until(lambda: seen == [epoch], 2, "the subscriber's call")


def test_specs_of_a_past_epoch_stay_known(engine: Engine, start_reader: StartReader) -> None:
    old, new = spec("a"), spec("a", changed=True)
    publish(engine, old)
    reader = start_reader()
    epoch = publish(engine, new)
    wait_until(lambda: reader.current.epoch == epoch, 2, "the new epoch")
    assert reader.spec(old.digest) == old
    assert reader.spec(new.digest) == new
    assert reader.spec("0" * 16) is None


def test_the_same_again_is_no_new_epoch(engine: Engine) -> None:
    first = publish(engine, spec("a"))
    assert publish(engine, spec("a")) == first
    assert publish(engine, spec("a", x=1)) == first + 1


def test_a_pruned_model_disappears_and_may_come_back(engine: Engine, start_reader: StartReader) -> None:
    publish(engine, spec("a"), spec("b"))
    reader = start_reader()
    publish(engine, spec("a"), prune=True)
    wait_until(lambda: set(reader.current.models) == {"a"}, 2, "the model to be gone")
    with Session(engine) as session:
        assert session.get_one(ModelRow, "b").deleted_at is not None
    publish(engine, spec("b"))
    wait_until(lambda: set(reader.current.models) == {"a", "b"}, 2, "the model to be back")


def test_history_tells_who_changed_what(engine: Engine) -> None:
    publish(engine, spec("a"))
    epoch = publish(engine, spec("a", x=1))
    with Session(engine) as session:
        row = session.scalars(select(HistoryRow).where(HistoryRow.epoch == epoch)).one()
        told = session.get_one(EpochRow, epoch)
    assert (row.kind, row.name, told.actor) == ("model", "a", "ann")
    assert row.before is not None
    assert row.after is not None
    assert (row.before.get("options"), row.after["options"]) == (None, {"x": 1})


def test_concurrent_writers_queue_and_none_is_lost(engine: Engine, start_reader: StartReader) -> None:
    epochs: list[int] = []
    threads = [
        threading.Thread(target=lambda name=f"m{n}": epochs.append(publish(engine, spec(name)))) for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(epochs)) == 8
    assert len(start_reader().current.models) == 8


def test_a_writer_who_has_read_an_older_epoch_is_told(engine: Engine) -> None:
    read = publish(engine, spec("a"))
    publish(engine, spec("b"))
    with pytest.raises(EpochConflictError) as caught:
        publish(engine, spec("c"), expected=read)
    assert caught.value.details == {"expected": read, "current": read + 1}
    with Session(engine) as session:
        assert session.get(ModelRow, "c") is None


def test_a_restored_backup_means_a_full_reload(engine: Engine, start_reader: StartReader) -> None:
    """The number may be as high as ours; the id tells that it is another history."""
    publish(engine, spec("a"))
    publish(engine, spec("lost"))
    reader = start_reader()
    with Session(engine) as session, session.begin():
        session.execute(text("delete from models where id = 'lost'"))
        session.execute(text("delete from history where epoch = 3"))
        session.execute(text("delete from epochs where number = 3"))
        session.scalars(select(FarmEpoch)).one().number = 2
        raise_epoch(session, lock_epoch(session), actor="restore", reason="backup")
    wait_until(lambda: set(reader.current.models) == {"a"}, 2, "the restored contents")


def test_a_row_of_a_newer_release_hurts_nobody_else(engine: Engine, start_reader: StartReader) -> None:
    publish(engine, spec("a"))
    with Session(engine) as session, session.begin():
        epoch = raise_epoch(session, lock_epoch(session), actor="newer", reason="release")
        session.add(ModelRow(id="new", spec={"id": "new", "from_the_future": 1}, epoch=epoch))
    reader = start_reader()
    assert set(reader.current.models) == {"a"}
    assert reader.current.epoch == epoch


def test_an_unknown_model_names_its_nearest(engine: Engine, start_reader: StartReader) -> None:
    publish(engine, spec("org/all-MiniLM-L6-v2"), spec("org/other"))
    with pytest.raises(ModelNotFoundError) as caught:
        start_reader().current.model("all-minilm-l6-v1")
    assert caught.value.details["nearest"] == ["org/all-MiniLM-L6-v2"]


def test_readers_serve_on_without_postgres_and_start_from_the_copy(
    own_postgres: PostgresServer, start_reader: StartReader, tmp_path: Path
) -> None:
    url, copy_path = own_postgres.fresh_database(), tmp_path / "deep" / "copy"
    engine = open_engine(url)
    publish(engine, spec("a"))
    reader = start_reader(url, copy_path)
    own_postgres.stop()
    wait_until(lambda: not reader.is_connected, 10, "the reader to notice")
    assert set(reader.current.models) == {"a"}
    late = start_reader(url, copy_path)
    assert late.current == reader.current
    with pytest.raises(SetupError, match="PostgreSQL does not answer"):
        start_reader(url, tmp_path / "none")
    own_postgres.start()
    publish(engine, spec("b"))
    wait_until(lambda: "b" in late.current.models, 10, "the reader to catch up")
    engine.dispose()


def test_a_damaged_copy_is_no_copy(own_postgres: PostgresServer, start_reader: StartReader, tmp_path: Path) -> None:
    url = own_postgres.fresh_database()
    own_postgres.stop()
    (tmp_path / "copy").write_bytes(b"{")
    with pytest.raises(SetupError):
        start_reader(url, tmp_path / "copy")


def test_migrating_twice_and_at_once_is_harmless(postgres_server: PostgresServer) -> None:
    url = postgres_server.empty_database()
    errors: list[Exception] = []

    def run() -> None:
        try:
            migrate(url)
        except Exception as error:  # noqa: BLE001 - told to the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    migrate(url)
    assert errors == []
    engine = open_engine(url)
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Table.metadata)
        assert connection.execute(text("select count(*) from farm_epoch")).scalar() == 1
    engine.dispose()
    assert differences == []


def test_a_wrong_url_is_one_clear_line() -> None:
    with pytest.raises(SetupError, match="not a URL"):
        open_engine("what")
    with pytest.raises(SetupError, match="not 'mysql'"):
        open_engine("mysql://x/y")
    with pytest.raises(SetupError, match="does not answer"):
        migrate(f"postgresql://nobody@127.0.0.1:1/{uuid4().hex}")
