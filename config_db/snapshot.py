"""What is served, as this process sees it: an immutable snapshot of one epoch, kept current by a polling thread.

States of a reader: fresh -> connected <-> adrift (Postgres is away; the last snapshot serves on) -> stopped. A copy on
disk lets a process start while Postgres is away. Only the polling thread replaces the snapshot; everyone else reads it.
"""

import difflib
import os
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Final
from uuid import UUID

import msgspec
from sqlalchemy import Engine, func, select
from sqlalchemy.exc import NoResultFound, ProgrammingError, SQLAlchemyError
from sqlalchemy.orm import Session

from common.errors import ModelNotFoundError, SetupError
from common.logs import get_logger
from config_db.engine import is_away, open_engine, reason
from config_db.schema import TOMBSTONE_KEPT, EpochRow, FarmEpoch, ModelRow
from config_db.spec import ModelSpec

log = get_logger("config_db")

KEPT_SPECS: Final = 1024
"""This many specs that were changed or deleted last stay known, so that requests under way finish on theirs."""
JITTER: Final = 0.2
"""Processes spread their polls by this share of the interval."""
NEAREST: Final = 3
NAME_SHOWN: Final = 200
"""No model's id is longer; of a longer name that is asked for, so much is compared and repeated."""


class Snapshot(msgspec.Struct, frozen=True, dict=True):
    """The models of one epoch. ``epoch_id`` tells epochs of equal number apart after a restored backup."""

    epoch: int
    epoch_id: UUID
    models: Mapping[str, ModelSpec]

    def model(self, model_id: str) -> ModelSpec:
        """The spec of a model.

        Raises:
            ModelNotFoundError: not served; ``details["nearest"]`` lists similar ids.
        """
        spec = self.models.get(model_id)
        if spec is None:
            nearest = self._nearest(model_id)
            hint = f"; did you mean {' or '.join(nearest)}?" if nearest else ""
            message = f"no model {model_id[:NAME_SHOWN]!r} is served here{hint}"
            raise ModelNotFoundError(message, param="model", details={"nearest": nearest})
        return spec

    def by_digest(self, digest: str) -> ModelSpec | None:
        """The spec with this digest, if it is of this epoch."""
        return self._digests.get(digest)

    @cached_property
    def _digests(self) -> Mapping[str, ModelSpec]:
        return {spec.digest: spec for spec in self.models.values()}

    @cached_property
    def _names(self) -> Mapping[str, str]:
        """Ids by what callers may take for them: themselves and their last part, in lower case."""
        names: dict[str, str] = {}
        for known in sorted(self.models):
            names.setdefault(known.lower(), known)
            names.setdefault(known.lower().rpartition("/")[2], known)
        return names

    def _nearest(self, model_id: str) -> list[str]:
        wanted = model_id[:NAME_SHOWN].lower()
        last = wanted.rpartition("/")[2]
        exact = [self._names[name] for name in (wanted, last) if name in self._names]
        close = difflib.get_close_matches(wanted, self._names, NEAREST, 0.6)
        close += difflib.get_close_matches(last, self._names, NEAREST, 0.6) if last != wanted else []
        return list(dict.fromkeys(exact + [self._names[name] for name in close]))[:NEAREST]


class _Copy(msgspec.Struct):
    """The form on disk."""

    epoch: int
    epoch_id: UUID
    models: list[ModelSpec]


_EMPTY: Final = Snapshot(0, UUID(int=0), MappingProxyType({}))


