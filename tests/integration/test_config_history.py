"""The past of the config DB: the way back to it, how it is told, and how long it is kept."""

from datetime import timedelta
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from sqlalchemy import Engine, event, func, select, update
from sqlalchemy.orm import Session

from common.errors import ConfigError, EpochConflictError, NotFoundError
from config_db.engine import transaction
from config_db.epoch_entries import latest_epochs
from config_db.history import PAGE_BYTES, HistoryEntry, last_changed_by_others, read_history
from config_db.past import RESTORED, contents_at, rollback
from config_db.publish import Delete, Put
from config_db.reader import SnapshotReader
from config_db.retention import EPOCHS_AT_ONCE, SETTING, prune
from config_db.schema import TOMBSTONE_KEPT, EpochRow, FarmEpoch, HistoryRow, ModelRow, Origin, SettingRow
from tests.config_writes import KINDS, WHO, now, write


def test_a_rollback_is_a_new_epoch_with_old_contents(engine: Engine) -> None:
    write(engine, Put("model", "m", {"id": "m", "aliases": ["x"]}), Put("tenant", "t", {}), Put("key", "k", {"n": 1}))
    old = write(engine, Put("setting", "s", {"v": 1}), Put("pool", "p", {"v": 1})).epoch
    before = now(engine)[1]
    write(engine, Delete("model", "m"), Put("model", "n", {"id": "n", "aliases": ["x"]}), Delete("tenant", "t"))
    write(engine, Put("setting", "s", {"v": 2}), Delete("pool", "p"), Put("key", "k", {"n": 2}), Put("key", "l", {}))
    with transaction(engine) as session:
        done = rollback(session, old, actor="ann", reason="undo")
    epoch, contents = now(engine)
    assert epoch == done.epoch == old + 3
    assert {kind: contents[kind] for kind in RESTORED} == {kind: before[kind] for kind in RESTORED}
    assert contents["key"] == {"k": {"n": 2}, "l": {}}
    assert {change.kind for change in done.changes} == set(RESTORED)
    with transaction(engine) as session:
        assert rollback(session, old, actor="ann", reason="again").changes == ()
    with transaction(engine) as session:
        rollback(session, 1, actor="ann", reason="all of it")
    assert now(engine)[1] == {kind: contents["key"] if kind == "key" else {} for kind in KINDS}


def test_a_rollback_leaves_what_is_not_the_operators(engine: Engine) -> None:
    """Leases of clients and models that the Hub brought since are nobody's change to be undone."""
    machines: dict[str, Any] = {"machine_profiles": {"l4": 1}}
    lease = {**machines, "client": "c", "expires_at": "2026-01-01T00:00:00Z"}
    old = write(
        engine, Put("model", "m", {"id": "m", "v": 1}), Put("pool", "kept", lease), Put("pool", "own", machines)
    )
    later = {**lease, "expires_at": "2027-01-01T00:00:00Z"}
    write(engine, Put("pool", "kept", later), Put("pool", "new", later), Put("model", "asked/for", {}, "auto"))
    write(engine, Put("pool", "gone", lease), Delete("pool", "own"), Put("model", "m", {"id": "m", "v": 2}))
    with transaction(engine) as session:
        done = rollback(session, old.epoch, actor="ann", reason="undo")
    assert {(change.kind, change.name) for change in done.changes} == {("model", "m"), ("pool", "own")}
    contents = now(engine)[1]
    assert contents["pool"] == {"kept": later, "new": later, "gone": lease, "own": machines}
    assert contents["model"] == {"m": {"id": "m", "v": 1}, "asked/for": {}}


def test_a_rollback_leaves_no_usable_key_without_its_tenant(engine: Engine) -> None:
    old = write(engine, Put("setting", "s", {"v": 1})).epoch
    key = {"tenant": "t", "secret_sha256": "0" * 64, "prefix": "fh_1", "created_at": "2026-01-01T00:00:00Z"}
    write(engine, Put("tenant", "t", {}), Put("key", "k", key), Put("setting", "s", {"v": 2}))
    with pytest.raises(ConfigError, match="key k is of the tenant 't'"), transaction(engine) as session:
        rollback(session, old, actor="ann", reason="undo")
    assert now(engine)[1]["tenant"] == {"t": {}}
    write(engine, Put("key", "k", {**key, "revoked_at": "2026-01-02T00:00:00Z"}))
    with transaction(engine) as session:
        rollback(session, old, actor="ann", reason="undo")
    assert now(engine)[1]["tenant"] == {}


