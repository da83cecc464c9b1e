"""What the pool is given, what it tells, and what it shows: all that the rest of the worker knows of hosts."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from config_db.spec import ModelSpec
from tasks.names import Operation


@dataclass(frozen=True, slots=True)
class HostBatch:
    """One micro-batch: parts are Celery bodies. It is cut when one of its stages lasts over ``hang_s``."""

    id: int
    spec: ModelSpec
    operation: Operation
    adapter: str | None
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
    """What the worker knows of a host: a mirror, kept by the pool. ``resident`` maps spec digests to bytes."""

    id: int
    outstanding: int = 0
    resident: dict[str, int] = field(default_factory=dict)
    loading: frozenset[str] = frozenset()


class HostEvents(Protocol):
    """Who is told. Called on the event loop's thread only."""

    def on_host_ready(self, host: int) -> None:
        """It can be given work."""

    def on_batch_done(self, host: int, batch: int, results: list[PartResult], timing: BatchTiming) -> None:
        """One result per part, in order."""

    def on_host_lost(self, host: int, suspects: list[int], innocent: list[int], reason: str) -> None:
        """It died; suspects are the micro-batches it was working on. A replacement is on its way."""

    def on_model(self, host: int, spec_digest: str, event: str, detail: dict[str, Any]) -> None:
        """Residency changed: ``loaded``, ``load_failed`` or ``evicted``."""
