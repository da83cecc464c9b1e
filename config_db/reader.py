"""Keeps one process's snapshot of the config DB current: a thread that polls, and is nudged when something changes.

States of a reader: fresh -> connected <-> adrift (Postgres is away; the last snapshot serves on) -> stopped. A copy on
disk lets a process start while Postgres is away. Only the polling thread replaces the snapshot; everyone else reads it.
"""

import random
import threading
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Final

from sqlalchemy.exc import NoResultFound, ProgrammingError, SQLAlchemyError

from common.errors import SetupError
from common.logs import get_logger
from config_db.disk_copy import read_copy, write_copy
from config_db.engine import SILENCE_S, conninfo, is_away, open_engine, reason
from config_db.former_specs import FormerSpecs
from config_db.listening import Listener
from config_db.newer_rows import PRESENT, read_newer, read_whole
from config_db.snapshot import EMPTY, Snapshot
from config_db.spec import ModelSpec

log = get_logger("config_db")

JITTER: Final = 0.2
"""Processes spread their polls: each waits shorter than the interval, by up to this share of it."""
POLL_GAP_S: Final = 0.05
"""However often it is nudged, a process rests so long between two polls: many writers must not keep it busy."""
COPY_GAP_S: Final = 1.0
"""Copies are not written more often; the last one is written with the next poll."""


class SnapshotReader:
    """Owns the snapshot of one process.

    Args:
        database_url: the config DB.
        poll_s: seconds between two looks at the epoch, at most, when nobody tells of a new one.
        copy_path: where the snapshot is kept across restarts; None keeps no copy.
    """

    def __init__(self, database_url: str, *, poll_s: float, copy_path: Path | None) -> None:
        self._engine = open_engine(database_url)
        self._looking = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._reading = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._poll_s = poll_s
        self._copy_path = copy_path
        self._copied = EMPTY
        self._copied_at = float("-inf")
        self._snapshot = EMPTY
        self._former = FormerSpecs()
        self._callbacks: list[Callable[[Snapshot], None]] = []
        self._listener: Listener | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._has_read = False
        self._was_connected = False
        self._answered_at = float("-inf")

    @property
    def current(self) -> Snapshot:
        """The snapshot now held."""
        return self._snapshot

    @property
    def is_connected(self) -> bool:
        """Whether the config DB has answered the last poll, and none is overdue: a frozen one says nothing."""
        return self._was_connected and monotonic() - self._answered_at < self._poll_s + SILENCE_S

    @property
    def is_listening(self) -> bool:
        """Whether a new epoch would be heard of at once, not only with the next poll."""
        return self._listener is not None and self._listener.is_listening

    def start(self) -> None:
        """Load the first snapshot and keep it current; call after any fork.

        Raises:
            SetupError: Postgres cannot be read and there is no copy on disk.
        """
        try:
            self.poll()
        except SQLAlchemyError as error:
            self._start_adrift(error)
        self._listener = Listener(conninfo(self._engine))
        self._thread = threading.Thread(target=self._run, args=(self._listener,), name="config-poll", daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Look at the epoch; fetch what is newer than ours, all in one consistent reading.

        For the polling thread; where that was never started, for any one thread.

        Raises:
            SQLAlchemyError: Postgres cannot be read.
        """
        fresh = self._read()
        if fresh is not None:
            self._replace(fresh)
        self._note_connection(is_connected=True)
        self._keep_copy()

    def _read(self) -> Snapshot | None:
        """The present snapshot; None if it is the one that is held."""
        if self._has_read:  # else there is only a copy, which may lack what the release that wrote it could not read
            with self._looking.connect() as connection:
                if connection.execute(PRESENT).one() == (self._snapshot.epoch, self._snapshot.epoch_id):
                    return None
                fresh = read_newer(connection, self._snapshot)
                if fresh is not None:
                    return fresh
        with self._reading.connect() as connection:
            fresh = read_whole(connection)
            if not self._has_read:
                self._former.recall(connection, fresh)
        self._has_read = True
        return fresh

    def spec(self, digest: str) -> ModelSpec | None:
        """A spec by digest, of this snapshot or a recent one."""
        return self._snapshot.by_digest(digest) or self._former.find(digest)

    def poll_soon(self) -> None:
        """Look at the epoch at once: a message of a newer one was met."""
        if self._listener is not None:
            self._listener.wake()

    def subscribe(self, callback: Callable[[Snapshot], None]) -> None:
        """Call back with every new snapshot, in the polling thread."""
        self._callbacks.append(callback)

    def stop(self) -> None:
        """End the polling thread."""
        self._stopping.set()
        self.poll_soon()
        if self._thread is not None:
            self._thread.join(timeout=5)
        self._engine.dispose()

    def _run(self, listener: Listener) -> None:
        while not self._stopping.wait(POLL_GAP_S):
            interval_s = self._poll_s * random.uniform(1 - JITTER, 1)  # noqa: S311 - no secret
            listener.wait(max(0.0, interval_s - POLL_GAP_S))
            if self._stopping.is_set():
                break
            try:
                self.poll()
            except SQLAlchemyError as error:
                self._note_connection(is_connected=False, why=_why(error))
            except Exception:
                log.exception("config_poll_failed")
        self._keep_copy(at_once=True)
        listener.close()

    def _replace(self, fresh: Snapshot) -> None:
        fresh.prepare(self._snapshot)
        self._former.retire(self._snapshot, fresh)
        self._snapshot = fresh
        log.info("epoch_read", epoch=fresh.epoch, models=len(fresh.models))
        for callback in self._callbacks:
            try:
                callback(fresh)
            except Exception:  # one listener's fault: the others are told, and the next change comes through
                log.exception("epoch_callback_failed", epoch=fresh.epoch)

    def _keep_copy(self, *, at_once: bool = False) -> None:
        """Have the present snapshot on disk, now or, if the last copy is young, with a later poll."""
        if self._copy_path is None or self._copied is self._snapshot:
            return
        if at_once or monotonic() - self._copied_at >= COPY_GAP_S:
            self._copied, self._copied_at = self._snapshot, monotonic()
            write_copy(self._copy_path, self._copied)

    def _note_connection(self, *, is_connected: bool, why: str = "") -> None:
        if self._was_connected and not is_connected:
            log.warning("config_db_away", reason=why, epoch=self._snapshot.epoch)
        elif is_connected and not self._was_connected:
            log.info("config_db_connected")
        self._was_connected = is_connected
        if is_connected:
            self._answered_at = monotonic()

    def _start_adrift(self, error: SQLAlchemyError) -> None:
        copy = read_copy(self._copy_path) if self._copy_path is not None else None
        if copy is None:
            raise SetupError(f"{_why(error)}; and there is no copy on disk to start from") from error
        copy.prepare()
        self._snapshot = self._copied = copy
        log.warning("config_db_away", reason=_why(error), epoch=copy.epoch, serving="the copy on disk")


def _why(error: SQLAlchemyError) -> str:
    """Why the config DB cannot be read, as one line."""
    if is_away(error):
        return f"PostgreSQL does not answer: {reason(error)}"
    if isinstance(error, (ProgrammingError, NoResultFound)):
        return f"the config DB has no schema yet, run `farmhand migrate`: {reason(error)}"
    return f"the config DB cannot be read: {reason(error)}"
