"""Readers hold every kind of row: what changed, what is gone, a restored backup, the copy on disk."""

import json
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session

from common.errors import SetupError
from config_db.disk_copy import write_copy
from config_db.engine import open_engine, transaction
from config_db.epochs import lock_epoch, raise_epoch
from config_db.newer_rows import FIELDS, NEWER, PRESENT
from config_db.publish import Delete, Put
from config_db.reader import SnapshotReader
from config_db.schema import KeyRow, Kind
from config_db.snapshot import Snapshot
from tests.config_writes import KINDS, RARELY_S, Backup, write
from tests.services import PostgresServer, wait_until

CONTENT: dict[Kind, dict[str, Any]] = {
    "model": {"id": "", "family": "fake", "source": {"path": "/"}},
    "pool": {"machine_profiles": {"l4": 2}},
    "tenant": {"weight": 2.0},
    "key": {
        "tenant": "acme",
        "secret_sha256": "0" * 64,
        "prefix": "fh_ab",
        "created_at": "2026-01-01T00:00:00Z",
        "scopes": ["infer", "config"],
    },
    "setting": {"value": ["org/*"]},
}
OTHERWISE: dict[Kind, dict[str, Any]] = {
    "model": {"options": {"changed": True}},
    "pool": {"lease_s": 7.0},
    "tenant": {"weight": 3.0},
    "key": {"scopes": ["infer"]},
    "setting": {"value": []},
}


def row(kind: Kind, name: str, **changed: Any) -> Put:
    content = {**CONTENT[kind], **changed}
    return Put(kind, name, {**content, "id": name} if kind == "model" else content)


def held(snapshot: Snapshot, kind: Kind) -> dict[str, Any]:
    return dict(getattr(snapshot, FIELDS[kind]))


def present(engine: Engine) -> tuple[int, UUID]:
    with Session(engine) as session:
        number, epoch_id = session.execute(PRESENT).one()
        return number, epoch_id


def catch_up(reader: SnapshotReader, engine: Engine) -> Snapshot:
    now = present(engine)
    reader.poll_soon()
    wait_until(lambda: (reader.current.epoch, reader.current.epoch_id) == now, 20, f"epoch {now}")
    return reader.current


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_added_changed_and_taken_away(engine: Engine, reader: SnapshotReader, kind: Kind) -> None:
    write(engine, row(kind, "old"), row(kind, "same"))
    reader.start()
    before = held(reader.current, kind)
    assert set(before) == {"old", "same"}
    write(engine, row(kind, "old", **OTHERWISE[kind]), row(kind, "new"))
    changed = held(catch_up(reader, engine), kind)
    assert set(changed) == {"old", "same", "new"}
    assert changed["old"] != before["old"]
    assert changed["same"] is before["same"]
    write(engine, Delete(kind, "old"))
    assert set(held(catch_up(reader, engine), kind)) == {"same", "new"}


def test_kinds_that_did_not_change_are_not_read_again(engine: Engine, reader: SnapshotReader) -> None:
    write(engine, *(row(kind, "a") for kind in KINDS))
    reader.start()
    before = reader.current
    write(engine, row("tenant", "b"))
    after = catch_up(reader, engine)
    assert [kind for kind in KINDS if getattr(after, FIELDS[kind]) is not getattr(before, FIELDS[kind])] == ["tenant"]


@pytest.mark.parametrize("further", [0, 1, 3], ids=["of a lower number", "of the same number", "written on past it"])
def test_a_restored_backup_is_read_whole(engine: Engine, reader: SnapshotReader, further: int) -> None:
    write(engine, *(row(kind, "kept") for kind in KINDS), *(row(kind, "changed") for kind in KINDS))
    backup = Backup(engine)
    write(
        engine,
        *(row(kind, "lost") for kind in KINDS),
        *(row(kind, "changed", **OTHERWISE[kind]) for kind in KINDS),
        *(Delete(kind, "kept") for kind in KINDS),
    )
    reader.start()
    old = reader.current
    backup.restore()
    for number in range(further):
        write(engine, row("setting", f"further-{number}"))
    new = catch_up(reader, engine)
    assert new.epoch - old.epoch == further - 1
    for kind in KINDS:
        names = {name for name in held(new, kind) if not name.startswith("further")}
        assert names == {"kept", "changed"}, kind
        assert held(new, kind)["changed"] != held(old, kind)["changed"]
    lost = old.model("lost")
    assert reader.spec(lost.digest) is lost, "requests under way are to finish on it"


def test_the_copy_on_disk_holds_every_kind_for_its_owner_alone(own_postgres: PostgresServer, tmp_path: Path) -> None:
    url, copy = own_postgres.fresh_database(), tmp_path / "deep" / "copy"
    engine = open_engine(url)
    write(engine, *(row(kind, "a") for kind in KINDS))
    engine.dispose()
    first = SnapshotReader(url, poll_s=RARELY_S, copy_path=copy)
    first.start()
    own_postgres.stop()
    second = SnapshotReader(url, poll_s=RARELY_S, copy_path=copy)
    second.start()
    assert second.current == first.current
    assert all(set(held(second.current, kind)) == {"a"} for kind in KINDS)
    assert copy.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]
    assert not second.is_connected
    first.stop()
    second.stop()


