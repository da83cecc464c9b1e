"""The live workers and web processes as this one sees them: read from Redis when asked for.

No request for a model waits for this: only readiness, model states, pools other than the default one, and the question
who serves which epoch do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from time import monotonic
from typing import Final, Literal

from common.errors import QueueUnavailableError
from config_db.convergence import Epoch, has_reached
from config_db.snapshot import Snapshot
from tasks.client import FarmClient
from tasks.live_workers import WorkerView

FRESH_S: Final = 1.0


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
    """Remembers the last look at the live workers, for a second."""

    def __init__(self, client: FarmClient) -> None:
        self._client = client
        self._workers: Sequence[WorkerView] = ()
        self._looked_at: float | None = None
        self._epochs: list[ProcessEpoch] = []
        self._epochs_at: float | None = None
        self._looking = Lock()

    def workers(self) -> Sequence[WorkerView]:
        """The live workers, at most a second old; QueueUnavailableError if Redis does not answer."""
        if self._looked_at is None or monotonic() - self._looked_at > FRESH_S:
            self._workers = self._client.workers()
            self._looked_at = monotonic()
        return self._workers

    def resident(self) -> frozenset[str]:
        """Digests of the specs that some host holds; none while Redis is away."""
        try:
            return frozenset(digest for worker in self.workers() for digest in worker.resident)
        except QueueUnavailableError:
            return frozenset()

    def queues(self) -> frozenset[str]:
        """Queues that some live worker consumes."""
        return frozenset(queue for worker in self.workers() for queue in worker.queues)

    def epochs_lately(self) -> list[ProcessEpoch]:
        """As ``epochs``, at most a second old: however many ask, Redis is asked once a second.

        Raises:
            QueueUnavailableError: Redis does not answer.
        """
        with self._looking:
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
