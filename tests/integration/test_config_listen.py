"""The nudge: a change is heard of at once, and whatever becomes of that, the poll goes on."""

import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy import Engine, make_url, text
from sqlalchemy.orm import Session

from config_db.engine import open_engine, transaction
from config_db.listening import Listener
from config_db.publish import Put, publish
from config_db.reader import SnapshotReader
from tests.config_writes import RARELY_S
from tests.integration.test_config_reader import run_python
from tests.services import PostgresServer, wait_until

LISTENING = "select count(*) from pg_stat_activity where datname = current_database() and query ilike 'listen %'"


def write(engine: Engine, name: str) -> int:
    with transaction(engine) as session:
        return publish(session, [Put("setting", name, {"value": 1})], actor="ann", reason="test").epoch


def wait_listening(reader: SnapshotReader) -> None:
    wait_until(lambda: reader.is_listening, 10, "the reader to listen")


@pytest.fixture
def reader(reader: SnapshotReader) -> SnapshotReader:
    reader.start()
    return reader


def test_a_change_is_heard_of_at_once(engine: Engine, reader: SnapshotReader) -> None:
    wait_listening(reader)
    for name in ("a", "b"):
        epoch = write(engine, name)
        wait_until(lambda epoch=epoch: reader.current.epoch == epoch, 20, "the change")
    assert set(reader.current.settings) == {"a", "b"}


def test_what_is_changed_before_it_listens_is_not_missed(database_url: str, engine: Engine) -> None:
    """Between the first reading and the first word of PostgreSQL, anything may happen."""
    reader = SnapshotReader(database_url, poll_s=RARELY_S, copy_path=None)
    late: list[int] = []
    reader.subscribe(lambda _: None if late else late.append(write(engine, "late")))
    reader.start()
    assert reader.current.epoch < late[0]
    wait_until(lambda: reader.current.epoch == late[0], 10, "the change")
    reader.stop()


def test_a_change_that_is_taken_back_is_not_told(engine: Engine, reader: SnapshotReader) -> None:
    wait_listening(reader)
    told: list[int] = []
    reader.subscribe(lambda snapshot: told.append(snapshot.epoch))
    with Session(engine) as session:
        publish(session, [Put("setting", "lost", {})], actor="ann", reason="test")
        session.rollback()
    epoch = write(engine, "kept")
    wait_until(lambda: told == [epoch], 20, "the one change")
    assert set(reader.current.settings) == {"kept"}


def test_a_listener_that_is_lost_comes_back(engine: Engine, reader: SnapshotReader) -> None:
    wait_listening(reader)
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        assert connection.execute(text(LISTENING)).scalar() == 1
        connection.execute(text(LISTENING.replace("count(*)", "pg_terminate_backend(pid)")))
    wait_until(lambda: not reader.is_listening, 10, "the reader to notice")
    wait_listening(reader)
    epoch = write(engine, "a")
    wait_until(lambda: reader.current.epoch == epoch, 20, "the change")


def test_a_restart_of_postgres_costs_the_nudge_for_a_while(own_postgres: PostgresServer) -> None:
    url = own_postgres.fresh_database()
    engine, reader = open_engine(url), SnapshotReader(url, poll_s=RARELY_S, copy_path=None)
    reader.start()
    wait_listening(reader)
    own_postgres.stop()
    wait_until(lambda: not reader.is_listening, 10, "the reader to notice")
    own_postgres.start()
    wait_listening(reader)
    epoch = write(engine, "a")
    wait_until(lambda: reader.current.epoch == epoch, 20, "the change")
    reader.stop()
    engine.dispose()


class Pooler:
    """Stands before PostgreSQL and lets only its first client through; all others are taken and never answered."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.silenced: list[socket.socket] = []
        self._open: list[socket.socket] = [self._server]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        client, _ = self._server.accept()
        behind = socket.create_connection(("127.0.0.1", self._upstream))
        self._open += [client, behind]
        for pair in ((client, behind), (behind, client)):
            threading.Thread(target=self._pass_on, args=pair, daemon=True).start()
        while True:
            try:
                self.silenced.append(self._server.accept()[0])
            except OSError:
                return

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            return

    def close(self) -> None:
        for one in [*self._open, *self.silenced]:
            one.close()


def test_a_listener_that_is_never_answered_costs_the_nudge_and_no_poll(
    postgres_server: PostgresServer, database_url: str, engine: Engine
) -> None:
    pooler = Pooler(postgres_server.port)
    url = make_url(database_url).set(host="127.0.0.1", port=pooler.port, query={})
    reader = SnapshotReader(url.render_as_string(hide_password=False), poll_s=0.1, copy_path=None)
    reader.start()
    wait_until(lambda: pooler.silenced, 10, "the listener to try")
    for name in ("a", "b", "c"):
        epoch = write(engine, name)
        wait_until(lambda epoch=epoch: reader.current.epoch == epoch, 4, "the poll, while the listener waits")
        assert not reader.is_listening
    wait_until(lambda: len(pooler.silenced) > 1, 10, "the listener to give up and try again")
    assert reader.is_connected
    reader.stop()
    pooler.close()


def test_greenlets_go_on_while_the_reader_listens(database_url: str, engine: Engine, tmp_path: Path) -> None:
    pytest.importorskip("gevent")
    write(engine, "before")
    program = """
from gevent import monkey
monkey.patch_all()
import gevent
from config_db.engine import open_engine, transaction
from config_db.publish import Put, publish
from config_db.reader import SnapshotReader
reader = SnapshotReader(sys.argv[1], poll_s=600, copy_path=None)
reader.start()
with gevent.Timeout(20):
    while not reader.is_listening:
        gevent.sleep(0.01)
    with transaction(open_engine(sys.argv[1])) as session:
        epoch = publish(session, [Put("setting", "after", {})], actor="ann", reason="test").epoch
    while reader.current.epoch != epoch:
        gevent.sleep(0.01)
print(sorted(reader.current.settings))
reader.stop()
"""
    assert run_python(program, database_url, cwd=tmp_path) == "['after', 'before']"


def test_a_stopped_reader_leaves_no_connection(database_url: str, engine: Engine) -> None:
    readers = [SnapshotReader(database_url, poll_s=RARELY_S, copy_path=None) for _ in range(3)]
    for reader in readers:
        reader.start()
        wait_listening(reader)
    with engine.connect() as connection:
        assert connection.execute(text(LISTENING)).scalar() == 3
        connection.rollback()
        for reader in readers:
            reader.stop()

        def are_gone() -> bool:
            connection.rollback()
            return connection.execute(text(LISTENING)).scalar() == 0

        wait_until(are_gone, 20, "the connections to be gone")


def test_the_name_of_the_database_is_looked_up_where_a_greenlet_can_wait(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libpq would do so itself, for a whole process at once; ours is told the address."""
    asked: list[str] = []
    resolve = socket.getaddrinfo

    def note(host: str, *rest: Any, **named: Any) -> Any:
        asked.append(host)
        return resolve("127.0.0.1" if host == "db.invalid" else host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", note)
    params = conninfo_to_dict(database_url)
    listener = Listener(make_conninfo(**{**params, "host": "db.invalid"}))

    def listens() -> bool:
        listener.wait(0.1)
        return listener.is_listening

    wait_until(listens, 10, "the listener to be connected")
    assert "db.invalid" in asked
    listener.close()
