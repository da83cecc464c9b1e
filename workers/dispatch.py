"""From held request to outcome: schedule when a host is free, send the micro-batch, gather its results.

The worker's event loop calls in: the transport with messages, the hosts with results, a timer with ticks. Nothing here
blocks or computes. Owns the running batches and what is parked (fetching a large body, waiting for an epoch or an ETA).

What dies and what happens here:
  host        its running batch is halved until the culprit stands alone; one that kills two hosts alone fails
  Redis       outcomes wait in the link and are repeated; held requests stay held
  this worker its incarnation's records go back to the queues (janitor); nothing of this state matters any more
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
    HostLostError,
    MessageError,
    ModelNotFoundError,
    WorkerLostError,
)
from common.faults import fault
from common.logs import get_logger
from config_db.spec import ModelSpec
from tasks import messages, names
from tasks.messages import Outcome, Ticket
from tasks.transport import Popped
from workers.foreign import adopt, stub_ticket
from workers.host_link import BatchTiming, HostBatch, HostPool, PartResult
from workers.intake import Held, Intake
from workers.outcomes import OutcomeWriter, dead_letter
from workers.redis_link import RedisLink
from workers.request import FarmRequest
from workers.scheduler import Pick, Scheduler, Work
from workers.slices import Cut, cut_body

log = get_logger("workers")

LOSSES_UNTIL_DEAD: Final = 3
CRASHES_ALONE_UNTIL_FAILED: Final = 2
HOST_DEPTH: Final = 2
"""Micro-batches a host holds: one computing, one being tokenised."""
RATES_REMEMBERED: Final = 4096
EPOCH_WAIT_S: Final = 10.0
"""How long a message of a newer epoch waits for this worker's config to catch up."""


class Specs(Protocol):
    """The config snapshot, as the dispatcher reads it (``config_db.snapshot.SnapshotReader``)."""

    @property
    def current(self) -> Any:
        """The snapshot now held."""

    def spec(self, digest: str) -> ModelSpec | None:
        """A spec by digest, of this snapshot or a recent one."""

    def poll_soon(self) -> None:
        """Poll the epoch at once."""


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """Bounds of a micro-batch and of a hanging host."""

    max_items: int
    max_tokens: int
    hang_floor_s: float
    hang_unmeasured_s: float
    default_timeout_s: float = 120.0


@dataclass(slots=True)
class _Slice:
    """One part of a held request, run in one micro-batch. ``place`` is its position among the request's parts."""

    held: Held
    place: int
    body: bytes


@dataclass(frozen=True, slots=True)
class _Running:
    pick: Pick
    slices: tuple[_Slice, ...]
    host: int


