"""One host: a process that serves micro-batches of many models on one device.

Three threads. The *reader* takes frames and tokenises for models that are resident; the *loader* loads absent models
and tokenises what waited for them; the *compute* thread, which is the main one, runs and answers. So one micro-batch is
computed while the next is tokenised, and a load holds up only the micro-batches that wait for it.

Ends by ``os._exit`` when the link is closed (the worker has gone, or wants it gone) or the device is lost.
"""

import os
import socket
import sys
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from queue import SimpleQueue
from threading import Condition, Thread
from time import monotonic
from types import MappingProxyType
from typing import Any, Final, NoReturn

from common.errors import FarmError
from common.logs import get_logger
from config_db.spec import ModelSpec
from tasks.keep_alive import keep_alive_s
from tasks.messages import Request
from workers.host import devices, frames
from workers.host.adapters import Adapters, adapter_error
from workers.host.batches import BatchRun
from workers.host.families.protocol import Model, Packable
from workers.host.frames import (
    Answer,
    Batch,
    Done,
    Evict,
    Fetch,
    Fetched,
    Grown,
    HostSetup,
    Introduce,
    Load,
    ModelNews,
    Ready,
)
from workers.host.jobs import Job, Progress, adapter_of, adapters_of, decoded, groups, sources_of
from workers.host.loader import Loader, terms
from workers.host.outbox import Outbox
from workers.host.residency import Eviction, Residency
from workers.host.stages import EXIT_DEVICE_LOST, Board, Slot, Stage

log = get_logger("host")

SWITCH_S: Final = 0.001
"""The reader must get the interpreter soon although the compute thread wants it all the time."""
FETCHES_AT_ONCE: Final = 4
"""Models and adapters that come from the Hub or a bucket at the same time."""
BATCHES_UNTIL_PACKED: Final = 16
"""Micro-batches after which a model has shown that it stays; packing costs about as much as one of them."""
_READ_BYTES: Final = 1 << 18
TRIM_FOR_S: Final = 10.0
"""So long after a load or an eviction, freed memory is given back: copies of weights are written meanwhile."""
LOOK_S: Final = 0.5
"""So often the loader looks for what has been idle for too long, and at what the process holds."""