def test_the_last_of_many_changes_is_in_the_copy_when_the_process_ends(
    engine: Engine, database_url: str, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    reader = SnapshotReader(database_url, poll_s=RARELY_S, copy_path=copy)
    reader.start()
    for number in range(3):
        write(engine, row("tenant", f"t{number}"))
        catch_up(reader, engine)
    reader.stop()
    assert set(json.loads(copy.read_bytes())["tenants"]) == {"t0", "t1", "t2"}


def test_a_copy_that_cannot_be_written_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ends the writing, nobody finds half a copy, or pieces of one."""

    def fail(*_: object) -> None:
        raise OSError

    copy = tmp_path / "copy"
    write_copy(copy, Snapshot(1, UUID(int=1)))
    before = copy.read_bytes()
    monkeypatch.setattr(Path, "replace", fail)
    write_copy(copy, Snapshot(2, UUID(int=2)))
    assert copy.read_bytes() == before
    assert list(tmp_path.iterdir()) == [copy]


OLD_COPY = {
    "epoch": 7,
    "epoch_id": str(UUID(int=7)),
    "models": [
        {"id": "a", "family": "fake", "source": {"path": "/"}, "pinned": True, "machine_profiles": ["l4"]},
        {"id": "b", "family": "fake", "source": {"path": "/"}, "from_the_future": 1},
        {"id": "c", "family": 7},
        {"no": "id"},
    ],
}


def test_a_copy_of_another_release_serves_as_far_as_it_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "copy").write_text(json.dumps(OLD_COPY))
    reader = SnapshotReader("postgresql://nobody@127.0.0.1:1/x", poll_s=RARELY_S, copy_path=tmp_path / "copy")
    reader.start()
    current = reader.current
    assert (current.epoch, set(current.models), dict(current.keys)) == (7, {"a", "b"}, {})
    placement = current.model("a").placement
    assert (placement.pinned, placement.machine_profiles) == (True, ("l4",))
    reader.stop()


def test_what_a_copy_lacks_is_there_when_postgres_is_back(own_postgres: PostgresServer, tmp_path: Path) -> None:
    """The release that wrote the copy may have known less than this one, at the very same epoch."""
    url, copy = own_postgres.fresh_database(), tmp_path / "copy"
    engine = open_engine(url)
    write(engine, *(row("model", name) for name in ("a", "b", "c")))
    engine.dispose()
    first = SnapshotReader(url, poll_s=RARELY_S, copy_path=copy)
    first.start()
    first.stop()
    content = json.loads(copy.read_bytes())
    content["models"] = [{**one, "options": {"old": True}} for one in content["models"] if one["id"] != "b"]
    copy.write_text(json.dumps(content))
    own_postgres.stop()
    second = SnapshotReader(url, poll_s=RARELY_S, copy_path=copy)
    second.start()
    old = second.current.model("a")
    own_postgres.start()
    second.poll_soon()
    wait_until(lambda: second.is_connected, 20, "PostgreSQL to be back")
    assert second.current == first.current
    assert second.spec(old.digest) is old, "requests under way are to finish on it"
    second.stop()


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"epoch": 1}', b'{"epoch": 1, "epoch_id": "x", "models": []}']
)
def test_a_copy_that_cannot_be_read_is_none(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "copy").write_bytes(raw)
    reader = SnapshotReader("postgresql://nobody@127.0.0.1:1/x", poll_s=RARELY_S, copy_path=tmp_path / "copy")
    with pytest.raises(SetupError, match="no copy on disk"):
        reader.start()
    reader.stop()


@pytest.mark.parametrize("spec", [{"tenant": 7}, {**CONTENT["key"], "only_from": "10.0.0.0/8"}, [], "x"])
def test_a_key_that_cannot_be_read_whole_opens_nothing(engine: Engine, reader: SnapshotReader, spec: Any) -> None:
    """What a newer release has written into it may be a restriction; everything else is served as before."""
    write(engine, row("key", "k"), row("key", "other"), row("tenant", "t"))
    reader.start()
    with transaction(engine) as session:
        session.get_one(KeyRow, "k").spec = spec
        session.get_one(KeyRow, "k").epoch = raise_epoch(session, lock_epoch(session), actor="newer", reason="test")
    now = catch_up(reader, engine)
    assert (set(now.keys), set(now.tenants)) == ({"other"}, {"t"})


def test_what_a_newer_release_adds_to_a_tenant_is_left_out(engine: Engine, reader: SnapshotReader) -> None:
    write(engine, row("tenant", "t", from_the_future=1))
    reader.start()
    assert reader.current.tenants["t"].weight == 2.0


def plan(engine: Engine, statement: Any) -> list[dict[str, Any]]:
    """The nodes of a statement's plan, from the top."""
    compiled = statement.compile(engine, compile_kwargs={"literal_binds": True})
    with engine.connect() as connection:
        node = connection.execute(text(f"explain (format json) {compiled}")).scalar_one()[0]["Plan"]
    nodes = [node]
    for found in nodes:
        nodes.extend(found.get("Plans", ()))
    return nodes


def analyze(engine: Engine) -> None:
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text("analyze"))


@pytest.mark.parametrize("statistics", [False, True])
def test_a_poll_reads_one_row(engine: Engine, statistics: bool) -> None:
    for number in range(20):
        write(engine, row("setting", "s", number=number))  # dead rows of the epoch
    if statistics:
        analyze(engine)
    (node,) = plan(engine, PRESENT)
    assert (node["Relation Name"], node["Plan Rows"]) == ("farm_epoch", 1)


def test_a_delta_looks_only_at_what_is_newer(engine: Engine) -> None:
    epoch = write(engine, *(row("model", f"m{number}") for number in range(1000))).epoch
    write(engine, row("model", "m7", options={"changed": True}))
    analyze(engine)
    nodes = plan(engine, NEWER.params(epoch=epoch))
    (models,) = (node for node in nodes if node.get("Relation Name") == "models")
    assert models["Index Name"] == "ix_models_epoch"


def test_nothing_is_prepared_that_a_pooler_might_look_for_elsewhere(engine: Engine) -> None:
    with engine.connect() as connection:
        for _ in range(20):
            connection.execute(PRESENT)
        assert connection.execute(text("select count(*) from pg_prepared_statements")).scalar() == 0
