"""Models that nobody has written down: ids that match the operator's patterns are registered as the Hub has them.

The setting ``catalog.allow`` turns it on. What is registered is a row like any other, of origin ``auto``, at an epoch
of its own. Callers choose the ids, so everything is bounded: look-ups at once, look-ups a minute, models in all.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from threading import BoundedSemaphore, Event, Lock
from time import monotonic
from typing import Annotated, Any, Final, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import Engine, func, select, text
from sqlalchemy.orm import Session

from common.errors import CapacityError, FarmError, ModelNotFoundError, ModelUnsupportedError, error_from_dict
from common.logs import get_logger
from config_db.engine import transaction
from config_db.epochs import epoch_now, lock_epoch
from config_db.families import why_unsupported
from config_db.publish import Put, live, publish
from config_db.rows import read_row
from config_db.schema import HistoryRow, ModelRow
from config_db.spec import MAX_ID, ModelSpec, Positive, plain

log = get_logger("config_db")

SETTING: Final = "catalog.allow"
ACTOR: Final = "hub"
MINUTE_S: Final = 60.0
REMEMBERED_S: Final = 60.0
"""A refused id is not looked up again for so long."""
MOST_REMEMBERED: Final = 1000
AT_ONCE: Final = 2
"""Look-ups of one process; each holds a connection to the config DB."""
WAIT_S: Final = 60.0
"""Longer than any look-up takes, those that it waits for included."""


class Allow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of the setting. ``patterns`` are as in a shell: ``org/*``.

    ``most`` bounds the models registered in this way that there may be; ``per_minute`` the look-ups of one web process.
    """

    patterns: tuple[Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID)], ...] = ()
    most: Positive = 100
    per_minute: Positive = 10

    def pattern_of(self, model_id: str) -> str | None:
        """The pattern that lets this id in, if one does."""
        if len(model_id) > MAX_ID or ":" in model_id:  # a profile's: what the Hub has comes without any
            return None
        return next((pattern for pattern in self.patterns if fnmatchcase(model_id, pattern)), None)


class Found(NamedTuple):
    """A model, and the epoch that it stands in."""

    spec: ModelSpec
    epoch: int


def read_allow(settings: Mapping[str, Any]) -> Allow:
    """The setting as a snapshot's settings have it; nothing is allowed where it is missing or broken."""
    try:
        return msgspec.convert(settings.get(SETTING, {}), Allow)
    except msgspec.ValidationError as error:
        log.warning("setting_unreadable", setting=SETTING, error=str(error))
        return Allow()


def register(session: Session, model_id: str, *, allow: Allow, describe: Callable[[str], ModelSpec]) -> Found:
    """The model as the table has it, else as ``describe`` gives it, published; one process at a time for one id.

    Raises:
        ModelNotFoundError: the table holds as many such models as it may, or ``describe`` finds none.
        ModelUnsupportedError: this release cannot serve it.
        FarmError: whatever else ``describe`` raises.
    """
    session.execute(text(f"set local lock_timeout = '{WAIT_S:.0f}s'"))
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"{ACTOR}:{model_id}", 0))))
    there = live(session, "model", [model_id]).get(model_id)
    if there is not None:
        return Found(read_row(model_id, there), epoch_now(session)[0])
    if _was_deleted(session, model_id):
        raise ModelNotFoundError(
            f"the model {model_id!r} was deleted here: it comes back only when somebody adds it",
            param="model",
            details={"nearest": []},
        )
    spec = describe(model_id)
    reason = why_unsupported(spec, ())
    if reason is not None:
        raise ModelUnsupportedError(f"{model_id!r} on the Hub cannot be served: {reason}", param="model")
    lock_epoch(session)
    _check_room(session, model_id, allow.most)
    put = Put("model", model_id, plain(spec), "auto")
    published = publish(session, [put], actor=ACTOR, reason=f"asked for; {allow.pattern_of(model_id)} is allowed")
    log.info("model_registered", model=model_id, family=spec.family, revision=spec.source.revision)
    return Found(spec, published.epoch)


def _was_deleted(session: Session, model_id: str) -> bool:
    """Whether somebody took the model away; tombstones go in time, a model's last change stays."""
    changes = select(HistoryRow.after).where(HistoryRow.kind == "model", HistoryRow.name == model_id)
    last = session.execute(changes.order_by(HistoryRow.id.desc()).limit(1)).one_or_none()
    return last is not None and last.after is None


def _check_room(session: Session, model_id: str, most: int) -> None:
    count = select(func.count()).where(ModelRow.origin == "auto", ModelRow.deleted_at.is_(None))
    there = session.scalar(count.select_from(ModelRow)) or 0
    if there >= most:
        message = (
            f"no model {model_id!r} is served here; of the {most} that the Hub may add by itself, {there} are there"
        )
        raise ModelNotFoundError(message, param="model", details={"nearest": []})


