"""The dispatcher with its kicks on a real kombu loop: what nothing but a timer would move is moved.

No worker's tick runs here, no batch ends and no request comes unless a test says so: a lost kick is a test that waits
in vain. A batch lasts as long as the scheduler was taught, since hosts that only note what they are sent finish none.
"""

from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any
from uuid import uuid4

import pytest
from celery.worker import state as celery_state
from kombu.asynchronous.hub import Hub
from msgspec import msgpack

from common.clock import FarmClock
from config_db.snapshot import Snapshot
from config_db.spec import ModelSpec, Source
from tasks import messages
from tasks.batching import batch_key
from tasks.messages import Request, Ticket
from tasks.names import Lane, Operation, queue_name
from workers.dispatch import Dispatcher
from workers.hosts.protocol import BatchTiming, HostBatch, HostView, PartResult
from workers.intake import Held, Intake, IntakeLimits
from workers.policy import BatchLimits, DispatchLimits, Policy
from workers.scheduler import Scheduler

HOST, OTHER = 1, 2
QUICK, SLOW, SLOWER, NEW = "org/quick", "org/slow", "org/slower", "org/new"
QUICK_S, SLOW_S = 0.2, 1000.0
"""What a batch of one request lasts; of ``NEW`` nothing is known."""
TOKENS, MAX_ITEMS = 10, 4
SPECS = {name: ModelSpec(id=name, family="dense", source=Source(path="/")) for name in (QUICK, SLOW, SLOWER, NEW)}


class Served:
    """The config snapshot, as the dispatcher reads it."""

    current = Snapshot(1, uuid4(), SPECS)

    def spec(self, digest: str) -> ModelSpec | None:
        return self.current.by_digest(digest)


class Hosts:
    """Hosts that hold every model, note what they are sent, and are done when the test says so."""

    def __init__(self) -> None:
        resident = {spec.digest: 1 for spec in SPECS.values()}
        self.views = {one: HostView(one, resident=dict(resident)) for one in (HOST, OTHER)}
        self.sent: list[tuple[int, str, int]] = []

    def hosts(self) -> list[HostView]:
        return list(self.views.values())

    def send(self, host: int, batch: HostBatch) -> None:
        self.views[host].outstanding += 1
        self.sent.append((host, batch.spec.id, batch.id))

    @property
    def given(self) -> list[tuple[int, str]]:
        """Host and model of each batch, in order."""
        return [(host, model) for host, model, _ in self.sent]


class Celerys:
    """A request as Celery would have it."""

    name = "farm.encode"
    time_start: float | None = None

    def __init__(self) -> None:
        self.id = str(uuid4())

    def send_event(self, *_: Any, **__: Any) -> None:
        """Nobody listens."""


