"""The state of the whole farm for those who watch it: workers, their queues, models and demand.

However many ask, Redis is asked once a second, and the text for a watcher is made once a second for each tenant.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import Lock
from time import monotonic
from typing import Final

import msgspec

from common.errors import QueueUnavailableError
from config_db.families import why_unsupported
from config_db.snapshot import Snapshot
from config_db.spec import ModelSpec
from tasks import names
from tasks.client import FarmClient
from tasks.demand import Demand
from tasks.live_workers import WorkerView
from webapp.admission import may_use
from webapp.bundles import BUNDLE
from webapp.fleet import Fleet
from webapp.model_states import ModelStates, State
from webapp.wire import cluster as wire
from webapp.wire.answers import instant

FRESH_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What was there at one moment. ``lengths`` are messages by queue, ``waiting`` open requests not begun by model."""

    workers: Sequence[WorkerView]
    lengths: Mapping[str, int]
    waiting: Mapping[str, int]
    demands: Sequence[Demand]
    requests_per_s: float
    at: datetime


@dataclass(frozen=True, slots=True)
class Viewer:
    """Who looks: a tenant, or with None an operator, who sees everybody's."""

    tenant: str | None

    def sees_model(self, spec: ModelSpec) -> bool:
        """Whether it may know of the model."""
        return self.tenant is None or may_use(spec, self.tenant)

    def sees_pool(self, served: Snapshot, pool: str) -> bool:
        """Whether it may know of the pool: its own, or everybody's."""
        spec = served.pools.get(pool)
        return self.tenant is None or spec is None or spec.tenant in (None, self.tenant)


class Cluster:
    """The last sight of the farm; thread-safe.

    Args:
        fleet: the live workers.
        client: by which queues and demand are looked at.
        served: what is served now.
        machine_profile: of this farm, whether a worker of it lives or not.
        extra_families: of the operator's own.
    """

    def __init__(
        self,
        fleet: Fleet,
        client: FarmClient,
        served: Callable[[], Snapshot],
        *,
        machine_profile: str,
        extra_families: Mapping[str, str],
    ) -> None:
        self._fleet = fleet
        self._client = client
        self._served = served
        self._machine_profile = machine_profile
        self._extra_families = extra_families
        self._looking = Lock()
        self._looked_at: float | None = None
        self._seen: _Seen | None = None

    def health(self, viewer: Viewer, reasons: Iterable[str] = ()) -> wire.Health:
        """All there is to say; ``reasons`` are what is wrong besides what is seen here. Without Redis it is little."""
        served, wrong = self._served(), list(reasons)
        configured = sorted(served.machine_profiles() | {self._machine_profile})
        try:
            sight = self._look().sight
        except QueueUnavailableError as error:
            return wire.Health(
                status="degraded", configured_gpu_types=configured, live_gpu_types=[], reasons=[error.message, *wrong]
            )
        seen = self._show(sight, served, viewer)
        if unready := [worker.name for worker in seen.workers if not worker.healthy]:
            wrong.append(f"{len(unready)} workers are not ready: {', '.join(sorted(unready)[:5])}")
        live = sorted({worker.gpu for worker in seen.workers if worker.healthy})
        return wire.Health(
            status="no_workers" if not live else "degraded" if wrong else "healthy",
            configured_gpu_types=sorted({*configured, *live}),
            live_gpu_types=live,
            reasons=wrong,
            **msgspec.structs.asdict(seen),
        )

    def status_text(self, viewer: Viewer) -> str:
        """The message for those who watch; QueueUnavailableError if Redis does not answer."""
        seen = self._look()
        text = seen.texts.get(viewer)
        if text is None:
            shown = msgspec.structs.asdict(self._show(seen.sight, self._served(), viewer))
            status = wire.ClusterStatus(timestamp=seen.sight.at.timestamp(), **shown)
            text = seen.texts[viewer] = msgspec.json.encode(status).decode()
        return text

    def _look(self) -> "_Seen":
        """What was seen, at most a second ago."""
        with self._looking:
            if self._seen is None or self._looked_at is None or monotonic() - self._looked_at > FRESH_S:
                self._looked_at, self._seen = monotonic(), _Seen(self._look_now())
            return self._seen

    def _look_now(self) -> Sight:
        workers = self._fleet.workers()
        return Sight(
            workers=workers,
            lengths=self._client.queue_lengths({queue for worker in workers for queue in worker.queues}),
            waiting=_waiting(self._client.open_requests(self._served().models), workers),
            demands=self._client.demands(),
            requests_per_s=sum(web.requests_per_s for web in self._client.web_processes()),
            at=datetime.now(UTC),
        )

    def _show(self, sight: Sight, served: Snapshot, viewer: Viewer) -> wire.Cluster:
        specs = [
            spec
            for spec in served.all_specs()
            if viewer.sees_model(spec) and why_unsupported(spec, self._extra_families) is None
        ]
        name_of = {spec.digest: spec.id for spec in specs}
        views = [worker for worker in sight.workers if _sees_worker(viewer, served, worker)]
        workers = [_worker(view, sight.lengths, name_of) for view in views]
        holders: dict[str, list[wire.Worker]] = defaultdict(list)
        for worker in workers:
            for model in worker.loaded_models:
                holders[model].append(worker)
        ready, states = [worker for worker in workers if worker.healthy], ModelStates(views)
        return wire.Cluster(
            cluster=wire.Summary(
                worker_count=len(ready),
                gpu_count=sum(worker.gpu_count for worker in workers),
                models_loaded=len(holders),
                total_qps=round(sight.requests_per_s, 1),
            ),
            workers=workers,
            models=[
                _model(spec, holders.get(spec.id, []), states.state(spec.digest), sight.waiting)
                for spec in sorted(specs, key=lambda one: one.id)
            ],
            demand=[_demand(one, served, viewer) for one in sight.demands if viewer.sees_pool(served, one.pool)],
        )