class Host:
    """Serves one link until it closes.

    Args:
        link: the stream to the worker.
        board: where the threads note what they do.
        device: torch's name of the device.
    """

    def __init__(self, setup: HostSetup, link: socket.socket, board: Board, device: str) -> None:
        devices.set_threads(setup.torch_threads)
        self._device = devices.open_device(device, setup)
        self._board = board
        self._link = link
        self._outbox = Outbox(link)
        self._setup = setup
        self._born_bytes = devices.held_bytes(self._device)
        self._has_told_of_growth = False
        self._churned_at = self._looked_at = float("-inf")
        budget = devices.measure_budget(self._device, setup)
        self._residency: Residency[Model] = Residency(budget, self._on_evicted)
        self._loader = Loader(setup, self._device, self._residency, self._tell)
        self._specs: dict[str, Introduce] = {}
        self._adapters = Adapters(self._residency, self._loader.find, self._tell)
        self._fetchers = ThreadPoolExecutor(FETCHES_AT_ONCE, "fetcher")
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._served: dict[str, int] = {}
        self._absent: deque[Batch] = deque()
        self._hints: deque[Load] = deque()
        self._to_load = Condition()
        self._coming: dict[str, list[tuple[deque[Any], Batch | Load]]] = {}

    def serve(self) -> None:
        """Announce readiness and serve for ever."""
        sys.setswitchinterval(SWITCH_S)
        Thread(target=self._fatal(self._read), name="reader", daemon=True).start()
        Thread(target=self._fatal(self._load), name="loader", daemon=True).start()
        self._outbox.send(Ready(os.getpid(), self._device.name, self._residency.budget_bytes))
        self._fatal(self._compute)()

    # -- the reader --------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        unframer = frames.Unframer()
        while data := self._link.recv(_READ_BYTES):
            for body in unframer.feed(data):
                self._on_frame(frames.to_host.decode(body))
        os._exit(0)

    def _on_frame(self, message: frames.ToHost) -> None:
        match message:
            case Batch():
                self._on_batch(message)
            case Introduce():
                self._specs[message.digest] = message
                self._residency.place(message.digest, terms(message.spec))
            case Load():
                self._to_loader(self._hints, message)
            case Evict():
                self._residency.evict(message.spec, message.reason)
            case Fetch():
                self._fetchers.submit(self._fatal(partial(self._fetch, message)))

    def _on_batch(self, batch: Batch) -> None:
        """Tokenise at once if the model is here, and the adapters; else it is the loader's turn."""
        model = self._residency.lease(batch.spec)
        if model is None:
            self._to_loader(self._absent, batch)
            return
        wanted = adapters_of(batch)
        if not wanted or self._adapters.lease(batch.spec, model, wanted):
            self._prepare(Progress(batch, 0.0), model, Slot.READER, range(len(batch.parts)), adapters=wanted)
        else:
            self._residency.release(batch.spec)
            self._to_loader(self._absent, batch)

    def _to_loader(self, queue: deque[Any], what: Batch | Load) -> None:
        with self._to_load:
            queue.append(what)
            self._to_load.notify()

    # -- the loader --------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        while True:
            with self._to_load:
                self._to_load.wait_for(lambda: self._absent or self._hints, LOOK_S)
                batch = self._absent.popleft() if self._absent else None
                hint = self._hints.popleft() if batch is None and self._hints else None
            if batch is not None and not self._is_coming(self._absent, batch):
                self._load_for(batch)
            elif hint is not None and not self._is_coming(self._hints, hint):
                self._load_on(hint)
            if batch is not None or hint is not None:
                self._churned_at = monotonic()
            self._look_round()

    def _look_round(self) -> None:
        """Every now and then, however busy the loader is: what has been idle leaves, what was freed is given back."""
        now = monotonic()
        if now - self._looked_at < LOOK_S:
            return
        self._looked_at = now
        self._residency.unload_idle()
        self._watch_growth()
        if now - self._churned_at < TRIM_FOR_S:
            devices.trim()

    def _is_coming(self, queue: deque[Any], wanted: Batch | Load) -> bool:
        """Whether its files are being fetched first: it stands in the queue again once they are here, or will not be.

        So a download of minutes keeps no other model from being loaded.
        """
        digest, spec = wanted.spec, self._specs[wanted.spec].spec
        with self._to_load:
            if digest in self._coming:
                self._coming[digest].append((queue, wanted))
                return True
        if not self._loader.must_fetch(digest, spec):
            return False
        self._coming[digest] = [(queue, wanted)]  # by this thread alone
        self._tell(digest, "loading", {})
        self._fetchers.submit(self._fatal(partial(self._bring, digest, spec)))
        return True

    def _bring(self, digest: str, spec: ModelSpec) -> None:
        self._loader.bring(digest, spec)
        with self._to_load:
            for queue, wanted in self._coming.pop(digest):
                queue.append(wanted)
            self._to_load.notify()

    def _load_on(self, hint: Load) -> None:
        known = self._specs[hint.spec]
        with self._board.noted(Slot.LOADER, Stage.LOAD, spec_number=known.number):
            self._loader.preload(hint.spec, known.spec)
        if not hint.warm_up:
            return
        model = self._residency.lease(hint.spec)
        if model is None:  # it failed, which was told, or had to leave again at once
            self._tell(hint.spec, "skipped", {})
            return
        run = BatchRun(model, known.spec.operations[0], [_warm_up_request(known.spec)], _unnoted, self._make_room)
        self._jobs.put(Job(Progress(Batch(0, hint.spec, run.operation, None, ()), 0.0), [((), run)]))

    def _watch_growth(self) -> None:
        """Say once that this process has grown beyond what it can explain: its worker replaces it."""
        if not self._setup.growth_bytes or self._has_told_of_growth:
            return
        explained, held = (
            self._born_bytes + self._loader.explained_bytes() + self._adapters.bytes,
            devices.held_bytes(self._device),
        )
        if held - explained <= self._setup.growth_bytes:
            return
        devices.clear_caches()
        held = devices.held_bytes(self._device)
        if held - explained > self._setup.growth_bytes:
            self._has_told_of_growth = True
            self._outbox.send(Grown(held, explained, self._setup.growth_bytes))

    def _load_for(self, batch: Batch) -> None:
        known = self._specs[batch.spec]
        try:
            with self._board.noted(Slot.LOADER, Stage.LOAD, batch=batch.id, spec_number=known.number):
                model, load_s = self._loader.lease(batch.spec, known.spec)
        except FarmError as error:
            refused = Answer(None, 0, error.as_dict())
            self._outbox.send(Done(batch.id, [refused] * len(batch.parts), 0.0, 0.0, 0.0, 0.0, 0))
            return
        progress = Progress(batch, load_s)
        if adapters_of(batch):
            self._load_adapters(progress, model)
        else:
            self._prepare(progress, model, Slot.LOADER, range(len(batch.parts)))

    def _load_adapters(self, progress: Progress, model: Model) -> None:
        """Have a leased model's adapters loaded; those that do not fit beside each other take turns."""
        batch, number = progress.batch, self._specs[progress.batch.spec].number
        places, wanted = list(range(len(batch.parts))), sources_of(batch)
        while places:
            with self._board.noted(Slot.LOADER, Stage.LOAD, batch=batch.id, spec_number=number):
                held, refused = self._adapters.load(batch.spec, model, wanted)
            wanted = {name: source for name, source in wanted.items() if name not in held and name not in refused}
            later = [place for place in places if adapter_of(batch, place) in wanted]
            now = [place for place in places if place not in later]
            if later:  # each turn ends a lease of its own
                self._residency.lease(batch.spec)
            self._prepare(progress, model, Slot.LOADER, now, adapters=held, refused=refused)
            places = later

    # -- reader or loader --------------------------------------------------------------------------------------------

    def _prepare(
        self,
        progress: Progress,
        model: Model,
        slot: Slot,
        places: Sequence[int],
        *,
        adapters: Collection[str] = (),
        refused: Mapping[str, FarmError] = MappingProxyType({}),
    ) -> None:
        """Decode and tokenise parts, then queue them for computing. Damaged bodies are answered alone."""
        batch, requests, answers, runs = progress.batch, {}, {}, []
        with self._noted(slot, batch)(Stage.PREPARE):
            for place in places:
                try:
                    if error := refused.get(adapter_of(batch, place) or ""):
                        raise error
                    requests[place] = decoded(batch, place)
                except FarmError as error:
                    answers[place] = Answer(None, 0, error.as_dict())
        for runner, those in groups(model, requests):
            asked = [requests[place] for place in those]
            note = self._noted(slot, batch)
            run = BatchRun(runner, batch.operation, asked, note, self._make_room, times=progress.times)
            run.prepare()
            run.note = self._noted(Slot.COMPUTE, batch)
            runs.append((those, run))
        self._jobs.put(Job(progress, runs, answers, adapters))

    # -- fetchers ----------------------------------------------------------------------------------------------------

    def _fetch(self, wanted: Fetch) -> None:
        """Bring an adapter's files onto this machine's disk and say so, while its requests wait in the worker."""
        try:
            self._loader.find(wanted.source).release()
        except Exception as error:  # noqa: BLE001 - whatever it is, the requests that wait are answered with it
            failed = adapter_error(wanted.source, error)
            self._outbox.send(Fetched(wanted.adapter, failed.as_dict()))
        else:
            self._outbox.send(Fetched(wanted.adapter))

    # -- the compute thread ------------------------------------------------------------------------------------------

    def _compute(self) -> None:
        while True:  # while it waits, nothing here names the last job, and so its model
            self._compute_one(self._jobs.get())

    def _compute_one(self, job: Job) -> None:
        batch = job.progress.batch
        if not batch.parts:
            self._warm_up(job)
            return
        try:
            self._run(job)
        finally:
            self._adapters.release(batch.spec, job.adapters)
            self._residency.release(batch.spec, [keep_alive_s(one.options) for one in job.requests] or (None,))
        if job.progress.is_answered:
            self._outbox.send(job.progress.done())
        self._settle_in(batch.spec)

    def _settle_in(self, digest: str) -> None:
        """Pack the weights of a model that stays, where memory is to spare: nobody else leaves for that."""
        served = self._served[digest] = self._served.get(digest, 0) + 1
        if served != BATCHES_UNTIL_PACKED:
            return
        model = self._residency.lease(digest)
        if model is None:
            return
        try:
            size = model.packed_bytes if isinstance(model, Packable) else 0
            if isinstance(model, Packable) and size and self._residency.take_spare(digest, model, size):
                is_packed = model.pack()
                if not is_packed:
                    self._residency.grow(digest, model, -size)
                log.info("model_settled_in", spec=digest, packed=is_packed, bytes=size)
        finally:
            self._residency.release(digest)

    def _warm_up(self, job: Job) -> None:
        """Run a model once before it is needed; what it answers, and whether it does, is nobody's concern."""
        spec = job.progress.batch.spec
        try:
            for _, run in job.runs:
                self._answers(job, run)
        finally:
            self._residency.release(spec)
        self._tell(spec, "warm", {})

    def _run(self, job: Job) -> None:
        job.progress.answers.update(job.refused)
        for places, run in job.runs:
            job.progress.answers.update(zip(places, self._answers(job, run), strict=True))

    def _answers(self, job: Job, run: BatchRun) -> list[Answer]:
        """The run's answers; where the device is lost, the process ends with its note still on the board."""
        try:
            return run.answers()
        except Exception as error:  # noqa: BLE001 - see _end
            with self._noted(Slot.COMPUTE, job.progress.batch)(Stage.COMPUTE):
                _end(error)

    def _make_room(self) -> None:
        freed = self._adapters.evict_idle() + self._residency.evict_idle()
        devices.clear_caches()
        log.warning("device_out_of_memory", freed_bytes=freed)

    # -- any thread --------------------------------------------------------------------------------------------------

    def _noted(self, slot: Slot, batch: Batch) -> Any:
        number = self._specs[batch.spec].number

        def note(stage: Stage) -> AbstractContextManager[None]:
            return self._board.noted(slot, stage, batch=batch.id, spec_number=number)

        return note

    def _tell(self, digest: str, event: Any, detail: dict[str, Any]) -> None:
        self._outbox.send(ModelNews(digest, event, detail))

    def _on_evicted(self, left: Eviction) -> None:
        self._adapters.forget(left.key)
        self._served.pop(left.key, None)
        self._churned_at = monotonic()
        self._tell(left.key, "evicted", left.details())

    def _fatal(self, work: Any) -> Any:
        """Whatever escapes a thread ends the process: half a host would leave callers waiting."""

        def run() -> None:
            try:
                work()
            except (ConnectionError, BrokenPipeError):
                os._exit(0)
            except BaseException as error:  # noqa: BLE001 - see _end
                _end(error)

        return run


def _end(error: BaseException) -> NoReturn:
    """End this process, saying why."""
    lost = devices.is_device_lost(error)
    log.error("host_failed", error=f"{type(error).__name__}: {error}", device_lost=lost, exc_info=error)
    os._exit(EXIT_DEVICE_LOST if lost else 1)


def _warm_up_request(spec: ModelSpec) -> Request:
    """What every model of an operation can be asked."""
    item = {"text": "A farm."}
    match spec.operations[0]:
        case "score":
            return Request(items=[item], query=item)
        case "extract":
            return Request(items=[item], labels=["place"])
        case _:
            return Request(items=[item])


def _unnoted(_: Stage) -> AbstractContextManager[None]:
    """Nobody waits for a warm-up."""
    return nullcontext()
