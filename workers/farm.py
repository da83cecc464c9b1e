"""Everything one worker process owns, wired together: one object that Celery's steps build, attach, detach and stop.

States: built -> started (checks passed, hosts are coming up) -> attached (a broker channel drains into the intake)
<-> detached (the broker is away; the intake keeps what it holds) -> closing (pops return nothing, the running
micro-batches are waited for) -> gone (what was left is back in its queue, the incarnation has left no trace).
Killed in any state, the incarnation's records stay in Redis and the janitor of another worker returns them.
"""

from collections.abc import Collection, Sequence
from time import monotonic
from typing import Any, Final

import msgspec
import redis
from celery.worker import state as celery_state

from common.clock import FarmClock
from common.errors import MessageError
from common.logs import get_logger
from common.settings import WorkerSettings
from config_db.reader import SnapshotReader
from config_db.spec import ModelSpec
from tasks import names
from tasks.objects import object_store
from tasks.transport import Drain, FarmChannel, Popped
from workers import checks
from workers.arrivals import Arrivals
from workers.aside import Aside
from workers.demand import DemandMet
from workers.dispatch import Dispatcher
from workers.heartbeat import Heartbeat
from workers.hosts.config import host_config
from workers.hosts.pool import HostPool
from workers.intake import Intake, IntakeLimits
from workers.janitor import Janitor, give_back, return_unheld
from workers.outcomes import OutcomeWriter
from workers.policy import BatchLimits, DispatchLimits, Policy
from workers.redis_link import RedisLink
from workers.reservation import Reservation
from workers.scheduler import Scheduler
from workers.settling import Settler

log = get_logger("workers")

SCRIPTS: Final = ("outcome", "start", "restore", "give_back", "close_overdue", "reclaim", "meet_demand")
GATHER_S: Final = 0.03
"""Measured with one-text requests of 64 callers, two hosts on two cores: 4 to 6 % more texts a second."""
FAST_TICK_S: Final = 0.25
SLOW_TICK_S: Final = 1.0
COMPARE_S: Final = 5.0
RECLAIM_S: Final = 2.0
OVERDUE_S: Final = 20.0
CLOCK_S: Final = 30.0
LEAVE_S: Final = 1.5
"""How long the last calls to Redis may take when the worker leaves."""
FOREIGN_TIMEOUT_S: Final = 120.0
"""How long a plain Celery producer's message may wait if it names no ``expires``."""
KOMBU_KEYS: Final = ("unacked", "unacked_index")


