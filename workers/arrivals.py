"""From message to ready request: hold it, and wait for whatever it needs before it can be scheduled.

States of a held request here: taken -> [parked until its ETA] -> [asked about: was it cancelled?] -> [body fetched]
-> [waiting for a config epoch] -> ready. In each it can be settled instead: cancelled, expired, or refused.

What dies and what happens here:
  the object store   the request fails with OBJECT_STORE_UNAVAILABLE
  Redis      a question about a cancelled id counts as answered no; a body's fetch is repeated; parked ones stay parked
  Postgres   an epoch not read in time: the request runs on the newest spec of its model that is known
  the hub    a reconnect drops its timers, so nothing here waits on one: ``tick`` looks at what is due
"""

from collections.abc import Callable, Iterable
from datetime import datetime
from hashlib import sha1
from time import monotonic
from typing import Any, Final, Protocol

from celery.utils.time import maybe_make_aware
from celery.worker import state as celery_state

from common.clock import FarmClock
from common.errors import (
    CancelledError,
    DeadlineExceededError,
    FarmError,
    MessageError,
    ModelNotFoundError,
    WorkerLostError,
)
from config_db.snapshot import Snapshot
from config_db.spec import ModelSpec
from tasks import names
from tasks.messages import Ticket
from tasks.transport import Popped
from workers.aside import Aside
from workers.foreign import adopt, stub_ticket
from workers.intake import Held, Intake
from workers.outcomes import dead_letter
from workers.redis_link import RedisLink
from workers.request import FarmRequest
from workers.settling import Settler

LOSSES_UNTIL_DEAD: Final = 3
EPOCH_WAIT_S: Final = 10.0
"""How long a message of a newer epoch waits for this worker's config to catch up."""


class Specs(Protocol):
    """The config snapshot, as a worker reads it (``config_db.reader.SnapshotReader``)."""

    @property
    def current(self) -> Snapshot:
        """The snapshot now held."""

    def spec(self, digest: str) -> ModelSpec | None:
        """A spec by digest, of this snapshot or a recent one."""

    def poll_soon(self) -> None:
        """Poll the epoch at once."""