class Registrar:
    """Owns which ids this process looks up now and which it was refused lately. Of any thread or greenlet."""

    def __init__(self, engine: Engine, describe: Callable[[str], ModelSpec]) -> None:
        self._engine = engine
        self._describe = describe
        self._lock = Lock()
        self._at_once = BoundedSemaphore(AT_ONCE)
        self._flights: dict[str, _Flight] = {}
        self._refused: OrderedDict[str, tuple[float, FarmError]] = OrderedDict()
        self._found: OrderedDict[str, tuple[UUID, Found]] = OrderedDict()
        self._looked_up: deque[float] = deque()
        self._patience: tuple[float, FarmError] | None = None

    def find(self, model_id: str, *, allow: Allow, epoch_id: UUID) -> Found | None:
        """A model that the snapshot of this epoch lacks; None if its id is not allowed.

        Raises:
            CapacityError: not now; says when.
            FarmError: as ``register``; remembered for a minute.
        """
        if allow.pattern_of(model_id) is None:
            return None
        with self._lock:
            known = self._found.get(model_id)
            if known is not None and known[0] == epoch_id:  # the snapshot is about to have it
                return known[1]
            flight, is_first = self._board(model_id, allow)
        if is_first:
            self._fly(flight, model_id, allow, epoch_id)
        elif not flight.landed.wait(WAIT_S):
            raise CapacityError(f"looking {model_id!r} up on the Hub takes too long", retry_after_s=REMEMBERED_S)
        return flight.result()

    def _board(self, model_id: str, allow: Allow) -> "tuple[_Flight, bool]":
        """The look-up under way for an id, or a new one; raises what is known already."""
        flight = self._flights.get(model_id)
        if flight is not None:
            return flight, False
        now = monotonic()
        for until, error in filter(None, (self._refused.get(model_id), self._patience)):
            if now < until:
                raise _again(error, retry_after_s=until - now)
        while self._looked_up and self._looked_up[0] <= now - MINUTE_S:
            self._looked_up.popleft()
        if len(self._looked_up) >= allow.per_minute:
            raise CapacityError(
                f"{allow.per_minute} models were looked up on the Hub within a minute: no more are for now",
                retry_after_s=self._looked_up[0] + MINUTE_S - now,
            )
        self._looked_up.append(now)
        flight = self._flights[model_id] = _Flight()
        return flight, True

    def _fly(self, flight: "_Flight", model_id: str, allow: Allow, epoch_id: UUID) -> None:
        flight.error = cut_off = CapacityError(f"looking {model_id!r} up was cut off: try again soon")
        try:
            found = self._register(model_id, allow)
        except FarmError as error:
            flight.error = error
            log.info("model_not_registered", model=model_id, code=error.code, reason=error.message)
        except Exception as error:
            flight.error = FarmError(f"looking {model_id!r} up went wrong inside the farm; the log says what")
            log.exception("model_not_registered", model=model_id, error=str(error))
        else:
            flight.found, flight.error = found, None
        finally:  # also where a greenlet is killed: whoever waits goes on, and the next one looks anew
            with self._lock:
                del self._flights[model_id]
                if flight.error is not cut_off:
                    self._remember(model_id, flight, epoch_id)
            flight.landed.set()

    def _register(self, model_id: str, allow: Allow) -> Found:
        if not self._at_once.acquire(timeout=WAIT_S):
            raise CapacityError(f"{model_id!r} waits for other models to be looked up on the Hub")
        try:
            with transaction(self._engine) as session:
                return register(session, model_id, allow=allow, describe=self._describe)
        finally:
            self._at_once.release()

    def _remember(self, model_id: str, flight: "_Flight", epoch_id: UUID) -> None:
        if flight.found is not None:
            _keep(self._found, model_id, (epoch_id, flight.found))
        elif isinstance(flight.error, CapacityError):
            self._patience = (monotonic() + (flight.error.retry_after_s or 1.0), flight.error)
        elif flight.error is not None:
            _keep(self._refused, model_id, (monotonic() + REMEMBERED_S, flight.error))


class _Flight:
    """One look-up: whoever asks for the same id meanwhile waits for it to land."""

    def __init__(self) -> None:
        self.landed = Event()
        self.found: Found | None = None
        self.error: FarmError | None = None

    def result(self) -> Found:
        """What it found; raises what it met."""
        if self.error is not None:
            raise _again(self.error)
        assert self.found is not None  # it has landed
        return self.found


def _again(error: FarmError, *, retry_after_s: float | None = None) -> FarmError:
    """An error to be raised once more: one object raised by many would gather all their tracebacks."""
    copy = error_from_dict(error.as_dict())
    if copy.retry_after_s is not None and retry_after_s is not None:
        copy.retry_after_s = retry_after_s
    return copy


def _keep(memory: "OrderedDict[str, Any]", name: str, value: object) -> None:
    memory[name] = value
    memory.move_to_end(name)
    if len(memory) > MOST_REMEMBERED:
        memory.popitem(last=False)
