"""Which pool this worker serves: it looks who lives, computes the assignment as everybody does, and changes its queues.

States of a worker: shared (it consumes the queues it was started with) <-> reserved (those of one pool instead). It
changes when it has found the same answer for ``SETTLED_S``, so that heartbeats that are lost and found move nobody.

What dies and what happens here:
  a reserved worker   its heartbeat ends; the others find that, and the next in rank takes its place, if there is one
  this process        started again it has the same name, so the same rank: it comes back to its place
  Redis               nobody looks, nobody moves; on return incarnations are born anew, and ``SETTLED_S`` covers that
  Postgres            pools stand as in the last snapshot; a lease, which nobody could renew, does not run out meanwhile
  a pool              what waits in its queues goes to the shared ones (``reclaim.lua``); any worker sees to it

Owned by the event loop thread.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from time import monotonic
from typing import Any, Final, Protocol

import msgspec
from kombu import Queue

from common.clock import FarmClock
from common.logs import get_logger
from config_db.access import PoolSpec
from config_db.snapshot import Snapshot
from tasks import names
from tasks.names import LANES, queue_name
from tasks.transport import BELL_PREFIX
from workers.assignment import Candidate, assign
from workers.redis_link import RedisLink

log = get_logger("workers")

SETTLED_S: Final = 1.5
GONE_S: Final = 6
"""A pool that nobody has said to be there for so long is no more: what waits for it is moved."""
KNOWN_S: Final = 3600
"""The queues of a pool that is no more are looked at for so long: a process without news may still send to them."""
MOVED_AT_ONCE: Final = 500


class Consumer(Protocol):
    """Celery's consumer, as its remote control uses it."""

    app: Any

    def add_task_queue(self, queue: str) -> None:
        """Consume a queue, also after a reconnect."""

    def cancel_task_queue(self, queue: str) -> None:
        """Consume it no more."""


class Config(Protocol):
    """The config snapshot (``config_db.reader.SnapshotReader``)."""

    @property
    def current(self) -> Snapshot:
        """The snapshot now held."""

    @property
    def is_connected(self) -> bool:
        """Whether it is of the present, as far as can be known."""


class _Told(msgspec.Struct):
    node: str = ""
    machine_profile: str = ""
    shared: bool = False


