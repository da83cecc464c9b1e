"""Writers of the config DB: whatever they do at once, epochs are one line of history, whole and without gaps."""

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import psycopg
import pytest
from sqlalchemy import Engine, event, select, text
from sqlalchemy.orm import Session

import config_db.epochs
from cli import database
from common.errors import ConfigError, ConfigUnavailableError, EpochConflictError
from config_db.engine import open_engine, transaction
from config_db.epochs import epoch_now, lock_epoch
from config_db.past import contents_at, rollback
from config_db.publish import CHANNEL, Delete, Published, Put, live, publish
from config_db.schema import ROWS, EpochRow, HistoryRow, Kind, ModelRow
from tests.config_writes import KINDS, Contents, now, present, write
from tests.services import DYING_WITH_US, wait_until

ROOT = Path(__file__).resolve().parents[2]
WRITERS = 16
TURNS = 20


@dataclass
class Log:
    """What all writers and readers of one test have seen; each list is appended to by many threads."""

    published: list[Published] = field(default_factory=list)
    seen: list[tuple[int, Contents]] = field(default_factory=list)
    counted: Counter[str] = field(default_factory=Counter)
    errors: list[BaseException] = field(default_factory=list)

    def watch(self, work: Callable[[], None]) -> threading.Thread:
        """A thread that runs ``work`` and keeps what it raises."""

        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - told to the test's own thread
                self.errors.append(error)

        return threading.Thread(target=run)


class Writer:
    """One writer with a connection of its own, that does something else every turn."""

    def __init__(self, url: str, number: int, log: Log) -> None:
        self._engine = open_engine(url)
        self._random = Random(number)
        self._number = number
        self._log = log

    def run(self) -> None:
        turns: list[Callable[[], None]] = [self._write, self._write, self._roll_back, self._count, self._count_freely]
        for turn in range(TURNS):
            self._turn = turn
            with suppress(EpochConflictError, ConfigError):  # refused: it has left no trace, or the replay will tell
                self._random.choice(turns)()
        self._engine.dispose()

    def _write(self) -> None:
        """Some rows at once; now and then as of an epoch that may be past, or with a name that may be taken."""
        writes = [self._change() for _ in range(self._random.randint(1, 4))]
        with transaction(self._engine) as session:
            known = epoch_now(session)[0] - self._random.choice((0, 0, 1))
            expected = known if self._random.random() < 0.3 else None
            self._keep(session, publish(session, writes, actor=str(self._number), reason="w", expected=expected))

    def _change(self) -> Put | Delete:
        kind = self._random.choice(KINDS)
        name = f"{kind}{self._random.randrange(5)}"
        if self._random.random() < 0.3:
            return Delete(kind, name)
        spec: dict[str, Any] = {"id": name, "by": self._number, "turn": self._turn}
        if kind == "model" and self._random.random() < 0.5:
            spec["aliases"] = [f"alias{self._random.randrange(8)}"]
        return Put(kind, name, spec if self._random.random() < 0.8 else {"id": name})

    def _roll_back(self) -> None:
        with transaction(self._engine) as session:
            to = self._random.randint(1, epoch_now(session)[0])
            self._keep(session, rollback(session, to, actor=str(self._number), reason="r"))

    def _count(self) -> None:
        """Add one to a number that is read under the lock."""
        with transaction(self._engine) as session:
            lock_epoch(session)
            self._add(session, "locked", expected=None)

    def _count_freely(self) -> None:
        """Add one to a number that is read without it, if nothing has changed since."""
        with transaction(self._engine) as session:
            expected = epoch_now(session)[0]
            self._add(session, "free", expected=expected)

    def _add(self, session: Session, name: str, *, expected: int | None) -> None:
        # a key's row, since a rollback leaves those as they are
        number = live(session, "key", [name]).get(name, {"n": 0})["n"] + 1
        done = publish(session, [Put("key", name, {"n": number})], actor="c", reason="c", expected=expected)
        self._keep(session, done)
        self._log.counted[name] += 1

    def _keep(self, session: Session, done: Published) -> None:
        """What this transaction sees of itself; it commits, or the test fails."""
        self._log.published.append(done)
        self._log.seen.append((done.epoch, present(session)))


