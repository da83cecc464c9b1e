"""What goes to the object store and comes from it: threads wait for the store, the event loop never does.

Owns the threads, and what they have done until the loop's next tick takes it. A call is over within seconds, or has
failed; what is under way when the worker dies is done again by whoever serves the message next.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, Final

from common.clock import FarmClock
from common.errors import FarmError, ObjectStoreError
from common.logs import get_logger
from tasks.objects import ObjectStore

log = get_logger("workers")

THREADS: Final = 4
SWEEP_EVERY_S: Final = 600.0

Told = Callable[[Any], None]
"""Called on the loop with what came of it: a value, or a FarmError."""


class Aside:
    """A worker's access to the object store; every method is the event loop's.

    Args:
        store: None: there is none, and asking for something that stands there fails.
        clock: the farm's clock.
    """

    def __init__(self, store: ObjectStore | None, clock: FarmClock) -> None:
        self._store = store
        self._clock = clock
        self._done: SimpleQueue[tuple[Told, Any]] = SimpleQueue()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="farm-aside")
        self._sweep_at = monotonic()

    @property
    def is_there(self) -> bool:
        """Whether there is an object store."""
        return self._store is not None

    def get(self, name: str, then: Told) -> None:
        """Fetch an object; None if there is none."""
        self._do(lambda store: store.get(name), then)

    def put(self, content: bytes, kept_s: float, then: Told) -> None:
        """Keep this for so long; ``then`` gets its name."""
        self._do(lambda store: store.put(content, wanted_until=self._clock.now() + kept_s), then)

    def delete(self, name: str) -> None:
        """Delete an object, sooner or later."""
        self._do(lambda store: store.delete(name), lambda _: None)

    def tick(self) -> None:
        """Tell what has been done since the last tick; now and then sweep up what nobody has come for."""
        while True:
            try:
                then, value = self._done.get_nowait()
            except Empty:
                break
            then(value)
        if self.is_there and monotonic() >= self._sweep_at:
            self._sweep_at = monotonic() + SWEEP_EVERY_S
            self._do(lambda store: store.sweep(self._clock.now()), _swept)

    def stop(self) -> None:
        """Begin nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _do(self, call: Callable[[ObjectStore], Any], then: Told) -> None:
        if self._store is None:
            missing = ObjectStoreError(
                "this worker has no object store, and the caller's has one: set the same for all"
            )
            self._done.put((then, missing))
            return
        self._threads.submit(self._call, call, self._store, then)

    def _call(self, call: Callable[[ObjectStore], Any], store: ObjectStore, then: Told) -> None:
        try:
            value = call(store)
        except FarmError as error:
            value = error
        except Exception as error:  # noqa: BLE001 - whatever boto3 raises besides: who waits must hear of it
            value = FarmError(f"the object store cannot be used: {error!r}")
        self._done.put((then, value))


def _swept(answer: Any) -> None:
    if isinstance(answer, FarmError):
        log.warning("objects_not_swept", error=answer.message)
    elif answer:
        log.info("objects_swept", objects=answer)
