"""The workers that live now, as they tell of themselves in Redis, and what is open: in queues, and of models."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from tasks import names


class LoadFailure(msgspec.Struct, frozen=True, kw_only=True):
    """How the last load of a spec failed: the error's code and words, which attempt it was, and if others are vain."""

    code: str
    message: str
    attempts: int
    permanent: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """What a live worker tells of itself. ``resident`` holds digests of the specs that some host of it holds.

    ``loading`` holds those that some host loads, ``load_failures`` has those whose last load failed.

    ``pool`` is the one that it was started for, whichever has reserved it.

    ``epoch`` and ``epoch_id`` are those of the config it serves; a worker of an earlier release tells no id.
    ``request_s`` is what a request takes one of its ``hosts``, in seconds, by queue, while it has more to do than they
    can; ``weights`` those of the tenants that wait in each lane, added up. ``running`` counts the requests that its
    hosts have begun, by model, of those that were admitted; a worker of an earlier release does not tell. ``gpus`` are
    the devices its hosts run on without the CPU; memory is that of models.
    """

    incarnation: str
    node: str
    pool: str
    machine_profile: str
    epoch: int
    epoch_id: str
    queues: frozenset[str]
    resident: frozenset[str]
    transport: str
    is_ready: bool
    hosts: int = 0
    request_s: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    running: Mapping[str, int] = field(default_factory=dict)
    gpus: int = 0
    memory_used_bytes: int = 0
    memory_total_bytes: int = 0
    loading: frozenset[str] = frozenset()
    load_failures: Mapping[str, LoadFailure] = field(default_factory=dict)


class _Told(msgspec.Struct):
    node: str = ""
    pool: str = ""
    machine_profile: str = ""
    epoch: int = 0
    epoch_id: str = ""
    queues: frozenset[str] = frozenset()
    resident: frozenset[str] = frozenset()
    transport: str = "farm"
    ready: bool = False
    hosts: int = 0
    request_s: dict[str, float] = msgspec.field(default_factory=dict)
    weights: dict[str, float] = msgspec.field(default_factory=dict)
    running: dict[str, int] = msgspec.field(default_factory=dict)
    gpus: int = 0
    memory_used_bytes: int = 0
    memory_total_bytes: int = 0
    loading: frozenset[str] = frozenset()
    load_failures: dict[str, LoadFailure] = msgspec.field(default_factory=dict)


class Asks(Protocol):
    """Who asks Redis (``tasks.connections``)."""

    def ask(self, *command: Any) -> Any:
        """One command; QueueUnavailableError if it is not answered."""

    def ask_many(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Several commands in one packet; QueueUnavailableError if they are not answered."""

    def script(self, name: str, keys: list[str], arguments: list[Any]) -> Any:
        """Run one of the farm's Lua scripts; QueueUnavailableError if it is not answered."""


def live_workers(connections: Asks) -> list[WorkerView]:
    """The workers whose heartbeat is there; QueueUnavailableError if Redis does not answer."""
    told: dict[bytes, bytes] = connections.ask("HGETALL", names.INCARNATIONS)
    views = [view for incarnation, text in told.items() if (view := _worker(incarnation.decode(), text)) is not None]
    beats = connections.ask_many(*(("EXISTS", names.beat(view.incarnation)) for view in views)) if views else []
    return [view for view, beat in zip(views, beats, strict=True) if beat]


def queue_lengths(connections: Asks, queues: Collection[str]) -> dict[str, int]:
    """Messages that wait in each queue; QueueUnavailableError if Redis does not answer."""
    lengths = connections.ask_many(*(("LLEN", queue) for queue in queues)) if queues else []
    return dict(zip(queues, lengths, strict=True))


def open_requests(connections: Asks, models: Collection[str]) -> dict[str, int]:
    """Requests of each model that are open, waiting or running; QueueUnavailableError if Redis does not answer."""
    sets = [names.OPEN_BY_MODEL + model for model in models]
    return dict(zip(models, connections.script("count_open", sets, []), strict=True)) if sets else {}


def _worker(incarnation: str, text: bytes) -> WorkerView | None:
    """A worker's description; None for one that cannot be read, as a newer release's may be."""
    try:
        told = msgspec.json.decode(text, type=_Told)
    except msgspec.DecodeError:
        return None
    return WorkerView(
        incarnation=incarnation,
        node=told.node,
        pool=told.pool,
        machine_profile=told.machine_profile,
        epoch=told.epoch,
        epoch_id=told.epoch_id,
        queues=told.queues,
        resident=told.resident,
        transport=told.transport,
        is_ready=told.ready,
        hosts=told.hosts,
        request_s=told.request_s,
        weights=told.weights,
        running=told.running,
        gpus=told.gpus,
        memory_used_bytes=told.memory_used_bytes,
        memory_total_bytes=told.memory_total_bytes,
        loading=told.loading,
        load_failures=told.load_failures,
    )