class Dispatcher:
    """Moves requests from the intake through the scheduler and the hosts to their outcomes."""

    def __init__(
        self,
        *,
        intake: Intake,
        scheduler: Scheduler,
        link: RedisLink,
        specs: Specs,
        clock: FarmClock,
        limits: DispatchLimits,
        incarnation: Callable[[], str],
    ) -> None:
        self.intake = intake
        self._scheduler = scheduler
        self._link = link
        self._specs = specs
        self._clock = clock
        self._limits = limits
        self._incarnation = incarnation
        self.hosts: HostPool
        self.outcomes: OutcomeWriter
        self.on_residency: Callable[[], None] = lambda: None
        self._slices: dict[int, _Slice] = {}
        self._running: dict[int, _Running] = {}
        self._batch_s_per_token: dict[str, float] = {}
        self._awaiting_epoch: dict[Any, tuple[Held, float]] = {}
        self._cancelled_known = False
        self._next_work = 1
        self._next_batch = 1
        self._hub: Any = None
        self._kick_due = False
        self._flush_due = False
        self._draining = False

    # -- what the worker's steps ask ----------------------------------------------------------------------------

    def register(self, hub: Any) -> None:
        """Use this hub from now on; Celery forgot the held requests on a reconnect, so they are named to it again."""
        self._hub = hub
        self._kick_due = self._flush_due = False
        for held in self.intake:
            celery_state.task_reserved(held.request)
        self._kick_soon()

    @property
    def running(self) -> int:
        """Micro-batches at the hosts."""
        return len(self._running)

    def stop_picking(self) -> None:
        """Send no further micro-batch: the worker shuts down."""
        self._draining = True

    def give_up_all(self) -> list[Held]:
        """Forget every held request that has no outcome under way; returns them. Their results are dropped."""
        left = [held for held in self.intake.clear() if not held.is_settling]
        for held in left:
            self._forget_works(held)
            celery_state.task_ready(held.request)
        self._awaiting_epoch.clear()
        for running in self._running.values():
            self._scheduler.finished(running.pick)
        self._running.clear()
        return left

    def preload(self) -> None:
        """Have every host load the models that the config wants loaded before anyone asks."""
        wanted = [spec for spec in self._specs.current.models.values() if spec.preload]
        for view in self.hosts.hosts():
            for spec in wanted:
                self.hosts.load(view.id, spec)

    def tick(self) -> None:
        """What is due by time: expiry, revocation, requests waiting for an epoch, outcomes refused by Redis."""
        now = monotonic()
        self._expire(now)
        for held in self.intake:
            if held.id in celery_state.revoked and held.started_at is None and not held.is_settling:
                held.request.revoked()
        for held, until in list(self._awaiting_epoch.values()):
            del self._awaiting_epoch[held.tag]
            self._ready(held, epoch_wait_until=until)
        self.outcomes.flush()
        self._announce_absent(now)
        self._kick_soon()

    def look_for_cancelled(self) -> None:
        """Ask Redis which waiting requests were cancelled by their callers."""
        waiting = [held for held in self.intake if held.started_at is None and held.ticket.admitted]
        if waiting:
            self._ask_cancelled(waiting, lambda _: None)

    # -- what the transport tells -------------------------------------------------------------------------------

    def on_popped(self, messages_: Sequence[Popped], *, cancelled: int) -> None:  # noqa: ARG002
        """The next requests were taken while ``cancelled`` ids were known to Redis."""
        self._cancelled_known = cancelled > 0

    def on_request(self, request: FarmRequest, ticket: Ticket | None) -> None:
        """Take a request in and make it ready to be scheduled."""
        if request.tag in self.intake:  # kombu's own transport restored what is held already; its record stands again
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
            self._settle(held, messages.failed(held.id, refusal))
        elif held.lost >= LOSSES_UNTIL_DEAD:
            lost = WorkerLostError(
                f"{held.lost} workers died while running this request; it is kept in the dead letters"
            )
            self._settle(held, messages.failed(held.id, lost, model=ticket.model), dead=dead_letter(held, lost.code))
        elif request.eta is not None:
            self._hold_until_eta(held)
        elif self._cancelled_known:
            self._ask_cancelled([held], self._fetch_or_ready)
        else:
            self._fetch_or_ready(held)

    def refuse(self, tag: int, error: FarmError) -> bool:
        """Answer a held request with an error; false if it is not held."""
        held = self.intake.get(tag)
        if held is not None:
            self._settle(held, messages.failed(held.id, error, model=held.ticket.model))
        return held is not None

    def on_revoked(self, request: FarmRequest, *, expired: bool) -> None:
        """Celery found the request revoked or expired: answer it through the same call as every other."""
        held = next((one for one in self.intake if one.request is request), None)
        if held is None:
            return
        error: FarmError = (
            DeadlineExceededError("the task expired before it was started")
            if expired
            else CancelledError("the task was revoked")
        )
        self._settle(held, messages.failed(held.id, error, model=held.ticket.model))

    # -- what the hosts tell ------------------------------------------------------------------------------------

    def on_host_ready(self, host: int) -> None:
        """A host can be given work."""
        log.info("host_ready", host=host)
        self.preload()
        self.on_residency()
        self._kick_soon()

    def on_batch_done(
        self,
        host: int,  # noqa: ARG002 - HostEvents names it
        batch: int,
        results: list[PartResult],
        timing: BatchTiming,
    ) -> None:
        """Start the next micro-batch first, then answer the finished one."""
        running = self._running.pop(batch, None)
        if running is not None:
            self._scheduler.finished(running.pick)
        self._kick()
        if running is None:
            return
        spent_s = (timing.inference_ms + timing.tokenization_ms) / 1000
        self._learn(running.pick.key, max(1, timing.tokens), spent_s)
        fault("worker.batch_done")
        for part, result in zip(running.slices, results, strict=True):
            self._take_result(part, result, timing)
        self.outcomes.flush()

    def on_host_lost(self, host: int, suspects: list[int], innocent: list[int], reason: str) -> None:
        """Run what it held again: innocent batches as they were, suspects in halves until the culprit stands alone."""
        log.warning("host_lost", host=host, reason=reason, suspects=len(suspects), innocent=len(innocent))
        self.on_residency()
        for batch in [*innocent, *suspects]:
            running = self._running.pop(batch, None)
            if running is None:
                continue
            self._scheduler.finished(running.pick)
            works = [work for work in running.pick.works if work.id in self._slices]
            if batch in suspects:
                self._halve(works, reason)
            elif works:
                self._scheduler.add_together(works)
        self._kick_soon()

    def on_model(self, host: int, spec_digest: str, event: str, detail: dict[str, Any]) -> None:
        """Residency changed on a host."""
        log.info("residency_changed", host=host, spec=spec_digest, change=event, **detail)
        if event == "loaded":
            self._scheduler.note_load(monotonic(), spec_digest, float(detail.get("load_s", 0.0)))
        self.on_residency()
        self._kick_soon()

    # -- taking in ----------------------------------------------------------------------------------------------

    def _hold(self, request: FarmRequest, ticket: Ticket, body: bytes) -> Held:
        popped: Popped | None = getattr(request.message, "popped", None)
        lost = popped.lost if popped else 0
        now = monotonic()
        held = Held(
            tag=request.tag,
            incarnation=self._incarnation(),
            request=request,
            ticket=ticket,
            body=body,
            queue=request.queue,
            lost=lost,
            lost_digest=sha1(popped.raw, usedforsecurity=False).hexdigest() if popped and lost else "",
            arrived=now,
            deadline=self._clock.monotonic_of(ticket.deadline),
        )
        self.intake.add(held)
        celery_state.task_reserved(request)
        return held

    def _expires(self, request: FarmRequest) -> float:
        """When a plain producer's request is too late, on the farm's clock: as it says, or after a default time."""
        if request.expires:
            return float(maybe_make_aware(request.expires).timestamp())
        return self._clock.now() + self._limits.default_timeout_s

    def _hold_until_eta(self, held: Held) -> None:
        """A plain producer's countdown: the request waits in the intake, its deadline counted from then on."""
        eta: datetime = maybe_make_aware(held.request.eta)  # type: ignore[arg-type]  # the caller has one
        wait_s = max(0.0, eta.timestamp() - self._clock.now())
        if not held.request.expires:
            held.deadline += wait_s
        self._hub.call_later(wait_s, self._fetch_or_ready, held)

    def _fetch_or_ready(self, held: Held) -> None:
        key = held.ticket.body_key
        if key is None or held.body is not held.request.message.body:
            self._ready(held)
            return

        def fetched(reply: Any) -> None:
            if isinstance(reply, bytes):
                held.body = reply
                self._ready(held)
            else:
                gone = MessageError("the request's body is not in Redis any more")
                self._settle(held, messages.failed(held.id, gone, model=held.ticket.model))

        self._link.call("GET", key, then=fetched, repeat=True)

    def _ready(self, held: Held, *, epoch_wait_until: float | None = None) -> None:
        """Give the request to the scheduler, cut into slices if it is larger than a micro-batch."""
        if held.tag not in self.intake or held.is_settling:
            return
        spec = self._specs.spec(held.ticket.spec)
        if spec is None and not self._await_epoch(held, epoch_wait_until):
            spec = self._specs.current.models.get(held.ticket.model)
            if spec is None:
                gone = ModelNotFoundError(f"model {held.ticket.model!r} is not served any more", param="model")
                self._settle(held, messages.failed(held.id, gone, model=held.ticket.model))
        if spec is None:
            return
        try:
            bodies = cut_body(
                held.ticket, held.body, max_items=self._limits.max_items, max_tokens=self._tokens_of(spec)
            )
        except MessageError as error:
            self._settle(held, messages.failed(held.id, error, model=held.ticket.model))
            return
        self._schedule(held, spec, bodies)

    def _await_epoch(self, held: Held, until: float | None) -> bool:
        """Whether the request waits for an epoch this worker has not read yet."""
        newer = held.ticket.epoch > self._specs.current.epoch
        until = until if until is not None else monotonic() + EPOCH_WAIT_S
        if not newer or monotonic() >= min(until, held.deadline):
            return False
        self._awaiting_epoch[held.tag] = (held, until)
        self._specs.poll_soon()
        return True

    def _schedule(self, held: Held, spec: ModelSpec, bodies: Sequence[Cut]) -> None:
        held.slices_left = len(bodies)
        held.results = [None] * len(bodies)
        if spec.limits.max_concurrency is not None:
            self._scheduler.set_concurrency(spec.digest, spec.limits.max_concurrency)
        for place, part in enumerate(bodies):
            work = Work(
                id=self._next_work,
                key=held.ticket.key,
                spec=spec.digest,
                lane=held.lane,
                tenant=held.ticket.tenant,
                items=part.items,
                tokens=part.tokens,
                arrived=held.arrived,
                deadline=held.deadline,
                alone=held.lost > 0,
            )
            self._next_work += 1
            self._slices[work.id] = _Slice(held, place, part.body)
            held.works.append(work.id)
            self._scheduler.add(work)
        self._kick_soon()

    def _tokens_of(self, spec: ModelSpec) -> int:
        return spec.limits.max_batch_tokens or self._limits.max_tokens

    def _ask_cancelled(self, waiting: list[Held], then: Callable[[Held], None]) -> None:
        def answered(reply: Any) -> None:
            scores = reply if isinstance(reply, list) else [None] * len(waiting)
            for held, score in zip(waiting, scores, strict=True):
                if score is None:
                    then(held)
                elif not held.is_settling:
                    error = CancelledError("the task was cancelled")
                    self._settle(held, messages.failed(held.id, error, model=held.ticket.model))

        self._link.call("ZMSCORE", names.CANCELLED, *(held.id for held in waiting), then=answered)

    # -- scheduling ---------------------------------------------------------------------------------------------

    def _kick_soon(self) -> None:
        """Schedule after the whole burst has been delivered, so that a burst becomes one batch without any wait."""
        if not self._kick_due and self._hub is not None:
            self._kick_due = True
            self._hub.call_soon(self._kick)

    def _kick(self) -> None:
        """Give every free host its next micro-batch."""
        self._kick_due = False
        if self._draining or not len(self._scheduler):
            return
        now = monotonic()
        views = self.hosts.hosts()
        depth = {view.id: view.outstanding for view in views}
        for level in range(HOST_DEPTH):
            free = [view for view in views if depth[view.id] <= level]
            for place, view in enumerate(free):
                pick = self._scheduler.pick(
                    now,
                    resident=view.resident,
                    loading=view.loading,
                    elsewhere={digest for other in views if other is not view for digest in other.resident},
                    hosts=len(free) - place,
                )
                if pick is not None:
                    depth[view.id] += 1
                    self._send(view.id, pick, now)
        self._expire(now)

    def _send(self, host: int, pick: Pick, now: float) -> None:
        slices = tuple(self._slices[work.id] for work in pick.works)
        spec = self._specs.spec(pick.spec)
        assert spec is not None  # specs of held requests are kept
        batch, self._next_batch = self._next_batch, self._next_batch + 1
        self._running[batch] = _Running(pick, slices, host)
        self._mark_started([part.held for part in slices], now)
        fault("worker.started")
        first = slices[0].held.ticket
        self.hosts.send(
            host,
            HostBatch(
                id=batch,
                spec=spec,
                operation=first.operation,
                adapter=first.adapter,
                parts=tuple(part.body for part in slices),
                hang_s=self._hang_s(pick),
            ),
        )
        fault("worker.sent")

    def _mark_started(self, started: Iterable[Held], now: float) -> None:
        """Count each start once per message and incarnation, written before the frame goes to the host."""
        arguments: list[Any] = []
        for held in started:
            if held.started_at is not None:
                continue
            held.started_at = now
            held.timing["queue_ms"] = max(0.0, (self._clock.now() - held.ticket.published) * 1000)
            celery_state.task_accepted(held.request)
            held.request.time_start = self._clock.now()
            held.request.send_event("task-started")
            tracked = held.ticket.asynchronous and held.ticket.admitted
            arguments += [held.tag, names.task_record(held.id) if tracked else ""]
        if arguments:
            incarnation = self._incarnation()
            self._link.script("start", [names.unacked(incarnation), names.started(incarnation)], arguments)

    def _hang_s(self, pick: Pick) -> float:
        """The larger of 5 s and ten times the measured time; 60 s until measured."""
        per_token = self._batch_s_per_token.get(pick.key)
        if per_token is None:
            return self._limits.hang_unmeasured_s
        return max(self._limits.hang_floor_s, 10 * per_token * pick.tokens)

    def _learn(self, key: str, tokens: int, seconds: float) -> None:
        """Keep the slowest recent rate: it decays by a tenth a batch towards what is measured."""
        measured = seconds / tokens
        if len(self._batch_s_per_token) >= RATES_REMEMBERED:  # keys hold what callers chose: they must not pile up
            self._batch_s_per_token.clear()
        self._batch_s_per_token[key] = max(measured, 0.9 * self._batch_s_per_token.get(key, 0.0))

    def _announce_absent(self, now: float) -> None:
        """Tell hosts which model is likely next, so that they load it beside what runs."""
        for view in self.hosts.hosts():
            if not view.loading:
                digest = self._scheduler.next_absent(now, resident=view.resident)
                spec = self._specs.spec(digest) if digest else None
                if spec is not None:
                    self.hosts.load(view.id, spec)

    # -- settling -----------------------------------------------------------------------------------------------

    def _take_result(self, part: _Slice, result: PartResult, timing: BatchTiming) -> None:
        held = part.held
        self._slices.pop(held.works[part.place], None)
        if held.is_settling or held.tag not in self.intake:
            return
        for name in ("tokenization_ms", "inference_ms", "postprocessing_ms"):
            held.timing[name] = max(held.timing.get(name, 0.0), getattr(timing, name))
        held.tokens_used += result.tokens
        if result.error is not None:
            self._settle(
                held, Outcome(task_id=held.id, model=held.ticket.model, spec=held.ticket.spec, error=result.error)
            )
            return
        held.results[part.place] = result.result
        held.slices_left -= 1
        if held.slices_left == 0:
            self._succeed(held)

    def _succeed(self, held: Held) -> None:
        parts = [part for part in held.results if part is not None]
        outcome = Outcome(
            task_id=held.id,
            model=held.ticket.model,
            spec=held.ticket.spec,
            result=messages.join_results(parts),
            timing={name: round(value, 3) for name, value in held.timing.items()},
            usage={"input_tokens": held.tokens_used},
        )
        self._settle(held, outcome)

    def _settle(self, held: Held, outcome: Outcome, *, dead: str = "") -> None:
        """Hand the one outcome of a request over to be written; what is left of its work is dropped."""
        if held.is_settling:
            return
        held.is_settling = True
        self._forget_works(held)
        self.outcomes.add(held, outcome, dead=dead)
        if self._hub is not None and not self._flush_due:
            self._flush_due = True
            self._hub.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        self.outcomes.flush()

    def on_settled(self, held: Held, outcome: Outcome, answered: bool) -> None:
        """Redis has confirmed: tell kombu and Celery, and make room."""
        self.intake.remove(held)
        request = held.request
        request.acknowledged = True
        qos = request.message.channel.qos if request.message.channel else None
        if qos is not None and isinstance(held.tag, str):
            qos._dirty.add(held.tag)  # noqa: SLF001 - kombu's set of acknowledged tags; the record itself is gone
        celery_state.task_ready(request)
        if answered:
            _send_final_event(held, outcome)

    def _forget_works(self, held: Held) -> None:
        for work in held.works:
            self._scheduler.remove(work)
            self._slices.pop(work, None)

    def _expire(self, now: float) -> None:
        for work in self._scheduler.take_expired(now):
            part = self._slices.get(work.id)
            if part is not None and not part.held.is_settling:
                late = DeadlineExceededError("the deadline passed while the request was waiting")
                self._settle(part.held, messages.failed(part.held.id, late, model=part.held.ticket.model))

    def _halve(self, works: list[Work], reason: str) -> None:
        """Run a suspect batch again in halves; one that kills a host alone, twice, is the culprit."""
        if len(works) > 1:
            middle = (len(works) + 1) // 2
            self._scheduler.add_together(works[:middle])
            self._scheduler.add_together(works[middle:])
            return
        for work in works:
            held = self._slices[work.id].held
            held.crashes += 1
            if held.crashes < CRASHES_ALONE_UNTIL_FAILED:
                self._scheduler.add_together([work])
            else:
                error = HostLostError(f"the model process died while running this request alone ({reason})")
                self._settle(held, messages.failed(held.id, error, model=held.ticket.model, spec=held.ticket.spec))


def _send_final_event(held: Held, outcome: Outcome) -> None:
    """Tell Flower and other event readers; results are named, never carried."""
    request = held.request
    if outcome.error is None:
        runtime = monotonic() - held.started_at if held.started_at is not None else 0.0
        request.send_event("task-succeeded", result=f"{held.ticket.items} items", runtime=runtime)
    elif outcome.state == "cancelled":
        request.send_event("task-revoked", terminated=False, signum=None, expired=False)
    else:
        request.send_event(
            "task-failed", exception=f"{outcome.error['code']}: {outcome.error['message']}", traceback=""
        )