class Farm:
    """One worker's intake, scheduler, hosts, heartbeat and janitor.

    Args:
        settings: the worker's settings.
        nodename: Celery's name of this worker.
        queues: the queues it is started with.
    """

    def __init__(self, settings: WorkerSettings, *, nodename: str, queues: Sequence[str]) -> None:
        self.settings = settings
        self._nodename = nodename
        self._hub: Any = None
        self.clock = FarmClock()
        self.link = RedisLink(settings.redis_url, on_connect=self._on_link_connected, script_names=SCRIPTS)
        self.intake = Intake(
            IntakeLimits(settings.intake_max_messages, settings.intake_max_items, settings.intake_max_tokens)
        )
        self.reader = SnapshotReader(
            settings.database_url,
            poll_s=settings.config_poll_s,
            copy_path=settings.state_dir / "config" / f"{settings.pool}.{settings.machine_profile}.snapshot",
        )
        hosts = host_config(settings)
        self.heartbeat = Heartbeat(self.link, describe=self.describe, on_reborn=self._on_reborn)
        self.reservation = Reservation(
            home=queues,
            pool=settings.pool,
            machine_profile=settings.machine_profile,
            link=self.link,
            config=self.reader,
            clock=self.clock,
            incarnation=lambda: self.heartbeat.incarnation,
            on_moved=self._on_moved,
        )
        self.demand_met = DemandMet(self.link)
        self.janitor = Janitor(self.link, result_ttl_s=settings.result_ttl_s)
        self.aside = Aside(object_store(settings.object_store, settings.object_store_endpoint), self.clock)
        self.outcomes = OutcomeWriter(
            self.link,
            self.aside,
            result_ttl_s=settings.result_ttl_s,
            tokens_per_minute=self._tokens_per_minute,
            kombu_keys=None if self.is_batch_popping else KOMBU_KEYS,
            on_settled=lambda *settled: self.settler.on_settled(*settled),
        )
        self.settler = Settler(self.intake, self.outcomes, forget=lambda held: self.dispatcher.forget(held))
        self.dispatcher = Dispatcher(
            intake=self.intake,
            scheduler=Scheduler(
                BatchLimits(settings.batch_max_items, hosts.batch_max_tokens),
                Policy(gather_s=GATHER_S if hosts.devices == ("cpu",) else 0.0),
            ),
            link=self.link,
            specs=self.reader,
            clock=self.clock,
            limits=DispatchLimits(
                max_items=settings.batch_max_items,
                max_tokens=hosts.batch_max_tokens,
                hang_floor_s=settings.hang_floor_s,
                hang_unmeasured_s=settings.hang_unmeasured_s,
            ),
            settler=self.settler,
            held_keys=self._held_keys,
            on_residency=self.heartbeat.tell,
            runs_here=self._may_run,
        )
        self.hosts = self.dispatcher.hosts = HostPool(hosts, self.dispatcher, self.dispatcher.preloads)
        self.arrivals = Arrivals(
            intake=self.intake,
            link=self.link,
            specs=self.reader,
            clock=self.clock,
            settler=self.settler,
            default_timeout_s=FOREIGN_TIMEOUT_S,
            incarnation=lambda: self.heartbeat.incarnation,
            aside=self.aside,
            ready=self.dispatcher.schedule,
        )
        self.drain = Drain(
            incarnation=self.heartbeat.incarnation, room=self.intake, sink=_Sink(self), pop_max=settings.pop_max
        )

    @property
    def is_batch_popping(self) -> bool:
        """Whether this worker reads through our transport; on the fallback, kombu reads and records."""
        return self.settings.transport == "farm"

    def _tokens_per_minute(self, tenant: str) -> int:
        spec = self.reader.current.tenants.get(tenant)
        return spec.quotas.tokens_per_minute or 0 if spec is not None else 0

    def describe(self) -> dict[str, Any]:
        """What other processes may know of this worker."""
        hosts = self.hosts.hosts()
        config = self.reader.current
        return {
            "node": self._nodename,
            "pool": self.settings.pool,
            "machine_profile": self.settings.machine_profile,
            "shared": self.reservation.is_shared,
            "queues": self.reservation.queues(),
            "transport": self.settings.transport,
            "epoch": config.epoch,
            "epoch_id": str(config.epoch_id),
            "ready": bool(hosts),
            "hosts": len(hosts),
            "gpus": len({host.device for host in hosts} - {"cpu"}),
            "memory_used_bytes": sum(sum(host.resident.values()) for host in hosts),
            "memory_total_bytes": sum(host.budget_bytes for host in hosts),
            "resident": sorted({digest for host in hosts for digest in host.resident}),
            "loading": sorted(self.hosts.loading()),
            "load_failures": msgspec.to_builtins(self.hosts.load_failures()),
            **self.dispatcher.load(),
        }

    # -- what Celery's steps call -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Check what the promises rest on, then bring up config and hosts; SetupError says in one line why not."""
        client = redis.Redis.from_url(self.settings.redis_url, socket_connect_timeout=2, socket_timeout=5)
        with client:
            checks.check_redis(client)
            checks.self_test(client)
            checks.sync_clock(client, self.clock)
        self.hosts.start()
        self.reader.start()
        self.reader.subscribe(lambda _: self._on_new_epoch())

    def attach(self, consumer: Any) -> None:
        """Drain the queues of this consumer's channel from now on."""
        self.reservation.attach(consumer)
        channel = consumer.task_consumer.channel
        if not self.is_batch_popping:
            channel.qos.can_consume = lambda: self.intake.total_room() > 0
            channel.qos.restore_at_shutdown = False  # the intake keeps what it holds over a reconnect
            return
        assert isinstance(channel, FarmChannel)  # the app's broker URL names our transport
        self.drain.incarnation = self.heartbeat.incarnation
        self.drain.was_full = False
        self.drain.outstanding_tag = None
        channel.attach(self.drain)

    def register(self, hub: Any) -> None:
        """Add readers and timers; called at every (re)connect, which has dropped them.

        Celery forgot the held requests, too, so they are named to it again.
        """
        self._hub = hub
        self.link.register(hub)
        self.hosts.register(hub)
        for part in (self.settler, self.arrivals, self.dispatcher):
            part.register(hub)
        for held in self.intake:
            celery_state.task_reserved(held.request)
        hub.call_repeatedly(FAST_TICK_S, self._fast_tick)
        hub.call_repeatedly(SLOW_TICK_S, self._slow_tick)
        hub.call_repeatedly(CLOCK_S, self._sync_clock)
        hub.call_repeatedly(RECLAIM_S, self._reclaim)
        if self.is_batch_popping:
            hub.call_repeatedly(COMPARE_S, self._return_unheld)
            hub.call_repeatedly(OVERDUE_S, self._close_overdue)
            self._return_unheld()

    def leave(self, channel: Any, *, wait_s: float) -> None:
        """Shut down: wait for the running micro-batches, return the rest to the queues, leave no trace in Redis."""
        self.drain.closing = True
        self.dispatcher.stop_picking()
        self.heartbeat.close()
        for queue in self.reservation.queues():  # wakes the sleeping pop, which then finds the incarnation closing
            self.link.call("RPUSH", names.bell(queue), "1")
        log.info("worker_closing", running=self.dispatcher.running, held=len(self.intake))
        self._pump(channel, wait_s)
        self.outcomes.flush()
        self._return_all(channel)
        self.link.wait_answered(LEAVE_S)
        self.heartbeat.die()
        self.janitor.bury(self.heartbeat.incarnation)  # a pop's reply that was never read left records, too
        self.link.wait_answered(LEAVE_S)
        self.link.close()

    def stop(self) -> None:
        """End the hosts and the config reader."""
        self.aside.stop()
        self.hosts.stop(1.0)
        self.reader.stop()

    # -- on the loop ------------------------------------------------------------------------------------------------

    def _fast_tick(self) -> None:
        self.link.tend()
        self.aside.tick()
        self.arrivals.tick()
        self.dispatcher.tick()
        self.outcomes.flush()

    def _slow_tick(self) -> None:
        if self.link.is_connected:
            self.heartbeat.beat()
            if self.hosts.hosts():
                self.demand_met.tell(self.reservation.queues())
            self.arrivals.look_for_cancelled()
            self.reservation.look()
            self.janitor.look()

    def _sync_clock(self) -> None:
        asked_at = monotonic()

        def told(reply: Any) -> None:
            if isinstance(reply, list):
                self.clock.sync((int(reply[0]), int(reply[1])), asked_at=asked_at, answered_at=monotonic())

        self.link.call("TIME", then=told)

    def _return_unheld(self) -> None:
        if self.heartbeat.is_alive:
            return_unheld(
                self.link,
                self.heartbeat.incarnation,
                settled_below=self.drain.settled_below,
                missing=self.intake.missing,
            )

    def _close_overdue(self) -> None:
        if self.link.is_connected:
            self.janitor.close_overdue()

    def _reclaim(self) -> None:
        if self.link.is_connected:
            self.reservation.reclaim()

    def _on_moved(self, left: Collection[str]) -> None:
        """A pool has reserved this worker, or let it go: tell, and leave what was not started to who serves it now.

        Where nobody does, it is finished here; so it is on the fallback, whose records are kombu's.
        """
        self.heartbeat.tell()
        self.dispatcher.on_epoch()  # other models may run here now
        if not self.is_batch_popping or not left:
            return
        waiting = [held for held in self.intake if held.queue in left and held.works and held.started_at is None]
        tags = [held.tag for held in waiting if not held.is_settling and isinstance(held.tag, int)]
        for held in waiting:
            if not held.is_settling:
                self.intake.remove(held)
                self.dispatcher.forget(held)
                celery_state.task_ready(held.request)
        give_back(self.link, self.heartbeat.incarnation, tags)
        log.info("held_returned", messages=len(tags))

    def _on_link_connected(self) -> None:
        self.heartbeat.beat()

    def _on_new_epoch(self) -> None:
        """In the reader's thread: the loop tells of the new epoch."""
        hub = self._hub
        if hub is not None:
            hub.call_soon(self.heartbeat.tell)
            hub.call_soon(self.dispatcher.on_epoch)

    def _held_keys(self) -> tuple[str, str]:
        """Where Redis has what this incarnation holds: kombu's own transport keeps what all workers hold together."""
        incarnation = self.heartbeat.incarnation
        unacked = names.unacked(incarnation) if self.is_batch_popping else KOMBU_KEYS[0]
        return unacked, names.started(incarnation)

    def _may_run(self, spec: ModelSpec) -> bool:
        """Whether a model's placement lets it run on this worker."""
        placement, pool = spec.placement, self.reader.current.pools.get(self.reservation.pool or self.settings.pool)
        if placement.machine_profiles and self.settings.machine_profile not in placement.machine_profiles:
            return False
        return not placement.tenants or (pool is not None and pool.tenant in placement.tenants)

    def _on_reborn(self, former: str) -> None:
        """The former incarnation is judged dead: what it held goes back, and pops go under the new name.

        On the fallback kombu's records belong to nobody in particular, so what is held is still ours to answer.
        """
        self.drain.incarnation = self.heartbeat.incarnation
        if not self.is_batch_popping:
            for held in self.intake:
                held.incarnation = self.heartbeat.incarnation
            return
        dropped = self._give_up_all()
        log.warning("intake_dropped", former=former, messages=dropped)
        self.janitor.bury(former)

    def _give_up_all(self) -> int:
        """Forget every held request that has no outcome under way; returns how many. Their results are dropped."""
        left = [held for held in self.intake.clear() if not held.is_settling]
        for held in left:
            self.dispatcher.forget(held)
            celery_state.task_ready(held.request)
        self.arrivals.forget()
        self.dispatcher.forget_running()
        return len(left)

    def _pump(self, channel: Any, wait_s: float) -> None:
        """Run the loop until nothing runs and every outcome is confirmed, at most ``wait_s``."""
        deadline = monotonic() + wait_s
        ticking = self._hub.call_repeatedly(0.05, self.outcomes.flush)
        try:
            while monotonic() < deadline:
                busy = self.dispatcher.running or self.outcomes.unconfirmed
                if not busy and not getattr(channel, "has_asked", False):
                    return
                self._hub.run_once()
        except (redis.RedisError, OSError) as error:
            log.warning("broker_lost_while_closing", error=str(error))
        finally:
            ticking.cancel()

    def _return_all(self, channel: Any) -> None:
        tags = [held.tag for held in self.intake if not held.is_settling]
        if not self.is_batch_popping and channel is not None:
            channel.qos.restore_at_shutdown = True  # kombu returns what it has recorded when it closes the channel
        elif self.is_batch_popping and tags:
            log.info("held_returned", messages=len(tags))
            give_back(self.link, self.heartbeat.incarnation, [tag for tag in tags if isinstance(tag, int)])


class _Sink:
    """What the transport tells, handed on."""

    def __init__(self, farm: Farm) -> None:
        self._farm = farm

    def on_popped(self, *, cancelled: int) -> None:
        self._farm.arrivals.on_popped(cancelled=cancelled)

    def on_unreadable(self, message: Popped, error: MessageError) -> None:
        log.error("message_refused", queue=message.queue, error=str(error))
        if self._farm.arrivals.refuse(message.tag, error):
            return
        give_back(self._farm.link, self._farm.heartbeat.incarnation, [message.tag], where="dead")

    def on_gone(self) -> None:
        self._farm.heartbeat.be_reborn()
