"""From ready request to result: schedule when a host is free, send the micro-batch, gather what comes back.

The worker's event loop calls in: ``arrivals`` with requests that can be scheduled, the hosts with results, a timer with
ticks. Nothing here blocks or computes. Owns the running batches and the slices that they are made of.

What dies and what happens here:
  host        its running batch is halved until the culprit stands alone; one that kills two hosts alone fails
  Redis       outcomes wait in the link and are repeated; held requests stay held
  this worker its incarnation's records go back to the queues (janitor); nothing of this state matters any more
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

from celery.worker import state as celery_state

from common.clock import FarmClock
from common.errors import MessageError, ModelNotFoundError
from common.faults import fault
from common.logs import get_logger
from config_db.spec import ModelSpec
from tasks import names
from tasks.batching import shared_key
from workers.adapters import AdapterFetches
from workers.ahead import Ahead
from workers.arrivals import Specs
from workers.hosts.pool import HostPool
from workers.hosts.protocol import BatchTiming, HostBatch, PartResult
from workers.intake import Held, Intake
from workers.joining import Joiner, Slice
from workers.kicks import Kicks
from workers.lateness import late_error
from workers.policy import DispatchLimits
from workers.redis_link import RedisLink
from workers.revisions import Revisions
from workers.scheduler import Scheduler
from workers.settling import Settler
from workers.slices import cut_body
from workers.suspects import Suspects
from workers.throughput import Part, Throughput
from workers.work import Pick, Work

log = get_logger("workers")

HOST_DEPTH: Final = 2
"""Micro-batches a host holds: one computing, one being tokenised."""


@dataclass(frozen=True, slots=True)
class _Running:
    """A micro-batch, and the host that has it."""

    host: int
    pick: Pick
    slices: tuple[Slice, ...]


class Dispatcher:
    """Moves ready requests through the scheduler and the hosts to their results.

    ``hosts`` is set before the first event: the pool is built with this object as the one it tells.

    Args:
        intake: what the worker holds.
        scheduler: decides what runs next.
        link: the incarnation's own connection.
        specs: the config snapshot.
        clock: the farm's clock.
        limits: bounds of a micro-batch.
        settler: answers requests.
        held_keys: where Redis has what this incarnation holds: its unacknowledged messages, and those of them started.
        on_residency: called when a host came, went, loaded or evicted, or the pace of a queue became known.
        runs_here: whether a model's placement lets it run on this worker.
    """

    def __init__(
        self,
        *,
        intake: Intake,
        scheduler: Scheduler,
        link: RedisLink,
        specs: Specs,
        clock: FarmClock,
        limits: DispatchLimits,
        settler: Settler,
        held_keys: Callable[[], tuple[str, str]],
        on_residency: Callable[[], None],
        runs_here: Callable[[ModelSpec], bool],
    ) -> None:
        self._intake = intake
        self._scheduler = scheduler
        self._link = link
        self._specs = specs
        self._clock = clock
        self._limits = limits
        self._settler = settler
        self._suspects = Suspects(scheduler, settler)
        self._held_keys = held_keys
        self._on_residency = on_residency
        self._runs_here = runs_here
        self.throughput = Throughput()
        self._revisions = Revisions()
        self._fetches = AdapterFetches(settler, self._schedule)
        self._joiner = Joiner(intake, settler)
        self._slices: dict[int, Slice] = {}
        self._running: dict[int, _Running] = {}
        self._next_work = 1
        self._next_batch = 1
        self._kicks = Kicks(self._kick)
        self._ahead = Ahead(scheduler)
        self._draining = False

    @property
    def hosts(self) -> HostPool:
        """Where micro-batches run."""
        return self._hosts

    @hosts.setter
    def hosts(self, hosts: HostPool) -> None:
        self._hosts = self._fetches.hosts = hosts

    # -- what the worker's steps ask ----------------------------------------------------------------------------

    def register(self, hub: Any) -> None:
        """Use this hub from now on."""
        self._kicks.use(hub)
        self._weigh_tenants()
        self._kicks.soon()

    @property
    def running(self) -> int:
        """Micro-batches at the hosts."""
        return len(self._running)

    def load(self) -> dict[str, Any]:
        """What admission reckons with, and what runs, as ``tasks.live_workers`` reads it, and seconds computed."""
        return {
            "request_s": self.throughput.request_s(),
            "weights": self._scheduler.weight_by_lane(),
            "running": self._begun_by_model(),
            "computed_s": round(self.throughput.computed_s, 1),
            "late_s": round(self.throughput.late_s, 3),
        }

    def _begun_by_model(self) -> dict[str, int]:
        """Requests of which the hosts have, or had, some part: of those that admission counts as open."""
        now = monotonic()
        begun = (held for held in self._intake if held.started_at is not None and not held.is_settling)
        open_yet = (held for held in begun if held.ticket.admitted and held.deadline > now)
        return Counter(names.base_model(held.ticket.model) for held in open_yet)

    def stop_picking(self) -> None:
        """Send no further micro-batch: the worker shuts down."""
        self._draining = True

    def forget(self, held: Held) -> None:
        """Drop what is left of a request's work; a result that comes nevertheless is dropped, too."""
        for work in held.works:
            self._scheduler.remove(work)
            self._slices.pop(work, None)

    def forget_running(self) -> None:
        """Expect nothing of what runs: the requests were given up. Its results are dropped."""
        for running in self._running.values():
            self._scheduler.finished(running.pick)
        self._running.clear()
        self.throughput.forget_running()
        self._ahead.forget()
        self._fetches.forget_waiting()

    def preloads(self) -> list[ModelSpec]:
        """The models that the config wants loaded, and run once, before anyone asks."""
        models = self._specs.current.models.values()
        return [
            self._revisions.serving(spec)
            for spec in models
            if (spec.placement.preload or spec.placement.pinned) and spec.unsupported is None and self._runs_here(spec)
        ]

    def on_epoch(self) -> None:
        """Follow a new epoch: changed placements and weights, models to preload, new specs of models that serve."""
        snapshot = self._specs.current
        self._weigh_tenants()
        self._revisions.read(snapshot)
        self.hosts.place(spec for model in snapshot.models.values() for spec in (model, *model.profile_specs))
        for view in self.hosts.hosts():
            for spec in self.preloads():
                self.hosts.load(view.id, spec, warm_up=True)
        self._change_revisions(monotonic())

    def _weigh_tenants(self) -> None:
        self._scheduler.weigh_tenants({name: one.weight for name, one in self._specs.current.tenants.items()})

    def tick(self) -> None:
        """What is due by time: expiry, hints to the hosts."""
        now = monotonic()
        self.throughput.tend(now)
        self._expire(now)
        self._expire_loading(now)
        self._fetches.tick(now)
        self._change_revisions(now)
        self._announce_absent(now)
        self._kicks.soon()

    def schedule(self, held: Held, spec: ModelSpec) -> None:
        """Let a request wait for its adapter to be on this machine, if it names one, and then for its turn."""
        spec = self._revisions.serving(spec)
        if not self._fetches.keep(held, spec):
            self._schedule(held, spec)

    def _schedule(self, held: Held, spec: ModelSpec) -> None:
        """Let a request wait for its turn, cut into slices if it is larger than a micro-batch."""
        try:
            max_tokens = spec.limits.max_batch_tokens or self._limits.max_tokens
            bodies = cut_body(held.ticket, held.body, max_items=self._limits.max_items, max_tokens=max_tokens)
        except MessageError as error:
            self._settler.fail(held, error)
            return
        key, held.served = shared_key(held.ticket.key), spec.digest
        held.slices_left = len(bodies)
        held.results = [None] * len(bodies)
        self._scheduler.set_concurrency(spec.digest, spec.limits.max_concurrency)
        first = 0
        for place, part in enumerate(bodies):
            work = Work(
                id=self._next_work,
                key=key if spec.digest == held.ticket.spec else f"{key}<-{spec.digest}",
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
            self._slices[work.id] = Slice(held, place, part.body, first)
            first += part.items
            held.works.append(work.id)
            self._scheduler.add(work)
        self._kicks.soon()

    # -- what the hosts tell ------------------------------------------------------------------------------------

    def on_host_ready(self, host: int) -> None:
        """A host can be given work."""
        log.info("host_ready", host=host)
        self._on_residency()
        self._kicks.soon()

    def on_batch_done(
        self,
        host: int,
        batch: int,
        results: list[PartResult],
        timing: BatchTiming,
    ) -> None:
        """Start the next micro-batch first, then answer the finished one."""
        running = self._running.pop(batch, None)
        self._ahead.done(host, batch, monotonic())
        if running is not None:
            self._scheduler.finished(running.pick)
        self._kick()
        if running is None:
            return
        if self.throughput.done(host, batch, monotonic(), map(_part, running.pick.works, running.slices)):
            self._on_residency()  # a flood is refused as soon as it can be: this is told at once, then with each beat
        spent_s = (timing.inference_ms + timing.tokenization_ms) / 1000
        self._scheduler.pace.learn(running.pick.key, max(1, timing.tokens), spent_s)
        fault("worker.batch_done")
        for part, result in zip(running.slices, results, strict=True):
            self._slices.pop(part.held.works[part.place], None)
            self._joiner.take(part, result, timing)
        self._settler.flush()

    def on_host_lost(self, host: int, suspects: list[int], innocent: list[int], reason: str) -> None:
        """Run what it held again: innocent batches as they were, suspects in halves until the culprit stands alone."""
        log.warning("host_lost", host=host, reason=reason, suspects=len(suspects), innocent=len(innocent))
        self._fetches.on_host_lost(host)
        self.throughput.lost(host, [*innocent, *suspects])
        self._ahead.lost(host)
        self._on_residency()
        for batch in [*innocent, *suspects]:
            running = self._running.pop(batch, None)
            if running is None:
                continue
            self._scheduler.finished(running.pick)
            works = [work for work in running.pick.works if work.id in self._slices]
            if batch in suspects:
                self._suspects.run_again(works, self._slices, reason)
            elif works:
                self._scheduler.add_together(works)
        self._kicks.soon()

    def on_model(self, host: int, spec_digest: str, event: str, detail: dict[str, Any]) -> None:
        """Residency changed on a host."""
        log.info("residency_changed", host=host, spec=spec_digest, change=event, **detail)
        if event.startswith("adapter_"):
            return
        if event == "loaded":
            self._scheduler.note_load(monotonic(), spec_digest, float(detail.get("load_s", 0.0)))
            spec = self._specs.current.by_digest(spec_digest)
            if spec is not None:
                self._revisions.on_loaded(spec)
        elif event == "skipped":
            self._revisions.on_no_room(spec_digest)
        self._on_residency()
        self._kicks.soon()

    def on_fetched(self, adapter: str, error: dict[str, Any] | None) -> None:
        """An adapter's files are on this machine, or will not be."""
        self._fetches.on_fetched(adapter, error)

    # -- scheduling ---------------------------------------------------------------------------------------------

    def _kick(self) -> None:
        """Give every free host its next micro-batch."""
        if self._draining or not len(self._scheduler):
            return
        now = monotonic()
        views = self.hosts.hosts()
        depth = {view.id: view.outstanding for view in views}
        alone, soon = -(-len(views) // 2), list[float]()
        for level in range(HOST_DEPTH):
            free, coming = [view for view in views if depth[view.id] <= level], 0
            if level:
                waits = {view.id: self._ahead.wait_s(view.id, now) for view in free}
                free = [view for view in free if waits[view.id] == 0]
                soon += (due := [wait for wait in waits.values() if wait])
                coming = len(due)
            for place, view in enumerate(free):
                pick = self._scheduler.pick(
                    now,
                    resident=view.resident,
                    loading=view.loading,
                    elsewhere={digest for other in views if other is not view for digest in other.resident},
                    hosts=len(free) - place + coming,
                    spread=alone - sum(1 for held in depth.values() if held),
                    lead_s=self.throughput.lead_s,
                )
                if self._scheduler.gathers_s is not None:
                    soon.append(self._scheduler.gathers_s)
                if pick is not None:
                    depth[view.id] += 1
                    self._send(view.id, pick, now)
        self._expire(now)
        if soon and len(self._scheduler):
            self._kicks.at(now + min(soon))

    def _send(self, host: int, pick: Pick, now: float) -> None:
        slices = tuple(self._slices[work.id] for work in pick.works)
        spec = self._specs.spec(pick.spec) or self._revisions.spec(pick.spec)
        if spec is None:  # more changes of the config than are remembered have passed while it waited
            self._scheduler.finished(pick)
            for held in {part.held for part in slices}:
                self._settler.fail(held, ModelNotFoundError(f"model {held.ticket.model!r} has changed; ask again"))
            return
        batch, self._next_batch = self._next_batch, self._next_batch + 1
        self._running[batch] = _Running(host, pick, slices)
        self._ahead.sent(host, batch, pick, now)
        self.throughput.sent(batch, pick.spec, now, counts=not pick.loads and self._is_busy(pick))
        self._mark_started([part.held for part in slices], now)
        fault("worker.started")
        first, adapters = slices[0].held.ticket, tuple(part.held.ticket.adapter for part in slices)
        self.hosts.send(
            host,
            HostBatch(
                id=batch,
                spec=spec,
                operation=first.operation,
                adapters=adapters if any(adapters) else None,
                parts=tuple(part.body for part in slices),
                hang_s=self._limits.hang_s(self._scheduler.pace.seconds(pick.key, pick.tokens)),
            ),
        )
        fault("worker.sent")

    def _is_busy(self, pick: Pick) -> bool:
        """Whether there is more to do than this, or this is a good part of what a micro-batch may be."""
        limits = self._limits
        is_full = 2 * pick.items >= limits.max_items or 2 * pick.tokens >= limits.max_tokens
        return is_full or len(self._scheduler) > 0

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
            task_id = held.id if held.ticket.admitted else ""
            tracked = task_id and held.ticket.asynchronous
            arguments += [held.tag, task_id, names.task_record(task_id) if tracked else ""]
        if arguments:
            self._link.script("start", [*self._held_keys(), names.OPEN], arguments)

    def _change_revisions(self, now: float) -> None:
        """Have new specs loaded beside those that serve; let go of what serves no more once nothing waits for it."""
        views = self.hosts.hosts()
        if not views:
            return
        for spec in self._revisions.due(now, {digest for view in views for digest in view.resident}):
            self.hosts.load(min(views, key=lambda view: view.outstanding).id, spec, warm_up=True)
        for digest, reason in list(self._revisions.leaving().items()):
            if not self._scheduler.has_waiting(digest):
                self.hosts.evict(digest, reason)
                self._revisions.gone(digest)

    def _announce_absent(self, now: float) -> None:
        """Tell hosts which model is likely next, so that they load it beside what runs."""
        for view in self.hosts.hosts():
            if not view.loading:
                digest = self._scheduler.next_absent(now, resident=view.resident)
                spec = self._specs.spec(digest) if digest else None
                if spec is not None:
                    self.hosts.load(view.id, spec)

    # -- what is late, and what kills ---------------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        for work in self._scheduler.take_expired(now):
            part = self._slices.get(work.id)
            if part is not None and not part.held.is_settling:
                is_loaded = any(work.spec in view.resident for view in self.hosts.hosts())
                self._settler.fail(part.held, late_error(part.held, is_loaded=is_loaded))

    def _expire_loading(self, now: float) -> None:
        """Answer who is late in a micro-batch whose host is still loading the model; what it computes is dropped."""
        resident = {view.id: view.resident for view in self.hosts.hosts()}
        for running in self._running.values():
            if running.pick.spec not in resident.get(running.host, (running.pick.spec,)):
                for held in {part.held for part in running.slices if part.held.deadline <= now}:
                    self._settler.fail(held, late_error(held, is_loaded=False))


def _part(work: Work, part: Slice) -> Part:
    held = part.held
    return Part(held.queue, work.tokens, 1 / len(held.works), held.deadline)
