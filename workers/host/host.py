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
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Condition, Lock, Thread
from typing import Any, Final, NoReturn

from common.errors import FarmError, RequestError
from common.logs import get_logger
from tasks.messages import Request, decode_body
from workers.host import devices, frames
from workers.host.batches import BatchRun
from workers.host.families.protocol import Model
from workers.host.frames import Answer, Batch, Done, Evict, HostSetup, Introduce, Load, ModelNews, Ready
from workers.host.loader import Loader
from workers.host.residency import Residency
from workers.host.stages import EXIT_DEVICE_LOST, Board, Slot, Stage

log = get_logger("host")

SWITCH_S: Final = 0.001
"""The reader must get the interpreter soon although the compute thread wants it all the time."""
_READ_BYTES: Final = 1 << 18


@dataclass(slots=True)
class _Job:
    """A micro-batch whose model is leased: to be computed. ``places`` says which parts ``run`` answers."""

    batch: Batch
    answers: list[Answer | None]
    places: list[int]
    run: BatchRun
    load_s: float


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
        budget = devices.measure_budget(self._device, setup)
        self._residency: Residency[Model] = Residency(budget, self._on_evicted)
        self._loader = Loader(setup, self._device, self._residency, self._tell)
        self._specs: dict[str, Introduce] = {}
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._absent: deque[Batch] = deque()
        self._hints: deque[str] = deque()
        self._to_load = Condition()

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
            case Load():
                self._to_loader(self._hints, message.spec)
            case Evict():
                self._residency.evict(message.spec)

    def _on_batch(self, batch: Batch) -> None:
        """Tokenise at once if the model is here; else it is the loader's turn."""
        model = self._residency.lease(batch.spec)
        if model is None:
            self._to_loader(self._absent, batch)
        else:
            self._prepare(batch, model, Slot.READER, load_s=0.0)

    def _to_loader(self, queue: deque[Any], what: Batch | str) -> None:
        with self._to_load:
            queue.append(what)
            self._to_load.notify()

    # -- the loader --------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        while True:
            with self._to_load:
                self._to_load.wait_for(lambda: self._absent or self._hints)
                batch = self._absent.popleft() if self._absent else None
                hint = self._hints.popleft() if batch is None else ""
            if batch is not None:
                self._load_for(batch)
            else:
                known = self._specs[hint]
                with self._board.noted(Slot.LOADER, Stage.LOAD, spec_number=known.number):
                    self._loader.preload(hint, known.spec)

    def _load_for(self, batch: Batch) -> None:
        known = self._specs[batch.spec]
        try:
            with self._board.noted(Slot.LOADER, Stage.LOAD, batch=batch.id, spec_number=known.number):
                model, load_s = self._loader.lease(batch.spec, known.spec)
        except FarmError as error:
            refused = Answer(None, 0, error.as_dict())
            self._outbox.send(Done(batch.id, [refused] * len(batch.parts), 0.0, 0.0, 0.0, 0.0, 0))
            return
        self._prepare(batch, model, Slot.LOADER, load_s=load_s)

    # -- reader or loader --------------------------------------------------------------------------------------------

    def _prepare(self, batch: Batch, model: Model, slot: Slot, *, load_s: float) -> None:
        """Decode and tokenise, then queue for computing. Damaged bodies are answered alone."""
        requests: list[Request] = []
        places: list[int] = []
        answers: list[Answer | None] = [None] * len(batch.parts)
        with self._noted(slot, batch)(Stage.PREPARE):
            for place, body in enumerate(batch.parts):
                try:
                    requests.append(self._decode(batch, body))
                    places.append(place)
                except FarmError as error:
                    answers[place] = Answer(None, 0, error.as_dict())
        run = BatchRun(model, batch.operation, requests, self._noted(slot, batch), self._make_room)
        if requests:
            run.prepare()
        run.note = self._noted(Slot.COMPUTE, batch)
        self._jobs.put(_Job(batch, answers, places, run, load_s))

    def _decode(self, batch: Batch, body: bytes) -> Request:
        model, request = decode_body(body)
        if batch.adapter is not None:
            raise RequestError(f"{model} has no adapter {batch.adapter!r}", param="params.options.lora")
        return request

    # -- the compute thread ------------------------------------------------------------------------------------------

    def _compute(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                done = self._run(job)
            finally:
                self._residency.release(job.batch.spec)
            self._outbox.send(done)

    def _run(self, job: _Job) -> Done:
        if job.places:
            for place, answer in zip(job.places, self._answers(job), strict=True):
                job.answers[place] = answer
        answers = [answer for answer in job.answers if answer is not None]
        assert len(answers) == len(job.batch.parts)  # every part was decoded and run, or refused
        times, tokens = job.run.times, sum(answer.tokens for answer in answers)
        return Done(
            job.batch.id,
            answers,
            tokenization_ms=times.tokenization_ms,
            inference_ms=times.inference_ms,
            postprocessing_ms=times.postprocessing_ms,
            load_s=job.load_s,
            tokens=tokens,
        )

    def _answers(self, job: _Job) -> list[Answer]:
        """The run's answers; where the device is lost, the process ends with its note still on the board."""
        try:
            return job.run.answers()
        except Exception as error:  # noqa: BLE001 - see _end
            with self._noted(Slot.COMPUTE, job.batch)(Stage.COMPUTE):
                _end(error)

    def _make_room(self) -> None:
        devices.clear_caches()
        freed = self._residency.evict_idle()
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

    def _on_evicted(self, digest: str, size: int, reason: str) -> None:
        self._tell(digest, "evicted", {"bytes": size, "reason": reason})

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


class Outbox:
    """Sends frames from any thread, in order; what the socket does not take at once is left to a thread of its own.

    So the compute thread goes on with the next micro-batch while the worker is busy elsewhere.
    """

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._lock = Lock()
        self._left: SimpleQueue[memoryview] = SimpleQueue()
        self._queued = 0
        self._has_sender = False

    def send(self, message: frames.FromHost) -> None:
        """Send now what can be sent; ConnectionError when the worker has gone."""
        data = memoryview(frames.frame(message))
        with self._lock:
            if not self._queued:
                data = data[self._send_some(data) :]
            if not len(data):
                return
            self._queued += 1
            self._left.put(data)
            if not self._has_sender:
                self._has_sender = True
                Thread(target=self._send_left, name="sender", daemon=True).start()

    def _send_some(self, data: memoryview) -> int:
        try:
            return self._link.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0

    def _send_left(self) -> None:
        try:
            while True:
                self._link.sendall(self._left.get(), socket.MSG_NOSIGNAL)
                with self._lock:
                    self._queued -= 1
        except OSError:
            os._exit(0)