class Reservation:
    """The pool that has reserved this worker, if any, and the queues that follow from it.

    Args:
        home: the queues this worker was started with.
        pool: the pool it was started for.
        machine_profile: what it runs on.
        link: the incarnation's own connection.
        config: where the pools stand.
        clock: the farm's clock.
        incarnation: the uuid this process lives under now.
        on_moved: called after the queues have changed with those that were left and that another worker still serves.
    """

    def __init__(
        self,
        *,
        home: Sequence[str],
        pool: str,
        machine_profile: str,
        link: RedisLink,
        config: Config,
        clock: FarmClock,
        incarnation: Callable[[], str],
        on_moved: Callable[[Collection[str]], None],
    ) -> None:
        self.pool: str | None = None
        self.is_shared = pool == names.SHARED_POOL and set(home) == set(_queues(pool, machine_profile))
        self._home = tuple(home)
        self._machine_profile = machine_profile
        self._link = link
        self._config = config
        self._clock = clock
        self._incarnation = incarnation
        self._on_moved = on_moved
        self._consumer: Consumer | None = None
        self._told: dict[bytes, _Told] = {}
        self._wanted: str | None = None
        self._wanted_since = 0.0

    def attach(self, consumer: Consumer) -> None:
        """Change this consumer's queues from now on; what a former one consumed, Celery has taken over."""
        self._consumer = consumer

    def queues(self) -> list[str]:
        """What is consumed now, as Celery says: its remote control may have changed it, too."""
        return list(self._home) if self._consumer is None else list(self._consumer.app.amqp.queues.consume_from)

    def look(self) -> None:
        """Look who lives, while there is a pool to serve or to leave; called every second."""
        if self.is_shared and (self.pool is not None or self._pools()):
            self._link.call("HKEYS", names.INCARNATIONS, then=self._on_known)

    def reclaim(self) -> None:
        """Say which pools are there, and move what waits for those that are no more; called every few seconds."""
        standing = [
            names.pool_queue(name, profile) for name, spec in self._pools().items() for profile in spec.machine_profiles
        ]
        arguments = [names.QUEUE_PREFIX, names.SHARED_POOL, GONE_S, KNOWN_S, MOVED_AT_ONCE, BELL_PREFIX, len(LANES)]

        def moved(reply: Any) -> None:
            if isinstance(reply, int) and reply:
                log.info("pool_messages_moved", messages=reply)

        self._link.script("reclaim", [names.POOL_QUEUES], [*arguments, *LANES, *standing], then=moved)

    def _pools(self) -> Mapping[str, PoolSpec]:
        """The pools that stand. While the config DB is away, none runs out: its client cannot renew it."""
        pools = self._config.current.pools
        if not pools or not self._config.is_connected:
            return pools
        now = datetime.fromtimestamp(self._clock.now(), UTC)
        return {name: spec for name, spec in pools.items() if not spec.is_expired(now)}

    def _on_known(self, reply: Any) -> None:
        if not isinstance(reply, list) or not reply:
            return
        self._told = {one: told for one, told in self._told.items() if one in reply}
        unknown = [one for one in reply if one not in self._told]
        if unknown:  # what is read of a worker stays the same for the life of its incarnation
            self._link.call("HMGET", names.INCARNATIONS, *unknown, then=partial(self._on_told, unknown))
        beats = [names.beat(one.decode()) for one in reply]
        self._link.call("MGET", *beats, then=partial(self._on_beats, reply))

    def _on_told(self, incarnations: Sequence[bytes], reply: Any) -> None:
        if not isinstance(reply, list):
            return
        for incarnation, text in zip(incarnations, reply, strict=True):
            try:
                self._told[incarnation] = msgspec.json.decode(text or b"{}", type=_Told)
            except msgspec.DecodeError:  # a newer release's: no worker that this one would know how to share with
                self._told[incarnation] = _Told()

    def _on_beats(self, incarnations: Sequence[bytes], reply: Any) -> None:
        if not isinstance(reply, list):
            return
        live = [
            Candidate(one.decode(), told.node, told.machine_profile)
            for one, beat in zip(incarnations, reply, strict=True)
            if beat is not None and (told := self._told.get(one)) is not None and told.shared
        ]
        me = self._incarnation()
        if all(one.incarnation != me for one in live):  # judged dead, or not yet born: nothing to go by
            self._wanted = self.pool
            return
        assigned = assign(self._pools(), live)
        wanted = assigned.get(me)
        if wanted != self._wanted:
            self._wanted, self._wanted_since = wanted, monotonic()
        if wanted == self.pool or self._consumer is None or monotonic() - self._wanted_since < SETTLED_S:
            return
        still_served = {
            assigned.get(one.incarnation)
            for one in live
            if one.incarnation != me and one.machine_profile == self._machine_profile
        }
        self._move(self._consumer, wanted, is_left_served=self.pool in still_served)

    def _move(self, consumer: Consumer, pool: str | None, *, is_left_served: bool) -> None:
        """Change the queues: the new ones first, so that a connection lost amid it finds none missing."""
        left, taken = self._queues_in(self.pool), self._queues_in(pool)
        known = consumer.app.amqp.queues
        for queue in taken:
            if queue not in known:
                known.add(Queue(queue, routing_key=queue, no_declare=True))
            consumer.add_task_queue(queue)
        for queue in left:
            consumer.cancel_task_queue(queue)
            if queue not in self._home:
                known.pop(queue, None)
        log.info("worker_reserved" if pool else "worker_shared", pool=pool or self.pool)
        self.pool = pool
        self._on_moved(left if is_left_served else ())

    def _queues_in(self, pool: str | None) -> Sequence[str]:
        return self._home if pool is None else _queues(pool, self._machine_profile)


def _queues(pool: str, machine_profile: str) -> list[str]:
    return [queue_name(pool, machine_profile, lane) for lane in LANES]
