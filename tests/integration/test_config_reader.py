"""What keeps a reader of the config DB right over weeks: old specs, old epochs, listeners, forks, greenlets."""

import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import Session

from common.errors import ConfigUnavailableError, SetupError
from config_db.catalog import apply_models, read_catalog
from config_db.engine import open_engine, transaction
from config_db.epochs import lock_epoch, raise_epoch
from config_db.former_specs import KEPT_SPECS
from config_db.listening import Listener
from config_db.migrate import migrate
from config_db.reader import POLL_GAP_S, SnapshotReader
from config_db.schema import EpochRow, FarmEpoch, ModelRow
from config_db.spec import ModelSpec, Placement, Profile, Source, plain
from tests.config_writes import RARELY_S
from tests.services import PostgresServer, wait_until

ROOT = Path(__file__).resolve().parents[2]


def spec(name: str, **options: object) -> ModelSpec:
    return ModelSpec(id=name, family="fake", source=Source(path="/"), options=dict(options))


def publish(engine: Engine, *specs: ModelSpec, prune: bool = False) -> int:
    with transaction(engine) as session:
        return apply_models(session, specs, actor="ann", reason="test", prune=prune)


def publish_unheard(engine: Engine, one: ModelSpec) -> int:
    """A new epoch without a nudge."""
    with transaction(engine) as session:
        epoch = raise_epoch(session, lock_epoch(session), actor="ann", reason="test")
        session.add(ModelRow(id=one.id, spec=plain(one), epoch=epoch))
    return epoch


def run_python(code: str, *arguments: str, cwd: Path) -> str:
    """The last line that a process of its own prints, below its log; the project is on its path, wherever it runs."""
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=60).stdout.splitlines()[
        -1
    ]


def read(reader: SnapshotReader, epoch: int) -> None:
    reader.poll_soon()
    wait_until(lambda: reader.current.epoch == epoch, 20, f"epoch {epoch}")


def test_who_meets_a_newer_epoch_makes_the_reader_look_at_once(engine: Engine, reader: SnapshotReader) -> None:
    """Nobody is told of this epoch."""
    reader.start()
    wait_until(lambda: reader.is_listening, 20, "the reader to listen: it looks then, too")
    read(reader, publish(engine, spec("before")))
    read(reader, publish_unheard(engine, spec("a")))
    assert reader.current.model("a") == spec("a")