def test_a_rollback_keeps_how_each_model_came_here(engine: Engine) -> None:
    origins: tuple[Origin, ...] = ("filesystem", "api", "auto")
    old = write(engine, *(Put("model", name, {"v": 1}, name) for name in origins)).epoch
    write(engine, *(Put("model", name, {"v": 2}, name) for name in origins))
    write(engine, *(Delete("model", name) for name in origins))
    with transaction(engine) as session:
        rollback(session, old, actor="ann", reason="undo")
        assert {row.id: row.origin for row in session.scalars(select(ModelRow))} == {one: one for one in origins}


def test_the_past_of_a_row_is_read_once_however_often_it_changed(engine: Engine) -> None:
    """Each change holds the whole row as it was."""
    old = write(engine, Put("setting", "s", {"v": -1})).epoch
    for value in range(20):
        write(engine, Put("setting", "s", {"v": value}))
    fetched: list[int] = []
    with Session(engine) as session:

        @event.listens_for(engine, "after_cursor_execute")
        def count(_c: Any, cursor: Any, *_rest: Any) -> None:
            fetched.append(cursor.rowcount)

        assert contents_at(session, old)["setting"] == {"s": {"v": -1}}
        event.remove(engine, "after_cursor_execute", count)
    assert max(fetched) == 1


