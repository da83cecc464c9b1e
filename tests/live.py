"""A live farm without its web tier: real Redis, real Postgres, real Celery workers with fake models.

The test plays the web process: it publishes with the real script, and its reply list is read by nobody, so that
outcomes can be counted per task id as they stand written in Redis.
"""

import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import redis
from sqlalchemy.orm import Session

from common.clock import FarmClock
from common.errors import FarmError
from config_db.catalog import apply_models
from config_db.engine import open_engine
from config_db.spec import ModelSpec, Source
from tasks import messages, names, scripts
from tasks.batching import batch_key
from tasks.messages import Outcome, Request, Ticket
from tasks.names import Lane, Operation, queue_name
from tasks.publisher import Entry, publish_call
from tests.services import spawn, wait_until
from workers.farm import KOMBU_KEYS

POOL, PROFILE = "default", "cpu"
FAKE = "fake/a"


def fake_spec(model: str = FAKE, *, directory: Path | str = "/", **options: Any) -> ModelSpec:
    """A model of the fake family; ``options`` as ``tests.fakes.family`` takes them."""
    return ModelSpec(
        id=model, family="fake", source=Source(path=str(directory)), dims={"dense": 4}, options={"dim": 4, **options}
    )


def raise_error(error: FarmError) -> None:
    raise error