class Ignored:
    """Takes whatever is told: the worker's connection, its settler."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


class Stage:
    """A dispatcher between a loop, hosts and requests."""

    def __init__(self, *, gather_s: float) -> None:
        self.hub: Any = _new_hub()
        self.hosts = Hosts()
        self.intake = Intake(IntakeLimits(100, 1000, 10**6))
        scheduler = Scheduler(BatchLimits(MAX_ITEMS, 10**6), Policy(gather_s=gather_s))
        ignored: Any = Ignored()
        pool: Any = self.hosts  # the part of one that is used here
        served: Any = Served()
        self.dispatcher = Dispatcher(
            intake=self.intake,
            scheduler=scheduler,
            link=ignored,
            specs=served,
            clock=FarmClock(),
            limits=DispatchLimits(MAX_ITEMS, 10**6, hang_floor_s=10**6, hang_unmeasured_s=10**6),
            settler=ignored,
            held_keys=lambda: ("unacked", "started"),
            on_residency=lambda: None,
            runs_here=lambda _: True,
        )
        self.dispatcher.hosts = pool
        for model, seconds in ((QUICK, QUICK_S), (SLOW, SLOW_S), (SLOWER, SLOW_S)):
            scheduler.pace.learn(_key(model), TOKENS, seconds)
        self.dispatcher.register(self.hub)

    def ask(self, model: str, *, items: int = 1, admitted: bool = True) -> Held:
        """A request arrives."""
        now = monotonic()
        request: Any = Celerys()
        held = Held(
            tag=len(self.intake) + 1,
            incarnation="incarnation",
            request=request,
            ticket=Ticket(
                model=model,
                spec=SPECS[model].digest,
                operation=Operation.ENCODE,
                key=_key(model),
                items=items,
                tokens=TOKENS * items,
                deadline=0.0,
                published=0.0,
                admitted=admitted,
            ),
            body=messages.encode_body(model, Request(items=[{"text": str(at)} for at in range(items)])),
            queue=queue_name("default", "cpu", Lane.INTERACTIVE),
            lost=0,
            lost_digest="",
            arrived=now,
            deadline=now + 10**6,
        )
        self.intake.add(held)
        self.dispatcher.schedule(held, SPECS[model])
        return held

    def end(self, place: int) -> None:
        """The host is done with this batch, of one request, in the order of sending."""
        host, _, batch = self.hosts.sent[place]
        self.hosts.views[host].outstanding -= 1
        nothing = PartResult(msgpack.encode([]), TOKENS, None)
        self.dispatcher.on_batch_done(host, batch, [nothing], BatchTiming(0.0, 0.0, 0.0, 0.0, TOKENS))

    def reconnect(self) -> None:
        """Another loop from now on, and the one before has forgotten its timers, as over a lost broker."""
        self.hub.close()
        self.hub = _new_hub()
        self.dispatcher.register(self.hub)

    def turn(self) -> None:
        """Deliver what is due, and sleep a moment at most."""
        self.hub.run_once()

    def until(self, given: list[tuple[int, str]]) -> None:
        """Turn the loop until the hosts were given these."""
        began = monotonic()
        while self.hosts.given != given:
            assert monotonic() - began < 10, self.hosts.given
            self.turn()


def _key(model: str) -> str:
    return batch_key(model, SPECS[model].digest, Operation.ENCODE, None, {})


def _new_hub() -> Any:
    hub = Hub()
    hub.call_repeatedly(0.01, lambda: None)  # else a loop without a timer would sleep for long
    return hub


@pytest.fixture
def stage(request: Any) -> Iterator[Stage]:
    made = Stage(gather_s=request.param)
    yield made
    for held in made.intake:
        celery_state.task_ready(held.request)
    made.hub.close()


@pytest.mark.parametrize("stage", [10**6], indirect=True)
@pytest.mark.parametrize("reconnects", [False, True])
@pytest.mark.parametrize("quick", [HOST, OTHER])
def test_a_busy_host_is_given_more_in_its_own_time(stage: Stage, quick: int, reconnects: bool) -> None:
    """Half of a quick batch later, whatever the other host does; also if the loop has changed meanwhile."""
    models = [QUICK, SLOW] if quick == HOST else [SLOW, QUICK]
    for model in models:
        stage.ask(model)
    both = [(HOST, models[0]), (OTHER, models[1])]
    stage.until(both)
    stage.ask(NEW)
    stage.turn()
    if reconnects:
        stage.reconnect()
    stage.until([*both, (quick, NEW)])


@pytest.mark.parametrize("stage", [2 * QUICK_S], indirect=True)
def test_what_gathers_company_goes_when_its_time_is_up(stage: Stage) -> None:
    """To the host that was free all along: nothing else happens that would move it."""
    stage.ask(QUICK)
    stage.until([(HOST, QUICK)])
    stage.ask(QUICK)
    stage.until([(HOST, QUICK), (OTHER, QUICK)])


@pytest.mark.parametrize("stage", [10**6], indirect=True)
def test_a_timer_that_was_far_away_comes_nearer(stage: Stage) -> None:
    """It was armed while both hosts had long batches; one has a quick one now."""
    both = [(HOST, SLOW), (OTHER, SLOWER)]
    for model in (SLOW, SLOWER, QUICK):
        stage.ask(model)
    stage.until(both)
    stage.turn()
    stage.end(1)
    assert stage.hosts.given == [*both, (OTHER, QUICK)]
    stage.ask(NEW)
    stage.until([*both, (OTHER, QUICK), (OTHER, NEW)])


@pytest.mark.parametrize("stage", [0], indirect=True)
def test_it_tells_how_many_requests_the_hosts_have_begun(stage: Stage) -> None:
    """Of those that are open: one that was cut once, those that were never admitted or are answered not at all."""
    for at, (model, items) in enumerate(((QUICK, 2 * MAX_ITEMS), (QUICK, 1), (SLOW, 1), (NEW, 1))):
        stage.ask(model, items=items, admitted=at != 1)
    stage.until([(HOST, QUICK), (OTHER, QUICK), (HOST, QUICK), (OTHER, SLOW)])
    assert stage.dispatcher.load()["running"] == {QUICK: 1, SLOW: 1}
    slow = next(held for held in stage.intake if held.ticket.model == SLOW)
    slow.deadline = monotonic()  # its caller has been answered
    assert stage.dispatcher.load()["running"] == {QUICK: 1}
    next(held for held in stage.intake if held.ticket.model == QUICK).is_settling = True
    assert stage.dispatcher.load()["running"] == {}


@pytest.mark.parametrize("stage", [0], indirect=True)
def test_what_has_begun_stays_so_between_its_slices(stage: Stage) -> None:
    stage.ask(QUICK, items=5 * MAX_ITEMS)
    stage.until([(HOST, QUICK), (OTHER, QUICK), (HOST, QUICK), (OTHER, QUICK)])
    stage.dispatcher.stop_picking()
    for place in range(4):
        stage.end(place)
    assert stage.dispatcher.load()["running"] == {QUICK: 1}
