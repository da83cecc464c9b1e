"""The farm as ``/health`` and ``/ws/cluster-status`` show it: what public clients read, and ``demand`` of our own."""

from typing import Final

import msgspec

GATEWAY: Final = "gateway"
"""Clients look whether they speak with a whole farm or with one worker."""


class Worker(msgspec.Struct, kw_only=True):
    """One live worker. ``gpu`` is its machine profile, ``queue_depth`` what waits in the queues it takes from.

    ``ready_gpu_slots`` are its hosts that take work, those on CPU among them.
    """

    name: str
    gpu: str
    gpu_count: int
    ready_gpu_slots: int
    healthy: bool
    queue_depth: int
    loaded_models: list[str]
    memory_used_bytes: int
    memory_total_bytes: int
    bundle: str
    bundle_config_hash: str
    url: str = ""


class Model(msgspec.Struct, kw_only=True):
    """One model, and where it is loaded. ``total_queue_depth``: its open requests that no host has begun.

    Workers tell each second what their hosts have begun; what began or ended since then is counted as it was, and what
    was cancelled while it ran is taken off until it is done. A profile has the depth of its model, as they are counted
    together; messages of plain Celery producers are not counted.
    """

    name: str
    state: str
    worker_count: int
    gpu_types: list[str]
    total_queue_depth: int


class Summary(msgspec.Struct, kw_only=True):
    """``worker_count`` counts the workers that serve, ``total_qps`` requests a second over the last seconds."""

    worker_count: int = 0
    gpu_count: int = 0
    models_loaded: int = 0
    total_qps: float = 0.0


class Demand(msgspec.Struct, kw_only=True):
    """What is asked for where no worker lives. ``model`` is missing if the caller may not know of it."""

    pool: str
    machine_profile: str
    since: str
    last: str
    asked: int
    model: str | None = None


class Cluster(msgspec.Struct, kw_only=True):
    """Who is there and what is loaded."""

    cluster: Summary = msgspec.field(default_factory=Summary)
    workers: list[Worker] = msgspec.field(default_factory=list)
    models: list[Model] = msgspec.field(default_factory=list)
    demand: list[Demand] = msgspec.field(default_factory=list)


class ClusterStatus(Cluster, kw_only=True):
    """One message of ``/ws/cluster-status``; ``timestamp`` in seconds since 1970."""

    timestamp: float


class Health(Cluster, kw_only=True):
    """The answer of ``/health``. ``status``: ``healthy``, ``degraded`` (``reasons`` say why) or ``no_workers``."""

    status: str
    configured_gpu_types: list[str]
    live_gpu_types: list[str]
    reasons: list[str] = msgspec.field(default_factory=list)
    type: str = GATEWAY
