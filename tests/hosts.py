"""A pool of real hosts without a Celery worker: a real kombu event loop that the test drives, and the fake family."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import psutil
from kombu.asynchronous.hub import Hub

from config_db.spec import ModelSpec
from tasks import codec
from tasks.messages import Request, encode_body
from tasks.names import Operation
from tests.fakes.family import PLACE, fake_spec
from workers.hosts.config import HostConfig
from workers.hosts.pool import HostPool
from workers.hosts.protocol import BatchTiming, HostBatch, HostView, PartResult

LONG_S = 60.0


@dataclass
class Recorder:
    """What a worker is told, in order."""

    ready: list[int] = field(default_factory=list)
    done: dict[int, tuple[list[PartResult], BatchTiming]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    lost: list[tuple[int, list[int], list[int], str]] = field(default_factory=list)
    models: list[tuple[int, str, str, dict[str, Any]]] = field(default_factory=list)
    fetched: list[tuple[str, dict[str, Any] | None]] = field(default_factory=list)

    def on_host_ready(self, host: int) -> None:
        self.ready.append(host)

    def on_batch_done(self, host: int, batch: int, results: list[PartResult], timing: BatchTiming) -> None:
        assert host in self.ready
        assert batch not in self.done
        self.done[batch] = (results, timing)
        self.order.append(batch)

    def on_host_lost(self, host: int, suspects: list[int], innocent: list[int], reason: str) -> None:
        self.lost.append((host, suspects, innocent, reason))

    def on_model(self, host: int, spec_digest: str, event: str, detail: dict[str, Any]) -> None:
        self.models.append((host, spec_digest, event, detail))

    def on_fetched(self, adapter: str, error: dict[str, Any] | None) -> None:
        self.fetched.append((adapter, error))


@dataclass
class LivePool:
    """A pool on a loop of its own, driven by the test."""

    pool: HostPool
    events: Recorder
    hub: Any
    files: Path
    last_batch: int = 0

    def until(self, predicate: Callable[[], Any], what: str, timeout_s: float = 20.0) -> None:
        """Run the loop until the predicate holds."""
        deadline = monotonic() + timeout_s
        while not predicate():
            assert monotonic() < deadline, f"no {what}: {self.events}"
            self.hub.run_once()

    def ready(self, count: int = 1) -> list[HostView]:
        self.until(lambda: len(self.pool.hosts()) >= count, f"{count} hosts")
        return self.pool.hosts()

    def spec(self, name: str = "fake/one", **options: Any) -> ModelSpec:
        return fake_spec(name, path=self.files, **options)

    def send(
        self, host: int, spec: ModelSpec, *texts: str, hang_s: float = LONG_S, bodies: Sequence[bytes] = ()
    ) -> int:
        """One micro-batch with a part per text; returns its number."""
        self.last_batch += 1
        parts = bodies or tuple(encode_body(spec.id, Request(items=[{"text": text}])) for text in texts)
        self.pool.send(host, HostBatch(self.last_batch, spec, Operation.ENCODE, None, tuple(parts), hang_s))
        return self.last_batch

    def run(self, host: int, spec: ModelSpec, *texts: str) -> list[PartResult]:
        batch = self.send(host, spec, *texts)
        self.until(lambda: batch in self.events.done, "results")
        return self.events.done[batch][0]

    def process(self, host: int) -> psutil.Process:
        """The process of a host that has been ready."""
        ready = self.pool._hosts[host].ready
        assert ready is not None
        return psutil.Process(ready.pid)

    def computing(self, host: int, batch: int) -> None:
        """Run the loop until the host computes this micro-batch."""
        board = self.pool._hosts[host].board
        self.until(lambda: any(note.batch == batch and note.stage == 3 for note in board.doing()), "computing")


def vector(part: PartResult) -> Any:
    """The dense vector of a part's first item."""
    assert part.result is not None, part.error
    return codec.array_of(codec.unpack(part.result)[0]["dense"]["values"])


def code(part: PartResult) -> str | None:
    return None if part.error is None else part.error["code"]


@contextmanager
def starting_pools(directory: Path) -> Iterator[Callable[..., LivePool]]:
    """Starts pools; afterwards no process of theirs is left."""
    lives: list[LivePool] = []

    def started(*, preloads: Callable[[], Sequence[ModelSpec]] = tuple, **config: Any) -> LivePool:
        events, hub = Recorder(), Hub()
        hub.call_repeatedly(0.02, lambda: None)  # so that ``until`` looks again even if nothing is said
        settings = {"model_dirs": (str(directory),), "extra_families": {"fake": PLACE}, "device_memory": 10_000_000}
        pool = HostPool(HostConfig(**{**settings, **config}), events, preloads)
        lives.append(LivePool(pool, events, hub, directory))
        pool.start()
        pool.register(hub)
        return lives[-1]

    before = _zygotes_and_hosts()
    try:
        yield started
    finally:
        for live in lives:
            live.pool.stop(5.0)
            live.hub.close()
    assert _zygotes_and_hosts() <= before


def is_running(process: psutil.Process) -> bool:
    """Whether it is more than an entry that its new parent has not read yet."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _zygotes_and_hosts() -> set[int]:
    """Those of this process; its Postgres has children that come and go as they please."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "workers.host.main" in child.cmdline():
                found.add(child.pid)
    return found