def read_on(url: str, log: Log, is_over: threading.Event) -> None:
    engine = open_engine(url)
    while not is_over.is_set():
        log.seen.append(now(engine))
    engine.dispose()


def test_sixteen_writers_at_once_make_one_history(database_url: str, engine: Engine) -> None:
    log, is_over = Log(), threading.Event()
    writers = [log.watch(Writer(database_url, number, log).run) for number in range(WRITERS)]
    reader = log.watch(lambda: read_on(database_url, log, is_over))
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    is_over.set()
    reader.join()
    assert log.errors == []

    last, contents = now(engine)
    changed = {done.epoch: done for done in log.published if done.changes}
    assert len(changed) == sum(bool(done.changes) for done in log.published), "two changes with one epoch"
    assert sorted(changed) == list(range(2, last + 1)), "a gap, or an epoch that nobody published"
    assert last > WRITERS * TURNS / 2
    assert {name: spec["n"] for name, spec in contents["key"].items() if "n" in spec} == log.counted, "a lost update"

    replayed = replay(engine, changed)
    assert replayed[last] == contents
    assert [epoch for epoch, seen in log.seen if replayed[epoch] != seen] == []
    with Session(engine) as session:
        assert [epoch for epoch in replayed if contents_at(session, epoch, KINDS) != replayed[epoch]] == []


def replay(engine: Engine, published: dict[int, Published]) -> dict[int, Contents]:
    """The contents at every epoch by the history alone, from the empty farm on; proves that each step fits."""
    contents: Contents = {kind: {} for kind in KINDS}
    replayed = {1: {kind: dict(rows) for kind, rows in contents.items()}}
    last_change: dict[tuple[str, str], int] = {}
    with Session(engine) as session:
        epochs = session.scalars(select(EpochRow).order_by(EpochRow.number)).all()
        rows = session.scalars(select(HistoryRow).order_by(HistoryRow.id)).all()
        stamped = {
            (kind, name): epoch
            for kind in KINDS
            for name, epoch in session.execute(select(ROWS[kind].id, ROWS[kind].epoch))
        }
    assert [row.epoch for row in rows] == sorted(row.epoch for row in rows)
    assert [one.raised_at for one in epochs] == sorted(one.raised_at for one in epochs)
    for one in epochs[1:]:
        assert one.id == published[one.number].epoch_id
        steps = [row for row in rows if row.epoch == one.number]
        told = {(step.kind, step.name): (step.before, step.after) for step in published[one.number].changes}
        assert {(row.kind, row.name): (row.before, row.after) for row in steps} == told
        assert len(steps) == len(told)
        for row in steps:
            kind: Kind = row.kind  # type: ignore[assignment]  # as text in its column
            assert contents[kind].get(row.name) == row.before
            last_change[kind, row.name] = one.number
            contents[kind].pop(row.name, None)
            if row.after is not None:
                contents[kind][row.name] = row.after
        replayed[one.number] = {kind: dict(sorted(rows.items())) for kind, rows in contents.items()}
    assert stamped == last_change, "a row, or a tombstone, with another epoch than that of its last change"
    return replayed


INSIDE = {
    "the epoch is raised": "INSERT INTO epochs",
    "the row is written": "INSERT INTO models",
    "the tombstone is written": "UPDATE models",
    "the history is written": "INSERT INTO history",
    "the news is told": "select pg_notify",
}


def stop_inside(url: str, statement: str) -> NoReturn:
    """A writer's process that gets as far as one statement, says so and waits to be killed."""
    engine = open_engine(url)

    @event.listens_for(engine, "after_cursor_execute")
    def stop(_: object, __: object, executed: str, *___: object) -> None:
        if executed.startswith(statement):
            print("inside", flush=True)  # noqa: T201 - to the test
            sys.stdin.read()

    write(engine, Put("model", "killed", {"id": "killed"}), Delete("model", "kept"))
    raise SystemExit(f"never came to {statement!r}")


