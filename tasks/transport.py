"""kombu's Redis transport with batch pop for the farm's queues. Every other queue keeps kombu's own BRPOP.

One Lua call takes many messages over several queues and records them as unacknowledged in the same step, under keys of
one process incarnation. Between calls the connection sleeps on the bells of the queues that there is room for.

Owns: which messages are asked for, and their tags. Does not own: how many there is room for (the intake says), nor
acknowledgement (the outcome script). It leans on private parts of kombu 5.7; ``tests/unit/test_celery_contract.py``
fails when those move.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty
from time import monotonic
from typing import Any, Final, Protocol

import orjson
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as kombu_redis
from redis import Redis
from redis.exceptions import ConnectionError, OutOfMemoryError, ResponseError  # noqa: A004 - redis-py's, which is no OSError

from common.errors import MessageError
from common.faults import fault
from common.logs import get_logger
from tasks import names, scripts
from tasks.names import LANES, QUEUE_PREFIX, lane_of

log = get_logger("tasks")

_KombuQoS: Any = kombu_redis.QoS  # the stubs know neither their private parts nor what channels carry
_KombuChannel: Any = kombu_redis.Channel
_KombuTransport: Any = kombu_redis.Transport
_RedisClient: Any = Redis

SCHEME: Final = "farm"
"""URLs of this transport are ``farm://host:port/db``: the same Redis, another way of reading from it."""
BELL_WAIT_S: Final = 1
"""The longest sleep on a bell: also the bound for messages of producers that ring none."""
CONTENT_TYPES: Final = frozenset(("application/x-msgpack", "application/json"))
BELL_PREFIX: Final = names.bell("")


class Room(Protocol):
    """What the intake can still hold; asked before every pop."""

    def room(self, queue: str) -> int:
        """How many messages of this queue may be taken now."""

    def total_room(self) -> int:
        """How many messages may be taken now over all queues."""


@dataclass(frozen=True, slots=True)
class Popped:
    """One message as it left its queue. ``lost`` counts the incarnations that died while running it."""

    tag: int
    queue: str
    lost: int
    raw: bytes


class PopSink(Protocol):
    """What the transport tells the worker."""

    def on_popped(self, *, cancelled: int) -> None:
        """Messages have been taken; they are delivered next. ``cancelled`` ids are known to Redis."""

    def on_unreadable(self, message: Popped, error: MessageError) -> None:
        """This message broke whatever tried to take it in."""

    def on_gone(self) -> None:
        """The pop refused: the incarnation's heartbeat has expired."""


@dataclass
class Drain:
    """One incarnation's reading of its queues; owned by the worker's event loop.

    ``tag`` counts up by what each pop may use, so that a lost reply leaves a gap and no tag is used twice.
    """

    incarnation: str
    room: Room
    sink: PopSink
    pop_max: int
    closing: bool = False
    tag: int = 1
    popped: int = 0
    turn: int = 0
    was_full: bool = False
    outstanding_tag: int | None = None
    asked_by: str = ""

    def wanted(self) -> int:
        """Messages the next pop may take."""
        return 0 if self.closing else min(self.pop_max, self.room.total_room())

    def settled_below(self) -> int:
        """Every tag below this is either in the intake, answered, or was lost with its reply."""
        return self.tag if self.outstanding_tag is None else self.outstanding_tag

    def begin(self, queues: Sequence[str], wanted: int) -> list[Any]:
        """The arguments of one EVALSHA that pops at most ``wanted`` messages over ``queues``, most urgent first."""
        first_lane = lane_of(queues[0])
        tops = sum(1 for queue in queues if lane_of(queue) is first_lane)
        keys = [
            names.beat(self.incarnation),
            names.closing(self.incarnation),
            names.unacked(self.incarnation),
            names.LOST,
            names.CANCELLED,
            *queues,
        ]
        rooms = [self.room.room(queue) for queue in queues]
        arguments = [tops, wanted, self.tag, self.popped, self.turn, BELL_PREFIX, *rooms]
        self.outstanding_tag, self.asked_by = self.tag, self.incarnation
        self.tag += wanted
        return [scripts.sha("pop"), len(keys), *keys, *arguments]

    def end(self, reply: Sequence[Any], queues: Sequence[str], wanted: int) -> list[Popped]:
        """The messages of a pop's reply."""
        self.outstanding_tag = None
        verdict = bytes(reply[0])
        if self.asked_by != self.incarnation or verdict == b"closing":
            return []  # a former incarnation's messages are the janitor's
        if verdict == b"gone":
            self.was_full = False
            self.sink.on_gone()
            return []
        self.turn = int(reply[2])
        messages = [
            Popped(int(tag), queues[int(index) - 1], int(lost), raw)
            for tag, index, lost, raw in zip(reply[3::4], reply[4::4], reply[5::4], reply[6::4], strict=True)
        ]
        self.popped += len(messages)
        self.was_full = len(messages) >= wanted
        if messages:
            fault("worker.popped")
            self.sink.on_popped(cancelled=int(reply[1]))
        return messages


