"""What the pool is given, what it tells, and what it shows: all that the rest of the worker knows of hosts."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from config_db.spec import ModelSpec
from tasks.names import Operation

KEPT_EVICTIONS: Final = 32


@dataclass(frozen=True, slots=True)
class HostBatch:
    """One micro-batch: parts are Celery bodies, ``adapters`` the digests of theirs; None if no part has one.

    It is cut when one of its stages lasts over ``hang_s``.
    """

    id: int
    spec: ModelSpec
    operation: Operation
    adapters: tuple[str | None, ...] | None
    parts: tuple[bytes, ...]
    hang_s: float


@dataclass(frozen=True, slots=True)
class PartResult:
    """One part's answer: a msgpack list of item results and its measured tokens, or an error."""

    result: bytes | None
    tokens: int
    error: dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class BatchTiming:
    """Where a micro-batch's time went, and how many tokens it held."""

    tokenization_ms: float
    inference_ms: float
    postprocessing_ms: float
    load_s: float
    tokens: int


@dataclass(slots=True)
class HostView:
    """What the worker knows of a host: a mirror, kept by the pool.

    ``resident`` maps spec digests to bytes, of which there may be ``budget_bytes``; ``device`` is torch's name;
    ``evictions`` are the last ones, each with its reason.
    """

    id: int
    outstanding: int = 0
    resident: dict[str, int] = field(default_factory=dict)
    loading: frozenset[str] = frozenset()
    device: str = ""
    budget_bytes: int = 0
    evictions: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT_EVICTIONS))


class HostEvents(Protocol):
    """Who is told. Called on the event loop's thread only."""

    def on_host_ready(self, host: int) -> None:
        """It can be given work."""

    def on_batch_done(self, host: int, batch: int, results: list[PartResult], timing: BatchTiming) -> None:
        """One result per part, in order."""

    def on_host_lost(self, host: int, suspects: list[int], innocent: list[int], reason: str) -> None:
        """It died; suspects are the micro-batches it was working on. A replacement is on its way."""

    def on_model(self, host: int, spec_digest: str, event: str, detail: dict[str, Any]) -> None:
        """Residency changed: ``loaded``, ``load_failed``, ``evicted``, or ``skipped`` for want of room.

        Of an adapter, with ``adapter_`` before it.
        """

    def on_fetched(self, adapter: str, error: dict[str, Any] | None) -> None:
        """The files of the adapter of this digest are on this machine's disk, or why they are not."""
