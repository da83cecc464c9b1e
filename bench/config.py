"""What the config DB costs those who read it, with 1000 models in it: polling, hearing of a change, looking up."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from time import monotonic, perf_counter, process_time, sleep
from typing import IO, Final
from uuid import uuid4

from sqlalchemy import update
from sqlalchemy.orm import Session

from bench.figures import Effort, Measured
from config_db.engine import open_engine
from config_db.epochs import lock_epoch, raise_epoch
from config_db.publish import Put, publish
from config_db.reader import SnapshotReader
from config_db.schema import ModelRow
from config_db.snapshot import Snapshot
from config_db.spec import ModelSpec, Profile, Source, plain
from tests.services import PostgresServer

ROOT: Final = Path(__file__).resolve().parent.parent
MODELS: Final = 1000
READERS: Final = 50
READER_PROCESSES: Final = 2
POLL_S: Final = 2.0
CHANGES: Final = 20
"""Epochs published in each round."""
POLLS_A_SECOND: Final = 200
LOOKS_A_SECOND: Final = 100_000


def epoch_poll_cpu_ms(effort: Effort) -> Measured:
    """CPU that a process uses for a poll that finds nothing new, in ms."""
    measured = Measured()
    with _config_db() as url:
        reader = SnapshotReader(url, poll_s=POLL_S, copy_path=None)
        before = process_time()
        reader.poll()
        measured.note(f"the first reading of {MODELS} models: {(process_time() - before) * 1e3:.0f} ms")
        polls = int(effort.seconds * POLLS_A_SECOND)
        for _ in range(effort.rounds):
            before = process_time()
            for _ in range(polls):
                reader.poll()
            measured.samples.append((process_time() - before) * 1e3 / polls)
        reader.stop()
    return measured


def delta_p99_ms(effort: Effort) -> Measured:
    """From the commit of a change of one model until 50 readers serve it, the slowest in a hundred, in ms."""
    pause_s = effort.seconds / CHANGES
    return _delta(effort, _publish, CHANGES, pause_s)


def delta_unheard_p99_ms(effort: Effort) -> Measured:
    """The same for a change that no NOTIFY tells of, so that the next poll finds it."""
    return _delta(effort, _write_unheard, int(effort.seconds / POLL_S) + 1, 0.0)


def _delta(effort: Effort, write: Callable[[Session, ModelSpec], int], changes: int, pause_s: float) -> Measured:
    measured = Measured()
    with _config_db() as url, _readers(url) as readers:
        engine = open_engine(url)
        for _ in range(effort.rounds):
            waits: list[float] = []
            for number in range(changes):
                with Session(engine) as session:
                    epoch = write(session, _model(number, changed=uuid4().hex))
                    committing_at = monotonic()
                    session.commit()
                waits += [(heard_at - committing_at) * 1e3 for heard_at in readers(epoch)]
                sleep(pause_s)
            measured.samples.append(quantiles(waits, n=100)[98])
        measured.note(f"last round: median {median(waits):.0f} ms, slowest {max(waits):.0f} ms")
        engine.dispose()
    return measured


def _write_unheard(session: Session, model: ModelSpec) -> int:
    epoch = raise_epoch(session, lock_epoch(session), actor="bench", reason="bench")
    session.execute(update(ModelRow).where(ModelRow.id == model.id).values(spec=plain(model), epoch=epoch))
    return epoch


def resolve_us(effort: Effort) -> Measured:
    """Finding a model by its id, an alias or with a profile, in microseconds."""
    measured = Measured()
    models = {spec.id: spec for spec in map(_model, range(MODELS))}
    snapshot = Snapshot(1, uuid4(), models)
    snapshot.prepare()
    names = [name for spec in models.values() for name in (spec.id, *spec.aliases, f"{spec.id}:short")]
    kinds = {"alias and profile": [f"{spec.aliases[0]}:short" for spec in models.values()]}
    looks = int(effort.seconds * LOOKS_A_SECOND / len(names)) + 1
    for _ in range(effort.rounds):
        measured.samples.append(_look_up(snapshot, names, looks))
    for kind, asked in kinds.items():
        measured.note(f"{kind}: {_look_up(snapshot, asked, looks):.2f} us")
    return measured


def _look_up(snapshot: Snapshot, names: Sequence[str], times: int) -> float:
    """Microseconds for one look."""
    began = perf_counter()
    for _ in range(times):
        for name in names:
            snapshot.model(name)
    return (perf_counter() - began) * 1e6 / (times * len(names))


@contextmanager
def _config_db() -> Iterator[str]:
    """The URL of a config DB with all the models."""
    postgres = PostgresServer(f"max_connections={3 * READERS}")  # each holds two
    try:
        url = postgres.fresh_database()
        engine = open_engine(url)
        with Session(engine) as session, session.begin():
            _publish(session, *(_model(number) for number in range(MODELS)))
        engine.dispose()
        yield url
    finally:
        postgres.remove()


@contextmanager
def _readers(url: str) -> Iterator[Callable[[int], list[float]]]:
    """Readers in processes of their own; what comes waits for all to have an epoch and tells when each had it."""
    command = [sys.executable, "-m", "bench.config_readers", url, str(READERS // READER_PROCESSES)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.PIPE)
        for _ in range(READER_PROCESSES)
    ]
    outputs = [process.stdout for process in processes if process.stdout is not None]

    def heard(epoch: int) -> list[float]:
        return [instant for output in outputs for instant in _instants(output, epoch)]

    try:
        for output in outputs:
            output.readline()  # all of its readers listen
        yield heard
    finally:
        for process in processes:
            process.communicate()  # the end of its input ends it


def _instants(output: IO[bytes], epoch: int) -> Iterator[float]:
    for _ in range(READERS // READER_PROCESSES):
        number, instant = output.readline().split()
        if int(number) != epoch:
            raise RuntimeError(f"a reader tells of epoch {int(number)} instead of {epoch}")
        yield float(instant)


def _model(number: int, **options: str) -> ModelSpec:
    return ModelSpec(
        id=f"bench/model-{number:04}",
        family="dense",
        source=Source(hub=f"bench/model-{number:04}", revision="0" * 40),
        aliases=(f"model-{number:04}",),
        dims={"dense": 384},
        max_length=512,
        profiles={"short": Profile(max_length=128)},
        options=options,
    )


def _publish(session: Session, *models: ModelSpec) -> int:
    puts = [Put("model", spec.id, plain(spec)) for spec in models]
    return publish(session, puts, actor="bench", reason="bench").epoch