class Arrivals:
    """Takes requests into the intake and hands them on when nothing keeps them any more.

    Args:
        intake: what the worker holds.
        link: the incarnation's own connection.
        specs: the config snapshot.
        clock: the farm's clock.
        settler: answers what cannot be served.
        default_timeout_s: how long a plain producer's message may wait if it does not say.
        incarnation: the uuid this process lives under now.
        aside: where bodies stand that are too large for Redis.
        ready: called with each request that can be scheduled.
    """

    def __init__(
        self,
        *,
        intake: Intake,
        link: RedisLink,
        specs: Specs,
        clock: FarmClock,
        settler: Settler,
        default_timeout_s: float,
        incarnation: Callable[[], str],
        aside: Aside,
        ready: Callable[[Held, ModelSpec], None],
    ) -> None:
        self._intake = intake
        self._link = link
        self._specs = specs
        self._clock = clock
        self._settler = settler
        self._default_timeout_s = default_timeout_s
        self._incarnation = incarnation
        self._aside = aside
        self._hand_on = ready
        self._hub: Any = None
        self._cancelled_known = False
        self._to_ask: list[Held] = []
        self._awaiting_epoch: dict[Any, tuple[Held, float]] = {}

    def register(self, hub: Any) -> None:
        """Use this hub from now on. What an earlier one was to do soon is done now."""
        self._hub = hub
        self._ask_burst()

    # -- what the transport and Celery tell --------------------------------------------------------------------------

    def on_popped(self, *, cancelled: int) -> None:
        """The next requests were taken while ``cancelled`` ids were known to Redis."""
        self._cancelled_known = cancelled > 0

    def on_request(self, request: FarmRequest, ticket: Ticket | None) -> None:
        """Take a request in; ``ticket`` is None for a plain Celery producer's."""
        if request.tag in self._intake:  # kombu's transport restored what is held already; its record stands again
            return
        refusal: FarmError | None = None
        body: bytes = request.message.body
        if ticket is None:
            try:
                ticket, body = adopt(request, self._specs.current, self._expires(request), self._clock.now())
            except FarmError as error:
                ticket, body = stub_ticket(request, self._expires(request), self._clock.now()), b""
                refusal = error
        held = self._hold(request, ticket, body)
        if refusal is not None:
            self._settler.fail(held, refusal)
        elif held.lost >= LOSSES_UNTIL_DEAD:
            lost = WorkerLostError(
                f"{held.lost} workers died while running this request; it is kept in the dead letters"
            )
            self._settler.fail(held, lost, dead=dead_letter(held, lost.code))
        elif held.parked_until is None:
            self._look(held)

    def on_revoked(self, request: FarmRequest, *, expired: bool) -> None:
        """Celery found the request revoked or expired: answer it through the same call as every other."""
        held = self._intake.get(request.tag)
        if held is not None and held.request is request:
            error: FarmError = (
                DeadlineExceededError("the task expired before it was started")
                if expired
                else CancelledError("the task was revoked")
            )
            self._settler.fail(held, error)

    def refuse(self, tag: int, error: FarmError) -> bool:
        """Answer a held request with an error; false if it is not held."""
        held = self._intake.get(tag)
        if held is not None:
            self._settler.fail(held, error)
        return held is not None

    # -- what is due by time -----------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Let go what is due: parked requests, and those that wait for an epoch; answer what was revoked or expired."""
        now = monotonic()
        for held in self._intake:
            if held.id in celery_state.revoked and held.started_at is None and not held.is_settling:
                held.request.revoked()
        for held in self._intake.parked():
            if held.deadline <= now:
                self._settler.fail(held, DeadlineExceededError("the task expired before its time had come"))
            elif held.parked_until is not None and held.parked_until <= now:
                self._intake.unpark(held)
                self._look(held)
        for held, until in list(self._awaiting_epoch.values()):
            del self._awaiting_epoch[held.tag]
            self._ready(held, epoch_wait_until=until)

    def look_for_cancelled(self) -> None:
        """Ask Redis which waiting requests were cancelled by their callers."""
        self._ask([held for held in self._intake if held.started_at is None and held.ticket.admitted], lambda _: None)

    def forget(self) -> None:
        """The intake was emptied: nothing is waited for any more."""
        self._awaiting_epoch.clear()
        self._to_ask.clear()

    # -- one request's way -------------------------------------------------------------------------------------------

    def _hold(self, request: FarmRequest, ticket: Ticket, body: bytes) -> Held:
        popped: Popped | None = getattr(request.message, "popped", None)
        lost = popped.lost if popped else 0
        held = Held(
            tag=request.tag,
            incarnation=self._incarnation(),
            request=request,
            ticket=ticket,
            body=body,
            queue=request.queue,
            lost=lost,
            lost_digest=sha1(popped.raw, usedforsecurity=False).hexdigest() if popped and lost else "",
            arrived=monotonic(),
            deadline=self._clock.monotonic_of(ticket.deadline),
        )
        if request.eta is not None:
            self._park(held, maybe_make_aware(request.eta))
        self._intake.add(held)
        celery_state.task_reserved(request)
        return held

    def _expires(self, request: FarmRequest) -> float:
        """When a plain producer's request is too late, on the farm's clock: as it says, or after a default time."""
        if request.expires:
            return float(maybe_make_aware(request.expires).timestamp())
        return self._clock.now() + self._default_timeout_s

    def _park(self, held: Held, eta: datetime) -> None:
        """A plain producer's countdown. A deadline that it did not name itself is counted from then on."""
        wait_s = max(0.0, eta.timestamp() - self._clock.now())
        held.parked_until = held.arrived + wait_s
        if not held.request.expires:
            held.deadline += wait_s

    def _look(self, held: Held) -> None:
        """If ids are known to be cancelled, ask about all that arrived in this turn of the loop at once."""
        if not self._cancelled_known:
            self._fetch_or_ready(held)
            return
        self._to_ask.append(held)
        if len(self._to_ask) == 1:
            self._hub.call_soon(self._ask_burst)

    def _ask_burst(self) -> None:
        asked, self._to_ask = self._to_ask, []
        self._ask(asked, self._fetch_or_ready)

    def _ask(self, waiting: list[Held], then: Callable[[Held], None]) -> None:
        if not waiting:
            return

        def answered(reply: Any) -> None:
            scores: Iterable[Any] = reply if isinstance(reply, list) else [None] * len(waiting)
            for held, score in zip(waiting, scores, strict=True):
                if score is None:
                    then(held)
                else:
                    self._settler.fail(held, CancelledError("the task was cancelled"))

        self._link.call("ZMSCORE", names.CANCELLED, *(held.id for held in waiting), then=answered)

    def _fetch_or_ready(self, held: Held) -> None:
        key, name = held.ticket.body_key, held.ticket.body_object
        if (key is None and name is None) or held.body is not held.request.message.body:
            self._ready(held)
            return

        def fetched(reply: Any) -> None:
            if isinstance(reply, bytes):
                held.body = reply
                self._ready(held)
            elif reply is None:
                self._settler.fail(held, MessageError("the request's body is not there any more"))
            elif isinstance(reply, FarmError):
                self._settler.fail(held, reply)
            else:
                self._settler.fail(held, MessageError(f"the request's body cannot be read: {reply}"))

        if name is not None:
            self._aside.get(name, fetched)
        else:
            self._link.call("GET", key, then=fetched, repeat=True)

    def _ready(self, held: Held, *, epoch_wait_until: float | None = None) -> None:
        """Hand the request on, unless this worker has yet to read the epoch that its spec is of."""
        if held.tag not in self._intake or held.is_settling:
            return
        spec = self._specs.spec(held.ticket.spec)
        if spec is None and self._await_epoch(held, epoch_wait_until):
            return
        try:
            self._hand_on(held, spec or self._specs.current.model(held.ticket.model))
        except ModelNotFoundError:
            gone = ModelNotFoundError(f"model {held.ticket.model!r} is not served any more", param="model")
            self._settler.fail(held, gone)

    def _await_epoch(self, held: Held, until: float | None) -> bool:
        """Whether the request waits for an epoch this worker has not read yet."""
        newer = held.ticket.epoch > self._specs.current.epoch
        until = until if until is not None else monotonic() + EPOCH_WAIT_S
        if not newer or monotonic() >= min(until, held.deadline):
            return False
        self._awaiting_epoch[held.tag] = (held, until)
        self._specs.poll_soon()
        return True