@dataclass
class LiveWorker:
    """One real worker process."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    farm: "LiveFarm"

    @property
    def incarnation(self) -> str:
        """The incarnation this process lives under now; fails if it has told of none."""
        found = self.farm.incarnations()
        return next(key for key, told in found.items() if told["pid"] == self.process.pid and told["alive"])

    def is_ready(self) -> bool:
        """Whether it would serve a request."""
        if self.process.poll() is not None:
            raise AssertionError(f"worker {self.name} died at start:\n{self.tail()}")
        found = self.farm.incarnations().values()
        return any(told["pid"] == self.process.pid and told["alive"] and told["ready"] for told in found)

    def held(self) -> int:
        """Unacknowledged messages of this worker; on kombu's own transport, of all workers."""
        records = KOMBU_KEYS[0] if self.farm.transport == "redis" else names.unacked(self.incarnation)
        return int(self.farm.redis.hlen(records))

    def started(self) -> int:
        """Messages it has started to run and not settled."""
        return int(self.farm.redis.hlen(names.started(self.incarnation)))

    def family(self) -> list[psutil.Process]:
        """Its zygote and hosts."""
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def host_pids(self) -> list[int]:
        """The hosts: children of its zygote."""
        return [child.pid for child in self.family() if child.ppid() != self.process.pid]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the worker process alone."""
        self.process.send_signal(number)

    def stop(self, timeout_s: float = 15) -> int:
        """Warm shutdown; returns the exit status."""
        self.signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def tail(self, lines: int = 60) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


@dataclass
class LiveFarm:
    """Workers on one Redis and one Postgres, and the requests a test has sent them."""

    redis_url: str
    database_url: str
    directory: Path
    transport: str = "farm"
    workers: list[LiveWorker] = field(default_factory=list)
    reply_to: str = field(default_factory=lambda: names.reply_list(f"test-{uuid4().hex}"))
    sent: set[str] = field(default_factory=set)
    """Every synchronous request made: each is to have one outcome in the reply list."""
    specs: dict[str, ModelSpec] = field(default_factory=dict)
    epoch: int = 0

    def __post_init__(self) -> None:
        self.redis: Any = redis.Redis.from_url(self.redis_url, socket_timeout=10)
        self.clock = FarmClock()

    def add_models(self, *specs: ModelSpec) -> None:
        """Publish models as a new epoch."""
        self._publish_models(specs, prune=False)

    def replace_models(self, *specs: ModelSpec) -> None:
        """Publish a new epoch with these models only."""
        self._publish_models(specs, prune=True)

    def _publish_models(self, specs: Sequence[ModelSpec], *, prune: bool) -> None:
        engine = open_engine(self.database_url)
        with Session(engine) as session, session.begin():
            self.epoch = apply_models(session, list(specs), actor="test", reason="test", prune=prune)
        engine.dispose()
        self.specs |= {spec.id: spec for spec in specs}

    def start_worker(self, *, ready: bool = True, queues: Sequence[str] = (), **settings: Any) -> LiveWorker:
        """Start a worker; ``settings`` are ``FARMHAND_`` variables in lower case."""
        name = f"w{len(self.workers) + 1}-{uuid4().hex[:6]}"
        log = self.directory / f"{name}.log"
        environment = os.environ | {
            "FARMHAND_REDIS_URL": self.redis_url,
            "FARMHAND_DATABASE_URL": self.database_url,
            "FARMHAND_TRANSPORT": self.transport,
            "FARMHAND_STATE_DIR": str(self.directory / name),
            "FARMHAND_EXTRA_FAMILIES": "fake=tests.fakes.family:FakeFamily",
            "FARMHAND_PRELOAD_FAMILIES": "",
            "FARMHAND_MODEL_DIRS": "/",
            "FARMHAND_HOSTS": "1",
            "FARMHAND_CONFIG_POLL_S": "0.2",
            "PYTHONUNBUFFERED": "1",
        }
        environment |= {f"FARMHAND_{key.upper()}": str(value) for key, value in settings.items()}
        command = [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "-n", f"{name}@%h"]
        if queues:
            command += ["-Q", ",".join(queues)]
        worker = LiveWorker(name, spawn(command, log, environment), log, self)
        self.workers.append(worker)
        if ready:
            wait_until(worker.is_ready, 30, f"worker {name} to be ready")
        return worker

    def incarnations(self) -> dict[str, dict[str, Any]]:
        """What workers have told of themselves, and whether their heartbeat stands."""
        told: dict[bytes, bytes] = self.redis.hgetall(names.INCARNATIONS)
        return {
            key.decode(): {**json.loads(text), "alive": bool(self.redis.exists(names.beat(key.decode())))}
            for key, text in told.items()
        }

    def message(
        self,
        texts: Sequence[str],
        *,
        model: str = FAKE,
        lane: Lane = Lane.INTERACTIVE,
        timeout_s: float = 60.0,
        asynchronous: bool = False,
        tenant: str = "default",
        operation: Operation = Operation.ENCODE,
        request: Request | None = None,
        pool: str = POOL,
    ) -> tuple[str, Ticket, bytes]:
        """One encoded request: task id, ticket and raw message; ``request`` where it is more than texts."""
        task_id, spec, now = str(uuid4()), self.specs[model], self.clock.now()
        request = request or Request(items=[{"text": text} for text in texts])
        ticket = Ticket(
            model=model,
            spec=spec.digest,
            operation=operation,
            key=batch_key(model, spec.digest, operation, None, {}),
            items=len(request.items),
            tokens=max(1, sum(map(len, texts)) // 4),
            deadline=now + timeout_s,
            published=now,
            epoch=self.epoch,
            tenant=tenant,
            asynchronous=asynchronous,
        )
        body = messages.encode_body(model, request)
        queue = queue_name(pool, PROFILE, lane)
        raw = messages.encode_message(
            task_id, ticket, body, queue=queue, reply_to=None if asynchronous else self.reply_to, origin="test"
        )
        if not asynchronous:
            self.sent.add(task_id)
        return task_id, ticket, raw

    def send(self, *texts: str, lane: Lane = Lane.INTERACTIVE, pool: str = POOL, **rest: Any) -> str:
        """Admit and publish one request; returns its task id."""
        task_id, ticket, raw = self.message(texts or ("hello",), lane=lane, pool=pool, **rest)
        self._publish([(task_id, ticket, raw, queue_name(pool, PROFILE, lane))])
        return task_id

    def send_many(self, texts: Iterable[str], *, lane: Lane = Lane.INTERACTIVE, **rest: Any) -> list[str]:
        """One request of one text each, published together."""
        queue = queue_name(POOL, PROFILE, lane)
        made = [(*self.message([text], lane=lane, **rest), queue) for text in texts]
        for at in range(0, len(made), 500):
            self._publish(made[at : at + 500])
        return [task_id for task_id, *_ in made]

    def _publish(self, made: Sequence[tuple[str, Ticket, bytes, str]]) -> None:
        entries = [
            Entry(
                task_id,
                queue,
                raw,
                ticket.deadline,
                on_failure=raise_error,
                record_s=3600 if ticket.asynchronous else None,
                model=ticket.model,
                operation=ticket.operation,
                tenant=ticket.tenant,
            )
            for task_id, ticket, raw, queue in made
        ]
        keys, arguments = publish_call(entries, queue_limit=1_000_000)
        answers: Any = self.redis.eval(scripts.source("publish"), len(keys), *keys, *arguments)
        assert set(answers) == {b"ok"}

    def waiting(self, lane: Lane = Lane.INTERACTIVE) -> int:
        """Messages in a queue."""
        return int(self.redis.llen(queue_name(POOL, PROFILE, lane)))

    def outcomes(self) -> dict[str, list[Outcome]]:
        """Every synchronous outcome as written in Redis, by task id."""
        found: dict[str, list[Outcome]] = defaultdict(list)
        for raw in self.redis.lrange(self.reply_to, 0, -1):
            outcome = messages.decode_outcome(raw)
            found[outcome.task_id].append(outcome)
        return found

    def wait_outcomes(self, task_ids: Sequence[str], timeout_s: float = 30) -> list[Outcome]:
        """Wait for one outcome of each, and prove that there is exactly one."""
        wanted = set(task_ids)

        def all_there() -> bool:
            self.redis.expire(self.reply_to, 300)
            return int(self.redis.llen(self.reply_to)) >= len(wanted) and wanted <= set(self.outcomes())

        wait_until(all_there, timeout_s, f"{len(wanted)} outcomes; missing some in {self.reply_to}")
        found = self._exactly_one_each(wanted)
        return [found[task_id] for task_id in task_ids]

    def assert_settled(self, *unanswered: str) -> None:
        """Nothing is open, unacknowledged or queued any more, and every request has one outcome, these have none."""
        wait_until(lambda: not self.redis.exists(names.OPEN), 10, "no open task")
        wait_until(lambda: not any(map(self.waiting, Lane)), 10, "no queued message")
        for incarnation in self.incarnations():
            wait_until(partial(self._holds_nothing, incarnation), 10, "no unacknowledged message")
        self._exactly_one_each(self.sent.difference(unanswered))
        assert self.outcomes().keys().isdisjoint(unanswered)

    def _exactly_one_each(self, wanted: Iterable[str]) -> dict[str, Outcome]:
        found = self.outcomes()
        wrong = {task_id: len(found[task_id]) for task_id in wanted if len(found[task_id]) != 1}
        assert not wrong, f"not exactly one outcome: {wrong}"
        return {task_id: outcomes[0] for task_id, outcomes in found.items()}

    def _holds_nothing(self, incarnation: str) -> bool:
        return not self.redis.hlen(names.unacked(incarnation)) and not self.redis.hlen(KOMBU_KEYS[0])

    def close(self) -> None:
        """End every worker and prove that none of its processes is left."""
        left = [process for worker in self.workers for process in worker.family()]
        for worker in self.workers:
            with suppress(ProcessLookupError):
                worker.signal(signal.SIGCONT)
            worker.process.kill()
            worker.process.wait(10)
        _, alive = psutil.wait_procs(left, timeout=10)
        self.redis.close()
        assert not alive, f"processes outlived their worker: {alive}"
