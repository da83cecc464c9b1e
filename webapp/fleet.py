"""The live workers as the web tier sees them: read from Redis when asked for, remembered for a second.

No request for a model waits for this: only readiness, model states and pools other than the default one do.
"""

from collections.abc import Sequence
from time import monotonic
from typing import Final

from common.errors import QueueUnavailableError
from tasks.client import FarmClient, WorkerView

FRESH_S: Final = 1.0


class Fleet:
    """Remembers the last look at the live workers."""

    def __init__(self, client: FarmClient) -> None:
        self._client = client
        self._workers: Sequence[WorkerView] = ()
        self._looked_at: float | None = None

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