@dataclass(slots=True)
class _Seen:
    """One sight, and the messages made of it."""

    sight: Sight
    texts: dict[Viewer, str] = field(default_factory=dict)


def _waiting(open_requests: Mapping[str, int], workers: Iterable[WorkerView]) -> dict[str, int]:
    """What is open of each model without what the workers last told to be at their hosts."""
    running: Counter[str] = Counter()
    for worker in workers:
        running.update(worker.running)
    return {model: max(0, count - running[model]) for model, count in open_requests.items()}


def _sees_worker(viewer: Viewer, served: Snapshot, worker: WorkerView) -> bool:
    pools = {place.rpartition(".")[0] for queue in worker.queues if (place := names.place_of(queue)) is not None}
    return not pools or any(viewer.sees_pool(served, pool) for pool in pools)


def _worker(view: WorkerView, lengths: Mapping[str, int], name_of: Mapping[str, str]) -> wire.Worker:
    return wire.Worker(
        name=view.node,
        gpu=view.machine_profile,
        gpu_count=view.gpus,
        ready_gpu_slots=view.hosts if view.is_ready else 0,
        healthy=view.is_ready,
        queue_depth=sum(lengths.get(queue, 0) for queue in view.queues),
        loaded_models=sorted(name_of[digest] for digest in view.resident if digest in name_of),
        memory_used_bytes=view.memory_used_bytes,
        memory_total_bytes=view.memory_total_bytes,
        bundle=BUNDLE,
        bundle_config_hash=view.epoch_id,
    )


def _model(spec: ModelSpec, holders: Sequence[wire.Worker], state: State, waiting: Mapping[str, int]) -> wire.Model:
    return wire.Model(
        name=spec.id,
        state=state,
        worker_count=len(holders),
        gpu_types=sorted({worker.gpu for worker in holders}),
        total_queue_depth=waiting.get(names.base_model(spec.id), 0),
    )


def _demand(demand: Demand, served: Snapshot, viewer: Viewer) -> wire.Demand:
    spec = served.find(demand.model)
    return wire.Demand(
        pool=demand.pool,
        machine_profile=demand.machine_profile,
        since=instant(demand.since),
        last=instant(demand.last),
        asked=demand.asked,
        model=demand.model if spec is not None and viewer.sees_model(spec) else None,
    )