def test_processes_spread_their_polls(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(Listener, "wait", lambda _, timeout_s: waits.append(timeout_s))
    reader = SnapshotReader(database_url, poll_s=2.0, copy_path=None)
    reader.start()
    wait_until(lambda: len(waits) > 10, 20, "some polls")
    reader.stop()
    assert all(1.6 - POLL_GAP_S <= wait_s <= 2.0 - POLL_GAP_S for wait_s in waits)
    assert max(waits) - min(waits) > 0.05


def test_the_catalogue_applied_again_is_no_new_epoch(engine: Engine) -> None:
    """What comes back from the database must equal what was written, whatever fields a spec uses."""
    lists = ModelSpec(
        id="m",
        family="dense",
        source=Source(hub="m"),
        operations=("encode", "score"),
        outputs=("dense", "sparse"),
        placement=Placement(machine_profiles=("l4",)),
        options={"sizes": (1, 2), "share": 0.1},
    )
    specs = [*read_catalog(ROOT / "catalog"), lists]
    assert publish(engine, *specs) == publish(engine, *specs)


def test_only_what_changed_is_read_again(engine: Engine, reader: SnapshotReader) -> None:
    publish(engine, *(spec(f"m{number}") for number in range(1000)))
    reader.start()
    before = reader.current.models
    read(reader, publish(engine, spec("m7", changed=True)))
    after = reader.current.models
    assert [name for name in before if after[name] is not before[name]] == ["m7"]


def test_a_spec_stays_known_however_many_epochs_pass(engine: Engine, reader: SnapshotReader) -> None:
    """A queued request may wait an hour; nobody may count on few changes in it."""
    publish(engine, spec("a"), spec("gone"))
    reader.start()
    publish(engine, spec("a", version=0), prune=True)
    for version in range(1, 30):
        read(reader, publish(engine, spec("a", version=version)))
    assert reader.spec(spec("a").digest) == spec("a")
    assert reader.spec(spec("gone").digest) == spec("gone")
    assert reader.current.by_digest(spec("gone").digest) is None


def test_a_listener_that_fails_keeps_nothing_from_the_others(engine: Engine, reader: SnapshotReader) -> None:
    seen: list[int] = []

    def fail(_: object) -> None:
        raise RuntimeError

    reader.subscribe(fail)
    reader.subscribe(lambda snapshot: seen.append(snapshot.epoch))
    reader.start()
    first = reader.current.epoch
    second = publish(engine, spec("a"))
    read(reader, second)
    wait_until(lambda: seen == [first, second], 20, "the second listener")
    assert reader.is_connected


def test_a_reader_that_slept_longer_than_tombstones_live_forgets_the_dead(
    engine: Engine, reader: SnapshotReader
) -> None:
    publish(engine, spec("dead"), spec("living"))
    reader.start()
    publish(engine, spec("living"), prune=True)
    with transaction(engine) as session:
        session.execute(text("update models set deleted_at = now() - interval '31 days' where deleted_at is not null"))
        session.execute(text("update epochs set raised_at = now() - interval '31 days'"))
    epoch = publish(engine, spec("young"))
    with Session(engine) as session:
        assert session.get(ModelRow, "dead") is None, "its tombstone is still there: the test proves nothing"
    read(reader, epoch)
    assert set(reader.current.models) == {"living", "young"}


@pytest.mark.parametrize("wrong_days", [-40, 40], ids=["at the deletion", "at the purge"])
def test_a_clock_that_was_wrong_for_a_while_hides_no_deletion(
    engine: Engine, reader: SnapshotReader, wrong_days: int
) -> None:
    """A tombstone that looks a month old is purged, however lately a reader has looked."""
    publish(engine, spec("dead"), spec("living"))
    reader.poll()
    deleted = publish(engine, spec("living"), prune=True)
    with transaction(engine) as session:
        session.execute(text("update models set deleted_at = now() - interval '40 days' where deleted_at is not null"))
    purged = publish(engine, spec("young"))
    with transaction(engine) as session:
        assert session.get(ModelRow, "dead") is None, "its tombstone is still there: the test proves nothing"
        wrong = session.get_one(EpochRow, deleted if wrong_days < 0 else purged)
        wrong.raised_at += timedelta(days=wrong_days)
    reader.poll()
    assert (reader.current.epoch, set(reader.current.models)) == (purged, {"living", "young"})


def test_a_writer_that_had_read_the_epoch_before_still_gets_the_next(engine: Engine) -> None:
    with transaction(engine) as session:
        row = session.scalars(select(FarmEpoch)).one()  # held, so that the session still knows what it read
        seen = row.number
        assert publish(engine, spec("other")) == seen + 1
        assert raise_epoch(session, lock_epoch(session), actor="ann", reason="test") == seen + 2


def test_two_changes_at_once_of_one_model_leave_the_later(engine: Engine) -> None:
    epochs: dict[int, int] = {}
    threads = [
        threading.Thread(target=lambda n=number: epochs.update({n: publish(engine, spec("a", n=n))}))
        for number in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = max(epochs, key=lambda number: epochs[number])
    with Session(engine) as session:
        row = session.get_one(ModelRow, "a")
    assert len(set(epochs.values())) == 6
    assert (row.spec["options"], row.epoch) == ({"n": last}, epochs[last])


def test_a_change_that_fails_changes_nothing(engine: Engine) -> None:
    before = publish(engine, spec("a"))

    def fail() -> None:
        with transaction(engine) as session:
            raise_epoch(session, lock_epoch(session), actor="ann", reason="test")
            session.execute(text("select * from no_such_table"))

    with pytest.raises(ProgrammingError):
        fail()
    with Session(engine) as session:
        assert session.scalars(select(FarmEpoch)).one().number == before


def test_a_change_without_postgres_is_one_clear_error(own_postgres: PostgresServer) -> None:
    engine = open_engine(own_postgres.fresh_database())
    publish(engine, spec("a"))
    own_postgres.stop()
    with pytest.raises(ConfigUnavailableError, match="nothing can be changed") as caught:
        publish(engine, spec("b"))
    assert "\n" not in caught.value.message
    own_postgres.start()
    publish(engine, spec("b"))
    engine.dispose()


def test_a_database_without_schema_says_what_to_do(postgres_server: PostgresServer) -> None:
    reader = SnapshotReader(postgres_server.empty_database(), poll_s=RARELY_S, copy_path=None)
    with pytest.raises(SetupError, match="run `farmhand migrate`"):
        reader.start()
    reader.stop()


def test_processes_may_migrate_at_once_and_from_anywhere(postgres_server: PostgresServer, tmp_path: Path) -> None:
    url = postgres_server.empty_database()
    program = "from config_db.migrate import migrate; migrate(sys.argv[1]); print('done')"
    said: list[str] = []
    threads = [threading.Thread(target=lambda: said.append(run_python(program, url, cwd=tmp_path))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == ["done", "done"]
    engine = open_engine(url)
    assert publish(engine, spec("a")) == 2
    engine.dispose()


def test_a_schema_of_a_newer_release_is_left_alone(database_url: str, engine: Engine) -> None:
    with transaction(engine) as session:
        session.execute(text("update alembic_version set version_num = '9999'"))
    with pytest.raises(SetupError, match="newer release"):
        migrate(database_url)
    with Session(engine) as session:
        assert session.scalar(text("select version_num from alembic_version")) == "9999"


def test_a_reader_starts_after_a_fork(database_url: str, engine: Engine, tmp_path: Path) -> None:
    publish(engine, spec("a"))
    program = """
import os
from config_db.reader import SnapshotReader
reader = SnapshotReader(sys.argv[1], poll_s=600, copy_path=None)
child = os.fork()
reader.start()
names = list(reader.current.models)
reader.stop()
if child:
    print(names, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
else:
    os._exit(0 if names == ["a"] else 1)
"""
    assert run_python(program, database_url, cwd=tmp_path) == "['a'] 0"


def test_greenlets_go_on_while_the_config_db_is_slow(database_url: str, engine: Engine, tmp_path: Path) -> None:
    """Under gevent the poll must not hold up the requests of its process; here it waits for a lock."""
    pytest.importorskip("gevent")
    publish(engine, spec("a"))
    program = """
from gevent import monkey
monkey.patch_all()
import gevent
from sqlalchemy import text
from config_db.engine import open_engine
from config_db.reader import SnapshotReader
blocker = open_engine(sys.argv[1]).connect()
blocker.execute(text("lock table farm_epoch in access exclusive mode"))
reader = SnapshotReader(sys.argv[1], poll_s=600, copy_path=None)
starting = gevent.spawn(reader.start)
waits = "select count(*) from pg_locks where not granted"
with open_engine(sys.argv[1]).connect() as looking:
    while not looking.execute(text(waits)).scalar():
        gevent.sleep(0.01)
blocker.rollback()
starting.get()
print(list(reader.current.models))
reader.stop()
"""
    assert run_python(program, database_url, cwd=tmp_path) == "['a']"


def test_a_url_of_a_unix_socket_reaches_the_driver_as_it_is() -> None:
    engine = open_engine("postgresql://user:@/farm?host=/var/run/some where")
    _, options = engine.dialect.create_connect_args(engine.url)
    assert (options["host"], options["user"], options["dbname"]) == ("/var/run/some where", "user", "farm")
    engine.dispose()


def test_one_change_of_all_that_is_served_forgets_no_spec(engine: Engine, reader: SnapshotReader) -> None:
    """Models and their profiles are more than what is kept of a small farm."""
    profiles = {f"p{n}": Profile(max_length=n + 1) for n in range(4)}
    models = [msgspec.structs.replace(spec(f"m{n}"), profiles=profiles) for n in range(KEPT_SPECS // 4)]
    publish(engine, *models)
    reader.start()
    for version in range(2):
        later = [msgspec.structs.replace(one, options={"version": version}) for one in models]
        read(reader, publish(engine, *later))
    assert all(reader.spec(one.digest) == one for model in models for one in (model, *model.profile_specs))


def test_who_comes_late_knows_what_models_were_before(engine: Engine, reader: SnapshotReader) -> None:
    """From the history: of models changed and gone, their profiles too; what cannot be read is left out."""
    first = msgspec.structs.replace(spec("a", version=1), profiles={"short": Profile(max_length=8)})
    publish(engine, first, spec("gone"))
    publish(engine, spec("a", version=2), prune=True)
    publish(engine, spec("a", version=3))
    with engine.begin() as connection:
        broken = text("update history set before = '{}' where kind = 'model' and before is null")
        assert connection.execute(broken).rowcount == 2
    reader.poll()
    former = [first, first.with_profile("short"), spec("a", version=2), spec("gone")]
    assert [reader.spec(one.digest) for one in former] == former
    assert reader.current.models == {"a": spec("a", version=3)}


def test_a_model_that_goes_takes_its_origin_along(engine: Engine, reader: SnapshotReader) -> None:
    publish(engine, spec("a"), spec("gone"))
    reader.start()
    assert set(reader.current.origins) == {"a", "gone"}
    read(reader, publish(engine, spec("a"), prune=True))
    assert set(reader.current.origins) == {"a"}