def test_a_page_of_the_history_has_a_bounded_size(engine: Engine) -> None:
    large = [{"v": f"{n}" * (PAGE_BYTES // 3)} for n in range(6)]
    for value in large:
        write(engine, Put("setting", "s", value))
    write(engine, *(Put("setting", f"s{n}", value) for n, value in enumerate(large)))
    told: list[HistoryEntry] = []
    before = None
    with Session(engine) as session:
        while True:
            page = read_history(session, limit=200, before=before)
            assert len(msgspec.json.encode(page)) < PAGE_BYTES * 1.1
            told += page.entries
            if (before := page.before) is None:
                break
        everything = session.scalars(select(EpochRow.number).order_by(EpochRow.number.desc())).all()
    assert [entry.epoch for entry in told] == everything
    assert told[0].change_count == 6
    assert 1 <= len(told[0].changes) < 6
    assert all(entry.changes for entry in told[:-1])


def test_a_rollback_that_cannot_be_changes_nothing(engine: Engine) -> None:
    epoch = write(engine, Put("setting", "s", {})).epoch
    for unknown in (0, -1, epoch + 1, 2**62):
        with pytest.raises(NotFoundError) as missing, transaction(engine) as session:
            rollback(session, unknown, actor="ann", reason="test")
        assert missing.value.param == "epoch"
    with pytest.raises(EpochConflictError), transaction(engine) as session:
        rollback(session, 1, actor="ann", reason="test", expected=epoch - 1)
    assert now(engine)[0] == epoch


def test_what_was_not_there_is_nothing_in_the_history(engine: Engine) -> None:
    """Not JSON's null: whoever asks the table in SQL finds additions and deletions."""
    write(engine, Put("setting", "s", {}))
    write(engine, Delete("setting", "s"))
    with Session(engine) as session:
        assert session.scalar(select(func.count()).where(HistoryRow.before.is_(None))) == 1
        assert session.scalar(select(func.count()).where(HistoryRow.after.is_(None))) == 1


def test_tombstones_stay_until_every_reader_has_looked(engine: Engine) -> None:
    writes = [Put("setting", name, {}) for name in ("old", "young", "live")] + [Put("model", "m", {"id": "m"})]
    write(engine, *writes)
    gone = write(engine, Delete("setting", "old"), Delete("setting", "young"), Delete("model", "m")).epoch
    ages = {"old": TOMBSTONE_KEPT + timedelta(hours=1), "young": TOMBSTONE_KEPT - timedelta(hours=1)}
    with transaction(engine) as session:
        for name, age in ages.items():
            session.execute(update(SettingRow).where(SettingRow.id == name).values(deleted_at=func.now() - age))
    write(engine, Put("setting", "new", {}))
    with Session(engine) as session:
        rows = {row.id: row for row in session.scalars(select(SettingRow))}
        model = session.get_one(ModelRow, "m")
    assert set(rows) == {"young", "live", "new"}
    assert (rows["young"].epoch, model.epoch) == (gone, gone)
    assert model.deleted_at is not None
    assert now(engine)[1]["setting"] == {"live": {}, "new": {}}
    back = write(engine, Put("setting", "young", {"v": 1})).epoch
    with Session(engine) as session:
        row = session.get_one(SettingRow, "young")
    assert (row.epoch, row.deleted_at, row.spec) == (back, None, {"v": 1})
    assert write(engine, Delete("setting", "never was")).changes == ()


def age(engine: Engine, *, up_to: int, days: float) -> None:
    """Make epochs look as old as this."""
    with transaction(engine) as session:
        raised = func.now() - timedelta(days=days)
        session.execute(update(EpochRow).where(EpochRow.number <= up_to).values(raised_at=raised))


def fails(engine: Engine, epoch: int) -> str:
    """What a rollback to an epoch says that cannot be."""
    with pytest.raises(NotFoundError) as refused, transaction(engine) as session:
        rollback(session, epoch, **WHO)
    assert refused.value.param == "epoch"
    return refused.value.message


@pytest.mark.parametrize(("keep", "kept_days"), [(None, 90), ({"days": 2}, 2)])
def test_the_history_is_kept_for_as_long_as_is_said(
    engine: Engine, keep: dict[str, Any] | None, kept_days: float
) -> None:
    if keep is not None:
        write(engine, Put("setting", SETTING, keep))
    write(
        engine, Put("model", "old", {"id": "old"}), Put("model", "gone", {"id": "gone"}), Put("setting", "s", {"v": 0})
    )
    last = write(engine, Put("setting", "s", {"v": 1}), Delete("model", "gone")).epoch
    age(engine, up_to=last, days=kept_days - 0.1)
    first = write(engine, Put("setting", "s", {"v": 2}), Put("model", "new", {"id": "new"})).epoch
    with transaction(engine) as session:
        assert contents_at(session, last)["setting"]["s"] == {"v": 1}, "it is not due yet"
    age(engine, up_to=last, days=kept_days + 0.1)
    write(engine, Put("setting", "s", {"v": 3}))
    assert f"begins with epoch {first}" in fails(engine, last)
    assert f"begins with epoch {first}" in fails(engine, 1)
    with transaction(engine) as session:
        assert [one.epoch for one in read_history(session, limit=9).entries] == [first + 1, first]
        assert [one.epoch for one in latest_epochs(session, limit=9)] == [first + 1, first]
        rows = session.execute(select(HistoryRow.name, HistoryRow.epoch).where(HistoryRow.epoch < first))
        assert {(row.name, row.epoch) for row in rows} == {("old", last - 1), ("gone", last)}
        assert last_changed_by_others(session, "model", "farmhand up") == {"old", "gone", "new"}
        rollback(session, first, **WHO)
    assert now(engine)[1]["setting"]["s"] == {"v": 2}
    assert set(now(engine)[1]["model"]) == {"old", "new"}


def test_a_write_purges_some_and_the_command_all(engine: Engine) -> None:
    last = 3 * EPOCHS_AT_ONCE
    with transaction(engine) as session:
        for number in range(2, last):
            session.add(EpochRow(number=number, id=uuid4(), actor="ann", reason="test"))
        session.execute(update(FarmEpoch).values(number=last - 1))
    age(engine, up_to=last, days=1000)
    write(engine, Put("setting", "s", {}))
    with transaction(engine) as session:
        assert session.scalar(select(func.count()).select_from(EpochRow)) == last - EPOCHS_AT_ONCE
        assert prune(session) == last
    with transaction(engine) as session:
        assert prune(session) == last
        assert session.scalars(select(EpochRow.number)).all() == [last], "the present epoch stays, however old"


def test_a_reader_behind_the_purge_reads_everything_again(engine: Engine, reader: SnapshotReader) -> None:
    spec = {"id": "", "family": "fake", "source": {"path": "/"}}
    last = write(engine, *(Put("model", name, {**spec, "id": name}) for name in ("same", "gone"))).epoch
    reader.poll()
    before = reader.current.models["same"]
    write(engine, Delete("model", "gone"))
    write(engine, Put("setting", "s", {"v": 0}))
    reader.poll()
    assert reader.current.models["same"] is before, "this was read again, too: the test proves nothing"
    write(engine, Put("setting", SETTING, {"days": 1}))
    age(engine, up_to=last + 3, days=2)
    write(engine, Put("setting", "s", {"v": 1}))
    reader.poll()
    assert reader.current.models["same"] is not before
    assert (set(reader.current.models), reader.current.epoch) == ({"same"}, last + 4)


@pytest.mark.parametrize("keep", [{"days": 0}, {"days": "1"}, {"weeks": 1}])
def test_a_setting_that_cannot_be_read_purges_nothing(engine: Engine, keep: dict[str, Any]) -> None:
    last = write(engine, Put("setting", SETTING, keep), Put("setting", "s", {"v": 1})).epoch
    age(engine, up_to=last, days=1000)
    write(engine, Put("setting", "s", {"v": 2}))
    with transaction(engine) as session:
        assert prune(session) == 1
        rollback(session, last, **WHO)
    assert now(engine)[1]["setting"]["s"] == {"v": 1}