class FarmQoS(_KombuQoS):
    """Acknowledgement for messages that came through a drain: their records are the incarnation's, not kombu's."""

    def can_consume(self) -> bool:
        """Whether the intake has room, or a pop's reply waits; kombu's prefetch count where there is no drain."""
        drain = self.channel.drain
        if drain is None:
            return bool(super().can_consume())
        return bool(self.channel.has_asked or drain.wanted() > 0)

    def append(self, message: Any, delivery_tag: Any) -> None:
        """Keep kombu's own records for kombu's own messages only: the pop has recorded ours."""
        if not isinstance(delivery_tag, int):
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: Any) -> None:
        """Celery acknowledges what it will not run (damaged, unknown): it goes to the dead letters."""
        if isinstance(delivery_tag, int):
            self.channel.give_back([delivery_tag], "dead")
        else:
            super().ack(delivery_tag)

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        """Return a message to its queue, or put it to the dead letters."""
        if isinstance(delivery_tag, int):
            self.channel.give_back([delivery_tag], "queue" if requeue else "dead")
        else:
            super().reject(delivery_tag, requeue=requeue)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Nothing becomes visible by time: the janitor returns what dead incarnations held."""
        if self.channel.drain is None:
            with suppress(OutOfMemoryError):  # its lock cannot be taken in a full Redis: the next look comes soon
                super().restore_visible(*args, **kwargs)


class _Client(_RedisClient):
    """Kombu's pipelines without transactions, which save it round trips and nothing else.

    A full Redis refuses whatever stands in a transaction, even a DEL: no worker could come and empty it.
    """

    def pipeline(self, transaction: bool = False, shard_hint: Any = None) -> Any:
        return super().pipeline(transaction, shard_hint)


class FarmChannel(_KombuChannel):
    """A Redis channel that, given a drain, reads the farm's queues by batch pop."""

    QoS = FarmQoS
    drain: Drain | None = None
    _asked: tuple[list[str], int, bool] | None = None

    @property
    def has_asked(self) -> bool:
        """Whether a pop is under way."""
        return self._asked is not None

    def attach(self, drain: Drain) -> None:
        """Read the farm's queues through this drain."""
        self._load_scripts()
        self.drain = drain

    def _farm_queues(self) -> list[str]:
        """The farm's queues this channel consumes, most urgent lane first."""
        order = {lane: index for index, lane in enumerate(LANES)}
        mine = [queue for queue in self.active_queues if queue.startswith(QUEUE_PREFIX)]
        return sorted(mine, key=lambda queue: order[lane_of(queue)])

    def _get_client(self) -> Any:
        return _Client

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        """As kombu does; on a full Redis the binding waits for kombu's own timer, which renews it.

        Else no worker could come to a full Redis to empty it. Only control queues are bound, and their messages are
        delivered by publish and subscribe, which need no binding.
        """
        try:
            super()._queue_bind(exchange, routing_key, pattern, queue)
        except ResponseError as error:
            if "maxmemory" not in str(error):
                raise
            log.warning("binding_put_off", queue=queue, error=str(error))

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Ask for messages: sleep on the bells, then pop, in one packet; without sleeping while pops come back full."""
        drain = self.drain
        if drain is None:
            super()._brpop_start(timeout)
            return
        queues = self._farm_queues()
        wanted = drain.wanted()
        if wanted <= 0 or not any(drain.room.room(queue) > 0 for queue in queues):
            return
        connection = self.client.connection
        waits = not drain.was_full
        packed: list[bytes] = []
        if waits:
            bells = [names.bell(queue) for queue in queues if drain.room.room(queue) > 0]
            packed += connection.pack_command("BLPOP", *(bells or [names.bell(queues[0])]), BELL_WAIT_S)
        packed += connection.pack_command("EVALSHA", *drain.begin(queues, wanted))
        self._in_poll = connection
        self._brpop_sent_at = monotonic()
        self._asked = (queues, wanted, waits)
        connection.send_packed_command(packed)

    def _brpop_read(self, **options: Any) -> bool:
        """Read what was asked for and deliver every message of it."""
        if self._asked is None:
            return bool(super()._brpop_read(**options))
        (queues, wanted, waited), self._asked = self._asked, None
        try:
            reply = self._read_pop(waited)
        finally:
            self._in_poll = None
        drain = self.drain
        if reply is None or drain is None:
            raise Empty
        messages = drain.end(reply, queues, wanted)
        consumed = self.connection._callbacks  # noqa: SLF001 - kombu's own map of consumers
        cancelled = [message.tag for message in messages if message.queue not in consumed]
        if cancelled:  # their queue was left between the pop and its reply
            self.give_back(cancelled, "queue")
        for message in messages:
            if message.queue in consumed:
                self._deliver_popped(drain, message, consumed[message.queue])
        if not messages:
            raise Empty
        return True

    def _read_pop(self, waited: bool) -> Sequence[Any] | None:
        connection = self.client.connection
        try:
            if waited:
                connection.read_response(disable_decoding=True)
            reply: Sequence[Any] = connection.read_response(disable_decoding=True)
        except ResponseError as error:
            if not str(error).startswith("NOSCRIPT"):
                # READONLY after a failover, a key of another type: if the sleep was refused, the pop's answer is still
                # unread, and on whatever connection comes next all may be well
                connection.disconnect()
                raise ConnectionError(f"Redis refused the pop: {error}") from error
            self._load_scripts()
            return None
        except self.connection_errors:
            connection.disconnect()
            raise
        return reply

    def _load_scripts(self) -> None:
        with self.conn_or_acquire() as client:
            client.script_load(scripts.source("pop"))
            client.script_load(scripts.source("give_back"))

    def _deliver_popped(self, drain: Drain, message: Popped, callback: Any) -> None:
        """Hand one message to kombu's consumer callback, under our tag; a damaged one goes alone to the sink."""
        try:
            payload = orjson.loads(message.raw)
            payload["properties"]["delivery_tag"] = message.tag
            payload["properties"].setdefault("delivery_info", {}).update(
                {"routing_key": message.queue, "redelivered": message.lost > 0}
            )
            if not isinstance(payload["headers"], dict):
                raise TypeError("headers are not a map")  # noqa: TRY301
            if payload.get("content-type") not in CONTENT_TYPES:
                raise TypeError("the body is neither msgpack nor JSON")  # noqa: TRY301
            parsed = self.Message(payload, channel=self)
            parsed.popped = message
            callback(parsed)
        except (ConnectionError, OSError):  # of the broker; kombu's own list of them holds KeyError, too
            raise
        except Exception as error:  # noqa: BLE001 - whatever a hostile message breaks, it breaks alone
            drain.sink.on_unreadable(message, MessageError(f"the message cannot be taken in: {error!r}"))

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **kwargs: Any) -> Any:
        """As kombu does; with a drain, messages arrive parsed and are not recorded a second time."""
        answer = super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)
        plain = self.connection._callbacks[queue]  # noqa: SLF001

        def deliver(raw: Any) -> Any:
            return callback(raw) if isinstance(raw, self.Message) else plain(raw)

        self.connection._callbacks[queue] = deliver  # noqa: SLF001
        return answer

    def give_back(self, tags: Sequence[int], where: str) -> None:
        """Move messages of this incarnation to their queue (``queue``) or to the dead letters (``dead``)."""
        assert self.drain is not None  # only a drain gives integer tags
        keys = [names.unacked(self.drain.incarnation), names.started(self.drain.incarnation), names.DEAD_LETTERS]
        with self.conn_or_acquire() as client:
            client.eval(scripts.source("give_back"), len(keys), *keys, BELL_PREFIX, where, *sorted(tags, reverse=True))

    def _restore(self, message: Any, leftmost: bool = False) -> None:
        """Kombu restores what it recorded; ours stay with their incarnation, whose intake still holds them."""
        if not isinstance(message.delivery_tag, int):
            super()._restore(message, leftmost)

    def close(self) -> None:
        """Detach: messages held stay with the incarnation, so that a reconnect loses and repeats nothing."""
        self._asked_is_void()
        super().close()

    def _asked_is_void(self) -> None:
        """Forget an unread pop: its reply goes with the connection, the worker's comparison returns its messages."""
        if self._asked is not None:
            self._asked, self._in_poll = None, None
            if self.drain is not None:
                self.drain.outstanding_tag = None


class FarmTransport(_KombuTransport):
    """kombu's Redis transport with ``FarmChannel``. ``driver_type`` stays redis: events and control go the same way."""

    Channel = FarmChannel


def register() -> None:
    """Make ``farm://`` known to kombu in this process."""
    TRANSPORT_ALIASES[SCHEME] = TRANSPORT_ALIASES[f"{SCHEME}s"] = "tasks.transport:FarmTransport"


def broker_url(redis_url: str, transport: str) -> str:
    """The kombu URL for a Redis URL: ``farm://`` for batch pop, ``redis://`` as it is for the fallback."""
    if transport == "redis":
        return redis_url
    scheme, rest = redis_url.split("://", 1)
    return f"{SCHEME}{'s' if scheme == 'rediss' else ''}://{rest}"


def connection_options() -> Mapping[str, Any]:
    """Transport options of every broker connection, for both transports."""
    return {
        "priority_steps": [0],
        "socket_timeout": 5,
        "socket_connect_timeout": 1,
        "socket_keepalive": True,
        "health_check_interval": 2,
        "visibility_timeout": 3600,
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        "unacked_mutex_expire": 30,
        "client_name": "farmhand-worker",
    }
