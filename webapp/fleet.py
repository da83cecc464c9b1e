"""The live workers and web processes as this one sees them: read from Redis when asked for.

A request for a model does not wait for this while a worker was there for its queue a moment ago (``is_served``). What
waits: readiness, model states, pools other than the default one, and the question who serves which epoch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from threading import Lock, Thread
from time import monotonic
from typing import Final, Literal

from common.errors import QueueUnavailableError
from common.logs import get_logger
from config_db.convergence import Epoch, has_reached
from config_db.snapshot import Snapshot
from tasks.client import FarmClient
from tasks.live_workers import WorkerView
from tasks.refusals import RETRY_AFTER_S
from webapp.model_states import ModelStates

log = get_logger("webapp")

FRESH_S: Final = 1.0
GRACE_S: Final = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessEpoch:
    """Which epoch of the config DB one live process serves. ``epoch_id`` is empty if it does not tell."""

    kind: Literal["web", "worker"]
    name: str
    machine_profile: str
    epoch: int
    epoch_id: str

    @property
    def served(self) -> Epoch:
        """The epoch."""
        return Epoch(self.epoch, self.epoch_id)


class Fleet:
    """Remembers the last look at the live workers, for a second; thread-safe, with one look under way at a time.

    Args:
        client: by which it looks.
        grace_s: how long a queue counts as served after the last look that found a worker on it.
    """

    def __init__(self, client: FarmClient, *, grace_s: float = GRACE_S) -> None:
        self._client = client
        self._grace_s = grace_s
        self._workers: Sequence[WorkerView] = ()
        self._looked_at = self._failed_at = -inf
        self._served_until: dict[str, float] = {}
        self._epochs: list[ProcessEpoch] = []
        self._epochs_at: float | None = None
        self._looking = Lock()
        self._looking_at_epochs = Lock()

    def is_served(self, queue: str) -> bool:
        """Whether a request on this queue finds a worker: one lives, or did until just now and is likely replaced.

        Raises:
            QueueUnavailableError: nobody was known to be there, and Redis does not answer.
        """
        now = monotonic()
        if self._served_until.get(queue, -inf) > now:
            if now - self._looked_at > FRESH_S:
                self._look_aside()
            return True
        self._look(0.0)
        return self._served_until.get(queue, -inf) > monotonic()

    def workers(self) -> Sequence[WorkerView]:
        """The live workers, at most a second old; QueueUnavailableError if Redis does not answer."""
        if monotonic() - self._looked_at > FRESH_S:
            self._look(FRESH_S)
        return self._workers

    def _look(self, oldest_s: float) -> None:
        """Look unless somebody has since ``oldest_s`` ago; all who wait here meanwhile share one look and its fate."""
        came_at = monotonic()
        with self._looking:
            if self._failed_at >= came_at:
                raise QueueUnavailableError("Redis does not answer; try again soon", retry_after_s=RETRY_AFTER_S)
            if self._looked_at < came_at - oldest_s:
                self._look_now()

    def _look_aside(self) -> None:
        """Look in a thread of its own, so that nobody waits; while Redis is away the old news serve."""
        if not self._looking.acquire(blocking=False):
            return

        def look() -> None:
            try:
                self._look_now()
            except QueueUnavailableError as error:
                log.info("workers_not_seen", error=error.message)
            finally:
                self._looking.release()

        Thread(target=look, name="farm-fleet", daemon=True).start()

    def _look_now(self) -> None:
        """Called by who holds the lock."""
        now = monotonic()
        try:
            workers = self._client.workers()
        except QueueUnavailableError:
            self._failed_at = monotonic()
            raise
        until = now + FRESH_S + self._grace_s
        seen = {queue: until for worker in workers for queue in worker.queues}
        self._served_until = {queue: at for queue, at in self._served_until.items() if at > now} | seen
        self._workers = workers
        self._looked_at = now

    def model_states(self) -> ModelStates:
        """What has become of each model; while Redis is away nobody says anything."""
        try:
            return ModelStates(self.workers())
        except QueueUnavailableError:
            return ModelStates()

    def queues(self) -> frozenset[str]:
        """Queues that some live worker consumes."""
        return frozenset(queue for worker in self.workers() for queue in worker.queues)

    def epochs_lately(self) -> list[ProcessEpoch]:
        """As ``epochs``, at most a second old: however many ask, Redis is asked once a second.

        Raises:
            QueueUnavailableError: Redis does not answer.
        """
        with self._looking_at_epochs:
            if self._epochs_at is None or monotonic() - self._epochs_at > FRESH_S:
                self._epochs = self.epochs()
                self._epochs_at = monotonic()
            return self._epochs

    def epochs(self) -> list[ProcessEpoch]:
        """Which epoch each live process serves now, by kind and name.

        Raises:
            QueueUnavailableError: Redis does not answer.
        """
        workers = [
            ProcessEpoch(
                kind="worker",
                name=worker.node,
                machine_profile=worker.machine_profile,
                epoch=worker.epoch,
                epoch_id=worker.epoch_id,
            )
            for worker in self._client.workers()
        ]
        webs = [
            ProcessEpoch(
                kind="web",
                name=web.name,
                machine_profile=web.machine_profile,
                epoch=web.epoch,
                epoch_id=web.epoch_id,
            )
            for web in self._client.web_processes()
        ]
        return sorted([*workers, *webs], key=lambda one: (one.kind, one.name))


def present_of(served: Snapshot) -> Epoch:
    """The epoch that this process serves, as others tell theirs."""
    return Epoch(served.epoch, str(served.epoch_id))


def has_converged(processes: Sequence[ProcessEpoch], present: Epoch, wanted: int | None = None) -> bool:
    """Whether all of these serve an epoch or a later one (``config_db.convergence``).

    Args:
        processes: as ``Fleet.epochs`` gives them.
        present: the present epoch, as far as this process knows.
        wanted: the number of the epoch; the present one unless given.
    """
    least = present.number if wanted is None else wanted
    return all(has_reached(process.served, least, present) for process in processes)
