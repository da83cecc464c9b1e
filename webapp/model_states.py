"""What has become of each model, as the live workers tell it: available, loading, loaded or failed."""

from collections.abc import Sequence
from typing import Literal

from tasks.live_workers import LoadFailure, WorkerView

State = Literal["available", "loading", "loaded", "failed"]


class ModelStates:
    """The states of specs, by digest. A model that serves somewhere has not failed, whatever it does elsewhere."""

    def __init__(self, workers: Sequence[WorkerView] = ()) -> None:
        self._loaded = {digest for worker in workers for digest in worker.resident}
        self._loading = {digest for worker in workers for digest in worker.loading}
        self._failures = {digest: failure for worker in workers for digest, failure in worker.load_failures.items()}

    def state(self, digest: str) -> State:
        """Its state; ``available`` is one that no worker has tried to load, or that was unloaded."""
        if digest in self._loaded:
            return "loaded"
        if digest in self._loading:
            return "loading"
        return "failed" if digest in self._failures else "available"

    def last_error(self, digest: str) -> LoadFailure | None:
        """How its last load failed, also while the next one is under way; None once it is loaded."""
        return None if digest in self._loaded else self._failures.get(digest)