class SnapshotReader:
    """Owns the snapshot of one process.

    Args:
        database_url: the config DB.
        poll_s: seconds between two looks at the epoch.
        copy_path: where the snapshot is kept across restarts; None keeps no copy.
    """

    def __init__(self, database_url: str, *, poll_s: float, copy_path: Path | None) -> None:
        self._engine: Engine = open_engine(database_url)
        self._reading = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._poll_s = poll_s
        self._copy_path = copy_path
        self._snapshot = _EMPTY
        self._retired: OrderedDict[str, ModelSpec] = OrderedDict()
        self._callbacks: list[Callable[[Snapshot], None]] = []
        self._wake = threading.Event()
        self._is_stopped = False
        self._thread: threading.Thread | None = None
        self.is_connected = False

    @property
    def current(self) -> Snapshot:
        """The snapshot now held."""
        return self._snapshot

    def start(self) -> None:
        """Load the first snapshot and keep it current; call after any fork.

        Raises:
            SetupError: Postgres cannot be read and there is no copy on disk.
        """
        try:
            self._poll()
        except SQLAlchemyError as error:
            self._start_adrift(error)
        self._thread = threading.Thread(target=self._run, name="config-poll", daemon=True)
        self._thread.start()

    def spec(self, digest: str) -> ModelSpec | None:
        """A spec by digest, of this snapshot or a recent one."""
        return self._snapshot.by_digest(digest) or self._retired.get(digest)

    def poll_soon(self) -> None:
        """Look at the epoch at once: a message of a newer one was met."""
        self._wake.set()

    def subscribe(self, callback: Callable[[Snapshot], None]) -> None:
        """Call back with every new snapshot, in the polling thread."""
        self._callbacks.append(callback)

    def stop(self) -> None:
        """End the polling thread."""
        self._is_stopped = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        self._engine.dispose()

    def _run(self) -> None:
        while not self._is_stopped:
            self._wake.wait(self._poll_s * random.uniform(1 - JITTER, 1 + JITTER))  # noqa: S311 - no secret
            self._wake.clear()
            if self._is_stopped:
                return
            try:
                self._poll()
            except SQLAlchemyError as error:
                self._note_connection(is_connected=False, why=_why(error))
            except Exception:
                log.exception("config_poll_failed")

    def _poll(self) -> None:
        """Look at the epoch; fetch what is newer than ours, all in one consistent reading."""
        with Session(self._reading) as session:
            number, epoch_id = session.execute(select(FarmEpoch.number, FarmEpoch.id)).one()
            held = self._snapshot
            self._note_connection(is_connected=True)
            if (number, epoch_id) == (held.epoch, held.epoch_id):
                return
            if _is_past(session, held):
                models, statement = dict(held.models), select(ModelRow).where(ModelRow.epoch > held.epoch)
            else:
                models, statement = {}, select(ModelRow).where(ModelRow.deleted_at.is_(None))
            fresh = Snapshot(number, epoch_id, MappingProxyType(_merge(models, session.scalars(statement))))
        self._replace(fresh)

    def _replace(self, fresh: Snapshot) -> None:
        log.info("epoch_read", epoch=fresh.epoch, models=len(fresh.models))
        self._retire(fresh)
        self._snapshot = fresh
        self._write_copy(fresh)
        for callback in self._callbacks:
            try:
                callback(fresh)
            except Exception:  # one listener's fault: the others are told, and the next change comes through
                log.exception("epoch_callback_failed", epoch=fresh.epoch)

    def _retire(self, fresh: Snapshot) -> None:
        """Keep the specs that ``fresh`` no longer has, before it takes their place."""
        for name, spec in self._snapshot.models.items():
            if fresh.models.get(name) is not spec and fresh.by_digest(spec.digest) is None:
                self._retired[spec.digest] = spec
                self._retired.move_to_end(spec.digest)
        while len(self._retired) > KEPT_SPECS:
            self._retired.popitem(last=False)

    def _note_connection(self, *, is_connected: bool, why: str = "") -> None:
        if self.is_connected and not is_connected:
            log.warning("config_db_away", reason=why, epoch=self._snapshot.epoch)
        elif is_connected and not self.is_connected:
            log.info("config_db_connected")
        self.is_connected = is_connected

    def _start_adrift(self, error: SQLAlchemyError) -> None:
        copy = self._read_copy()
        if copy is None:
            raise SetupError(f"{_why(error)}; and there is no copy on disk to start from") from error
        self._snapshot = Snapshot(copy.epoch, copy.epoch_id, MappingProxyType({spec.id: spec for spec in copy.models}))
        log.warning("config_db_away", reason=_why(error), epoch=copy.epoch, serving="the copy on disk")

    def _read_copy(self) -> _Copy | None:
        if self._copy_path is None:
            return None
        try:
            return msgspec.json.decode(self._copy_path.read_bytes(), type=_Copy)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            log.warning("config_copy_unreadable", path=str(self._copy_path), error=str(error))
            return None

    def _write_copy(self, snapshot: Snapshot) -> None:
        """Replace the copy on disk in one step, so that a reader finds the old or the new one."""
        if self._copy_path is None:
            return
        whole = msgspec.json.encode(_Copy(snapshot.epoch, snapshot.epoch_id, list(snapshot.models.values())))
        beside = self._copy_path.with_suffix(f".{os.getpid()}")
        try:
            self._copy_path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(whole)
            beside.replace(self._copy_path)
        except OSError as error:
            log.warning("config_copy_failed", path=str(self._copy_path), error=str(error))


def _is_past(session: Session, held: Snapshot) -> bool:
    """Whether what is held is an earlier epoch of this very history, and every tombstone since is still there."""
    statement = select(EpochRow.id).where(
        EpochRow.number == held.epoch, EpochRow.raised_at > func.now() - TOMBSTONE_KEPT
    )
    return session.scalar(statement) == held.epoch_id


def _why(error: SQLAlchemyError) -> str:
    """Why the config DB cannot be read, as one line."""
    if is_away(error):
        return f"PostgreSQL does not answer: {reason(error)}"
    if isinstance(error, (ProgrammingError, NoResultFound)):
        return f"the config DB has no schema yet, run `farmhand migrate`: {reason(error)}"
    return f"the config DB cannot be read: {reason(error)}"


def _merge(models: dict[str, ModelSpec], rows: Iterable[ModelRow]) -> dict[str, ModelSpec]:
    """Lay changed rows over ``models``; one that this release cannot read is left as it was and named in the log."""
    for row in rows:
        if row.deleted_at is not None:
            models.pop(row.id, None)
            continue
        try:
            models[row.id] = msgspec.convert(row.spec, ModelSpec)
        except msgspec.ValidationError as error:
            log.warning("model_row_unreadable", model=row.id, epoch=row.epoch, error=str(error))
    return models