@pytest.mark.parametrize("statement", INSIDE.values(), ids=INSIDE)
def test_a_writer_killed_inside_its_transaction_leaves_no_trace(
    database_url: str, engine: Engine, statement: str
) -> None:
    before = write(engine, Put("model", "kept", {"id": "kept"})).epoch
    code = f"from {__name__} import stop_inside; stop_inside({database_url!r}, {statement!r})"
    with (
        psycopg.connect(plain_url(engine), autocommit=True) as watching,
        subprocess.Popen(
            [*DYING_WITH_US, sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child,
    ):
        watching.execute(f"listen {CHANNEL}")
        assert child.stdout is not None
        assert child.stdout.readline() == b"inside\n"
        waiting = threading.Thread(target=lambda: write(engine, Put("model", "next", {"id": "next"})))
        waiting.start()
        wait_until(lambda: states(watching) == {("idle in transaction", True), ("active", False)}, 10, "one to wait")
        assert now(engine)[0] == before
        child.kill()
        waiting.join(20)
        told = [notice.payload for notice in watching.notifies(timeout=10, stop_after=1)]
    last, contents = now(engine)
    assert last == before + 1
    assert contents["model"] == {"kept": {"id": "kept"}, "next": {"id": "next"}}
    assert told == [str(last)]
    with Session(engine) as session:
        assert session.scalars(select(EpochRow.number).order_by(EpochRow.number)).all() == [1, before, last]
        assert session.scalars(select(HistoryRow.name).order_by(HistoryRow.id)).all() == ["kept", "next"]
        assert session.get(ModelRow, "killed") is None


def hold_the_lock(url: str) -> NoReturn:
    """A writer's process that takes the lock and says no more; others give it up sooner here than in earnest."""
    config_db.epochs.IDLE_S = 1  # type: ignore[misc]  # a constant, and too long to wait for
    with transaction(open_engine(url)) as session:
        lock_epoch(session)
        print("inside", flush=True)  # noqa: T201 - to the test
        sys.stdin.read()
    raise SystemExit("was told to go on")


def test_a_writer_that_is_silent_holds_up_the_others_for_a_while_only(database_url: str, engine: Engine) -> None:
    """Its connection is open: to PostgreSQL, a writer without power looks like this one for two hours."""
    code = f"from {__name__} import hold_the_lock; hold_the_lock({database_url!r})"
    with subprocess.Popen(
        [*DYING_WITH_US, sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"inside\n"
        written: list[Published] = []
        waiting = threading.Thread(target=lambda: written.append(write(engine, Put("setting", "s", {}))))
        waiting.start()
        waiting.join(15)
        is_still_there, was_written = child.poll() is None, list(written)
        child.kill()
    waiting.join(20)
    assert is_still_there
    assert [one.epoch for one in was_written] == [2]


def test_a_command_gives_up_what_another_change_keeps_it_from(
    database_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "LOCK_WAIT_S", 0.3)
    with Session(engine) as busy, busy.begin():
        lock_epoch(busy)
        with (
            pytest.raises(ConfigUnavailableError, match="another change of the config DB has not ended"),
            database.writing(database_url) as session,
        ):
            lock_epoch(session)
    with database.writing(database_url) as session:
        lock_epoch(session)


def states(watching: "psycopg.Connection[Any]") -> set[tuple[str, bool]]:
    """State of each other session that is in a transaction, and whether it has written something yet."""
    return set(
        watching.execute(
            "select state, backend_xid is not null from pg_stat_activity where pid != pg_backend_pid() "
            "and datname = current_database() and (state = 'idle in transaction' or wait_event_type = 'Lock')"
        ).fetchall()
    )


def plain_url(engine: Engine) -> str:
    return engine.url.set(drivername="postgresql").render_as_string(hide_password=False)


def test_news_is_told_when_it_is_true(engine: Engine) -> None:
    """Not before the commit, and not at all without one; marks sent meanwhile prove that nothing else was."""
    with psycopg.connect(plain_url(engine), autocommit=True) as listening:
        listening.execute(f"listen {CHANNEL}")

        def mark(word: str) -> list[str]:
            with engine.begin() as connection:
                connection.execute(text("select pg_notify(:channel, :word)"), {"channel": CHANNEL, "word": word})
            told: list[str] = []
            for notice in listening.notifies(timeout=10):
                told.append(notice.payload)
                if notice.payload == word:
                    break
            return told

        with Session(engine) as session:
            publish(session, [Put("setting", "a", {})], actor="ann", reason="test")
            assert mark("open") == ["open"]
            session.rollback()
        assert mark("rolled back") == ["rolled back"]
        done = write(engine, Put("setting", "a", {}))
        assert mark("committed") == [str(done.epoch), "committed"]
        write(engine, Put("setting", "a", {}))
        assert mark("unchanged") == ["unchanged"]


def test_a_write_as_of_a_past_epoch_changes_nothing(engine: Engine) -> None:
    old = write(engine, Put("setting", "s", {"v": 1})).epoch
    write(engine, Put("setting", "s", {"v": 2}))
    for writes in ([Put("setting", "s", {"v": 3})], [Put("setting", "s", {"v": 2})], []):
        with pytest.raises(EpochConflictError) as caught:
            write(engine, *writes, expected=old)
        assert caught.value.details == {"expected": old, "current": old + 1}
    assert now(engine) == (old + 1, {kind: {"s": {"v": 2}} if kind == "setting" else {} for kind in KINDS})


def test_names_stay_one_models_own(engine: Engine) -> None:
    epoch = write(engine, Put("model", "a", {"id": "a", "aliases": ["x"]})).epoch
    for writes in (
        [Put("model", "x", {"id": "x"})],
        [Put("model", "b", {"id": "b", "aliases": ["a"]})],
        [Put("model", "b", {"id": "b", "aliases": ["x"]})],
        [Put("setting", "s", {}), Put("model", "b", {"id": "b"}), Put("model", "c", {"id": "c", "aliases": ["b"]})],
    ):
        with pytest.raises(ConfigError, match=r"(is a name|its id is an alias) of model '?\w"):
            write(engine, *writes)
    assert now(engine)[0] == epoch
    write(engine, Put("model", "a", {"id": "a"}), Put("model", "b", {"id": "b", "aliases": ["x"]}))
    write(engine, Delete("model", "b"), Put("model", "x", {"id": "x"}))
    assert set(now(engine)[1]["model"]) == {"a", "x"}


def test_of_two_writes_of_one_row_the_later_counts(engine: Engine) -> None:
    done = write(engine, Put("setting", "s", {"v": 1}), Delete("setting", "s"), Put("setting", "s", {"v": 2}))
    assert [(change.before, change.after) for change in done.changes] == [(None, {"v": 2})]
    assert write(engine, Put("setting", "s", {"v": 3}), Put("setting", "s", {"v": 2})).changes == ()


@pytest.mark.parametrize(("old", "new"), [(1, True), (0, False), ([1], [True]), ({"x": 0}, {"x": False}), (None, "")])
def test_what_python_takes_for_equal_is_a_change_all_the_same(engine: Engine, old: Any, new: Any) -> None:
    first = write(engine, Put("setting", "s", {"v": old})).epoch
    assert write(engine, Put("setting", "s", {"v": new})).epoch == first + 1
    assert str(now(engine)[1]["setting"]["s"]["v"]) == str(new)
    assert write(engine, Put("setting", "s", {"v": new})).changes == ()


def test_a_number_that_postgres_writes_otherwise_is_no_change(engine: Engine) -> None:
    content = {"a": 1e17, "b": 1e-7, "c": 0.1, "d": -0.0, "e": 2**63 - 1, "f": 100.0}
    write(engine, Put("setting", "s", content))
    assert write(engine, Put("setting", "s", content)).changes == ()


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "ä", "x" * 10_000])
def test_a_name_that_no_row_can_have_is_no_row(engine: Engine, name: str) -> None:
    with Session(engine) as session:
        assert live(session, "model", [name]) == {}
