"""The worker's side of its model processes: starts them, speaks to them from the event loop, and replaces the dead.

Owns the zygote, the hosts and what was sent to each and not yet answered. Knows nothing of requests: it is given
micro-batches and gives results, or says which micro-batches a dying host was working on (suspects) and which it merely
held (innocent). No torch here: the other side is ``workers.host``.

States of a host: asked for -> ready -> lost, and then another one, under a new number, takes its place. The event
loop's thread owns everything; the watchdog's thread kills hosts that hang, also while the loop is blocked.
"""

import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from typing import Any, Final, Protocol

from common.errors import FarmError, ModelLoadError
from common.logs import get_logger
from common.settings import WorkerSettings
from config_db.spec import ModelSpec
from tasks.names import Operation
from workers.host import frames, stages
from workers.host.families.registry import BUILT_IN, parse_extra
from workers.host.frames import (
    Batch,
    Done,
    Evict,
    Exited,
    Fork,
    HostSetup,
    Imported,
    Introduce,
    Kill,
    Load,
    ModelNews,
    Ready,
)
from workers.host.stages import EXIT_DEVICE_LOST, Board, Stage

log = get_logger("workers")

LOAD_LIMIT_S: Final = 600.0
"""A load that takes longer is a hang."""
START_LIMIT_S: Final = 300.0
"""So long a host may take until it is ready, the zygote's imports from a cold disk included."""
LOAD_HANG: Final = "hang of a load"
WATCH_S: Final = 0.05
FROZEN_S: Final = 1.0
"""A watchdog that wakes up so much too late was frozen with its process, and perhaps the hosts were, too."""
STATUS_WAIT_S: Final = 0.5
"""How long to wait for the zygote to say how a host died."""
LOAD_DEATHS_UNTIL_REFUSED: Final = 2
REFUSE_S: Final = 60.0
"""A model whose load has killed that many hosts is refused for so long."""
BACK_OFF_S: Final = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Before the next try, by how often in a row a host, or the zygote, died before it was of use."""
CPU_PASS_TOKENS: Final = 2048
GPU_PASS_TOKENS: Final = 16384
_READ_BYTES: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class HostConfig:
    """How many hosts there are, where they run and what they may use.

    ``devices`` are torch's names; hosts are dealt out to them in turn. ``device_memory`` is for all hosts of a device
    together; None: ``device_fraction`` of what is measured. ``preimport`` names modules imported before the first fork.
    """

    hosts: int = 1
    devices: tuple[str, ...] = ("cpu",)
    device_memory: int | None = None
    device_fraction: float = 0.85
    model_dirs: tuple[str, ...] = ()
    extra_families: Mapping[str, str] = field(default_factory=dict)
    preimport: tuple[str, ...] = ()
    hub_cache: str | None = None
    batch_max_tokens: int = CPU_PASS_TOKENS
    torch_threads: int = 1
    log_level: str = "INFO"

    def setup(self) -> HostSetup:
        """What the zygote is told."""
        return HostSetup(
            preimport=self.preimport,
            extra_families=dict(self.extra_families),
            model_dirs=self.model_dirs,
            hub_cache=self.hub_cache,
            pass_tokens=self.batch_max_tokens,
            torch_threads=self.torch_threads,
            budget_bytes=self.device_memory or 0,
            device_fraction=self.device_fraction,
            hosts_per_device=-(-self.hosts // len(self.devices)),
            log_level=self.log_level,
        )


def host_config(settings: WorkerSettings) -> HostConfig:
    """The hosts that the settings ask for: one per GPU or, without one, per usable core, unless a number is set."""
    devices = _devices(settings)
    on_cpu = devices == ("cpu",)
    places = {**BUILT_IN, **parse_extra(settings.extra_families)}
    preload = [name.strip() for name in settings.preload_families.split(",") if name.strip()]
    return HostConfig(
        hosts=settings.hosts or (usable_cores() if on_cpu else len(devices)),
        devices=devices,
        device_memory=int(settings.device_memory) if settings.device_memory is not None else None,
        device_fraction=settings.device_fraction,
        model_dirs=tuple(root for root in settings.model_dirs.split(":") if root),
        extra_families=parse_extra(settings.extra_families),
        preimport=tuple(places[name].partition(":")[0] for name in preload if name in places),
        hub_cache=str(settings.hub_cache) if settings.hub_cache else None,
        batch_max_tokens=settings.batch_max_tokens or (CPU_PASS_TOKENS if on_cpu else GPU_PASS_TOKENS),
        torch_threads=settings.torch_threads,
        log_level=settings.log_level,
    )


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
    device: str
    budget_bytes: int = 0
    pid: int = 0
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


@dataclass(frozen=True, slots=True)
class Sent:
    """What the watchdog knows of a micro-batch at a host."""

    hang_s: float


class _Host:
    """One host as the pool holds it: its link, its board, and what it owes."""

    def __init__(self, number: int, device: str, link: socket.socket, board: Board) -> None:
        self.view = HostView(number, device)
        self.link = link
        self.board = board
        self.unframer = frames.Unframer()
        self.unsent: deque[memoryview] = deque()
        self.write_fd: int | None = None
        self.outstanding: dict[int, Sent] = {}
        self.spec_numbers: dict[str, int] = {}
        self.asked_at = monotonic()
        self.is_ready = False
        self.is_closed = False
        self.status: int | None = None
        self.killed_for: str | None = None

    def spec_of(self, number: int) -> str:
        """The digest of the spec that the board names by this number."""
        return next((digest for digest, known in self.spec_numbers.items() if known == number), "")


class HostPool:
    """The model processes of one worker."""

    def __init__(self, config: HostConfig, events: HostEvents) -> None:
        self._config = config
        self._events = events
        self._hub: Any = None
        self._zygote: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._zygote_started = 0.0
        self._zygote_deaths = 0
        self._hosts: dict[int, _Host] = {}
        self._next_host = 1
        self._early_deaths = 0
        self._load_deaths: dict[str, tuple[int, float, str]] = {}
        self._stopping = False
        self._watchdog = _Watchdog(self._watch)

    # -- what the worker asks ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring the zygote up and ask it for hosts; they say when they are ready.

        The zygote dies with the thread that calls this: the worker's main one, which the event loop runs in, too.
        """
        self._start_zygote()
        self._watchdog.start()

    def register(self, hub: Any) -> None:
        """Read on this hub from now on; called again after every ``hub.reset()``."""
        self._hub = hub
        self._listen_control()
        for host in self._hosts.values():
            self._listen(host)
            self._close_write_fd(host)
            self._flush(host)

    def hosts(self) -> list[HostView]:
        """Those that are ready."""
        return [host.view for host in self._hosts.values() if host.is_ready and not host.is_closed]

    def send(self, host: int, batch: HostBatch) -> None:
        """Give a host a micro-batch; never blocks. A host that dies meanwhile is reported as lost with it."""
        target = self._hosts[host]
        target.outstanding[batch.id] = Sent(batch.hang_s)
        target.view.outstanding = len(target.outstanding)
        refusal = self._refusal(batch.spec)
        if refusal is not None and batch.spec.digest not in target.view.resident:
            self._hub.call_soon(self._refuse, target, batch.id, len(batch.parts), refusal)
            return
        self._introduce(target, batch.spec)
        self._write(target, Batch(batch.id, batch.spec.digest, batch.operation, batch.adapter, batch.parts))
        self._watchdog.wake()

    def load(self, host: int, spec: ModelSpec) -> None:
        """Hint that this model is likely next: the host loads it beside its work, if memory allows."""
        target = self._hosts[host]
        if spec.digest in target.view.resident or spec.digest in target.view.loading or self._refusal(spec):
            return
        target.view.loading |= {spec.digest}
        self._introduce(target, spec)
        self._write(target, Load(spec.digest))
        self._watchdog.wake()

    def evict(self, host: int, spec_digest: str) -> None:
        """Have a model leave the host's device as soon as nothing uses it."""
        self._write(self._hosts[host], Evict(spec_digest))

    def stop(self, timeout_s: float) -> None:
        """End every host and the zygote; afterwards no child is left."""
        self._stopping = True
        self._watchdog.stop()
        for host in list(self._hosts.values()):
            self._close(host)
        self._hosts.clear()
        self._close_control()
        if self._zygote is not None:
            _end(self._zygote, timeout_s)
            self._zygote = None

    # -- the zygote ----------------------------------------------------------------------------------------------

    def _start_zygote(self) -> None:
        if self._stopping:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._zygote = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-m", "workers.host.main", str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                env=_environment(self._config.torch_threads),
                stdin=subprocess.DEVNULL,
            )
        ours.setblocking(False)
        self._control = ours
        self._zygote_started = monotonic()
        ours.send(frames.packet(self._config.setup()))
        self._listen_control()
        for _ in range(self._config.hosts - len(self._hosts)):
            self._ask_for_host()

    def _listen_control(self) -> None:
        if self._hub is not None and self._control is not None:
            self._hub.remove_reader(self._control.fileno())
            self._hub.add_reader(self._control.fileno(), self._on_control)

    def _on_control(self) -> None:
        while self._control is not None:
            try:
                data = self._control.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._on_zygote_lost()
                return
            match frames.from_zygote.decode(data):
                case Imported(seconds, error):
                    log.info("zygote_ready", import_s=round(seconds, 3), error=error)
                case Exited(number, status):
                    self._on_exited(number, status)

    def _on_zygote_lost(self) -> None:
        """Its hosts died with it: report them and start over, with patience if it dies young."""
        assert self._zygote is not None  # its channel was open
        _end(self._zygote, STATUS_WAIT_S)
        reason = f"the zygote ended ({_describe(self._zygote.returncode)})"
        self._close_control()
        lived_s = monotonic() - self._zygote_started
        self._zygote_deaths = self._zygote_deaths + 1 if lived_s < BACK_OFF_S[-1] else 0
        wait_s = _back_off(self._zygote_deaths)
        log.error("zygote_lost", reason=reason, again_in_s=wait_s)
        for host in list(self._hosts.values()):
            self._drain(host)
            host.killed_for = host.killed_for or reason
            self._report_lost(host, replace=False)
        self._hub.call_later(wait_s, self._restart_zygote)

    def _restart_zygote(self) -> None:
        try:
            self._start_zygote()
        except OSError as error:  # no process, descriptor or memory to be had at the moment
            log.warning("zygote_not_started", error=str(error), again_in_s=BACK_OFF_S[-1])
            self._close_control()
            self._hub.call_later(BACK_OFF_S[-1], self._restart_zygote)

    def _close_control(self) -> None:
        if self._control is not None:
            if self._hub is not None:
                self._hub.remove_reader(self._control.fileno())
            self._control.close()
            self._control = None

    # -- a host's life -------------------------------------------------------------------------------------------

    def _ask_for_host(self) -> None:
        if self._stopping or self._control is None or len(self._hosts) >= self._config.hosts:
            return
        number, self._next_host = self._next_host, self._next_host + 1
        try:
            host = _ask(self._control, Fork(number, self._free_device()))
        except OSError as error:  # no descriptors, or the zygote has just died and its end of file is about to be read
            log.warning("host_not_asked", error=str(error))
            if self._hub is not None:
                self._hub.call_later(1.0, self._ask_for_host)
            return
        self._hosts[number] = host
        self._listen(host)
        self._watchdog.wake()

    def _free_device(self) -> str:
        """The device with the fewest hosts."""
        used = [host.view.device for host in self._hosts.values()]
        return min(self._config.devices, key=used.count)

    def _listen(self, host: _Host) -> None:
        if self._hub is not None and not host.is_closed:
            self._hub.remove_reader(host.link.fileno())
            self._hub.add_reader(host.link.fileno(), self._on_readable, host)

    def _on_exited(self, number: int, status: int) -> None:
        host = self._hosts.get(number)
        if host is not None:
            host.status = status
            self._drain(host)
            self._report_lost(host)

    def _on_end_of_file(self, host: _Host) -> None:
        """Nothing more comes from it; how it died is the zygote's to say, which is given a moment for it."""
        host.view.outstanding = len(host.outstanding)
        self._close(host)
        self._hub.call_later(STATUS_WAIT_S, self._report_lost, host)

    def _report_lost(self, host: _Host, *, replace: bool = True) -> None:
        """Ask for a replacement first, then say what was lost. Once per host."""
        if self._hosts.pop(host.view.id, None) is None:
            return
        self._close(host)
        doing = host.board.doing()
        host.board.close()
        reason = host.killed_for or (_describe(host.status) if host.status is not None else "its link was closed")
        suspects = {note.batch for note in doing if note.stage is not Stage.LOAD} & host.outstanding.keys()
        for note in doing:
            if note.stage is Stage.LOAD:
                self._note_load_death(host.spec_of(note.spec_number), reason)
        self._early_deaths = 0 if host.is_ready else self._early_deaths + 1
        if replace:
            self._replace()
        innocent = host.outstanding.keys() - suspects
        self._events.on_host_lost(host.view.id, sorted(suspects), sorted(innocent), reason)

    def _replace(self) -> None:
        wait_s = _back_off(self._early_deaths)
        if wait_s:
            self._hub.call_later(wait_s, self._ask_for_host)
        else:
            self._ask_for_host()

    def _close(self, host: _Host) -> None:
        if host.is_closed:
            return
        host.is_closed = True
        if self._hub is not None:
            self._hub.remove_reader(host.link.fileno())
        self._close_write_fd(host)
        host.unsent.clear()
        host.link.close()

    # -- what hosts say ------------------------------------------------------------------------------------------

    def _on_readable(self, host: _Host) -> None:
        if not self._drain(host):
            self._on_end_of_file(host)

    def _drain(self, host: _Host) -> bool:
        """Take what the host has sent; false at the end."""
        while not host.is_closed:
            try:
                data = host.link.recv(_READ_BYTES)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            for body in host.unframer.feed(data):
                self._on_message(host, frames.from_host.decode(body))
        return True

    def _on_message(self, host: _Host, message: frames.FromHost) -> None:
        match message:
            case Done():
                self._on_done(host, message)
            case ModelNews():
                self._on_news(host, message)
            case Ready():
                host.is_ready = True
                self._early_deaths = 0
                host.view.pid, host.view.device = message.pid, message.device
                host.view.budget_bytes = message.budget_bytes
                self._events.on_host_ready(host.view.id)

    def _on_done(self, host: _Host, done: Done) -> None:
        del host.outstanding[done.batch]
        host.view.outstanding = len(host.outstanding)
        results = [PartResult(answer.result, answer.tokens, answer.error) for answer in done.answers]
        timing = BatchTiming(done.tokenization_ms, done.inference_ms, done.postprocessing_ms, done.load_s, done.tokens)
        self._events.on_batch_done(host.view.id, done.batch, results, timing)

    def _on_news(self, host: _Host, news: ModelNews) -> None:
        view = host.view
        if news.event == "loading":
            view.loading |= {news.spec}
            return
        if news.event != "evicted":
            view.loading -= {news.spec}
        if news.event == "loaded":
            view.resident[news.spec] = news.detail["bytes"]
            self._load_deaths.pop(news.spec, None)
        elif news.event == "evicted":
            view.resident.pop(news.spec, None)
        if news.event != "skipped":
            self._events.on_model(view.id, news.spec, news.event, news.detail)

    # -- what hosts are told -------------------------------------------------------------------------------------

    def _introduce(self, host: _Host, spec: ModelSpec) -> None:
        """Send each spec once; afterwards its digest is enough."""
        if spec.digest not in host.spec_numbers:
            number = host.spec_numbers[spec.digest] = len(host.spec_numbers) + 1
            self._write(host, Introduce(spec.digest, number, spec))

    def _write(self, host: _Host, message: frames.ToHost) -> None:
        if host.is_closed:
            return
        was_idle = not host.unsent
        host.unsent.append(memoryview(frames.frame(message)))
        if was_idle:
            self._flush(host)

    def _flush(self, host: _Host) -> None:
        """Send what the socket takes; the rest waits for the loop to say that it takes more."""
        try:
            while host.unsent:
                sent = host.link.send(host.unsent[0], socket.MSG_NOSIGNAL)
                if sent == len(host.unsent[0]):
                    host.unsent.popleft()
                else:
                    host.unsent[0] = host.unsent[0][sent:]
        except BlockingIOError:
            self._want_write(host)
            return
        except OSError:
            host.unsent.clear()  # it died: the end of file is about to be read
        self._close_write_fd(host)

    def _want_write(self, host: _Host) -> None:
        # kombu's epoll poller ignores a second registration of one descriptor, so writing gets a duplicate of its own.
        if host.write_fd is None and self._hub is not None:
            host.write_fd = os.dup(host.link.fileno())
            self._hub.add_writer(host.write_fd, self._flush, host)

    def _close_write_fd(self, host: _Host) -> None:
        if host.write_fd is not None:
            if self._hub is not None:
                self._hub.remove_writer(host.write_fd)
            os.close(host.write_fd)
            host.write_fd = None

    # -- models whose load kills -----------------------------------------------------------------------------------

    def _note_load_death(self, digest: str, reason: str) -> None:
        deaths = self._load_deaths.get(digest, (0, 0.0, ""))[0] + 1
        self._load_deaths[digest] = (deaths, monotonic() + REFUSE_S, reason)

    def _refusal(self, spec: ModelSpec) -> FarmError | None:
        """Why this model is not given to a host now."""
        deaths, until, reason = self._load_deaths.get(spec.digest, (0, 0.0, ""))
        if deaths < LOAD_DEATHS_UNTIL_REFUSED or monotonic() >= until:
            return None
        error_class = "TIMEOUT" if reason == LOAD_HANG else "OOM" if "out of memory" in reason else "ENGINE"
        details = {"error_class": error_class, "permanent": False, "attempts": deaths}
        return ModelLoadError(f"loading {spec.id} ended the model process {deaths} times ({reason})", details=details)

    def _refuse(self, host: _Host, batch: int, parts: int, refusal: FarmError) -> None:
        if host.outstanding.pop(batch, None) is None:
            return  # the host was lost meanwhile, and the micro-batch with it
        host.view.outstanding = len(host.outstanding)
        refused = PartResult(None, 0, refusal.as_dict())
        self._events.on_batch_done(host.view.id, batch, [refused] * parts, BatchTiming(0.0, 0.0, 0.0, 0.0, 0))

    # -- the watchdog's thread -------------------------------------------------------------------------------------

    def _watch(self, excused: float) -> bool:
        """Kill what hangs; returns whether there is anything to watch."""
        busy = False
        for host in list(self._hosts.values()):
            limits = dict(host.outstanding)
            busy = busy or bool(limits) or bool(host.view.loading) or not host.is_ready
            is_late = not host.is_ready and monotonic() - max(host.asked_at, excused) > START_LIMIT_S
            reason = "hang of its start" if is_late else overdue(host.board, limits, excused)
            if reason is not None and host.killed_for is None:
                self._kill(host, reason)
        return busy

    def _kill(self, host: _Host, reason: str) -> None:
        """Noted first, since the loop may see the end of file at once."""
        control = self._control
        host.killed_for = reason
        try:
            if control is not None:
                control.send(frames.packet(Kill(host.view.id)))
        except OSError:
            host.killed_for = None  # the next look tries again, unless the zygote has died, and the host with it


def _ask(control: socket.socket, fork: Fork) -> _Host:
    """Have the zygote fork a host; its ends of link and board travel with the request."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            descriptor = stages.create_board()
            try:
                socket.send_fds(control, [frames.packet(fork)], [theirs.fileno(), descriptor])
                board = Board(descriptor)
            finally:
                os.close(descriptor)
        except OSError:
            ours.close()
            raise
    ours.setblocking(False)
    return _Host(fork.host, fork.device, ours, board)


class _Watchdog:
    """A thread that looks at the hosts while they work, whatever the event loop is doing."""

    def __init__(self, look: Callable[[float], bool]) -> None:
        self._look = look
        self._work = Event()
        self._stopped = Event()
        self._thread = Thread(target=self._run, name="host-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is something to watch."""
        if not self._work.is_set():
            self._work.set()

    def stop(self) -> None:
        self._stopped.set()
        self._work.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _run(self) -> None:
        excused = 0.0
        while True:
            self._work.wait()
            slept_at = monotonic()
            self._stopped.wait(WATCH_S)
            if monotonic() - slept_at > FROZEN_S + WATCH_S:
                excused = monotonic()
            self._work.clear()
            if self._stopped.is_set():  # asked after the clearing, so that no order to stop is overlooked
                return
            if self._has_work(excused):
                self._work.set()

    def _has_work(self, excused: float) -> bool:
        try:
            return self._look(excused)
        except (OSError, ValueError) as error:  # a host was being replaced under our eyes: look again
            log.debug("watchdog_look_failed", error=str(error))
            return True


def overdue(board: Board, limits: Mapping[int, Sent], excused: float) -> str | None:
    """Why the host must be cut, if it must; notes are read twice, so that a change under way is not misread."""
    now = monotonic()
    for note in board.doing():
        sent = limits.get(note.batch)
        limit_s = LOAD_LIMIT_S if note.stage is Stage.LOAD else sent.hang_s if sent else None
        if limit_s is not None and now - max(note.since, excused) > limit_s and note in board.doing():
            return LOAD_HANG if note.stage is Stage.LOAD else "hang"
    return None


def usable_cores() -> int:
    """Cores this process may use: its affinity, and its container's quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2 here, or no quota ("max")
        return cores


def _devices(settings: WorkerSettings) -> tuple[str, ...]:
    """Torch's names of the devices to use; found without torch, which the worker does not import."""
    if settings.device == "cpu":
        return ("cpu",)
    if settings.device.startswith("cuda:"):
        return (settings.device,)
    count = _visible_gpus(settings.cuda_visible_devices)
    if settings.device == "auto" and not (count and _torch_has_cuda()):
        return ("cpu",)
    return tuple(f"cuda:{index}" for index in range(max(1, count)))


def _visible_gpus(visible: str | None) -> int:
    present = len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])
    if visible is None:
        return present
    return min(present, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))


def _torch_has_cuda() -> bool:
    """Whether the installed torch is a build for GPUs, as its version says (``2.13.0+cpu`` is not)."""
    try:
        return not importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def _environment(threads: int) -> dict[str, str]:
    """The zygote's environment: ours, the modules we see, and what BLAS, OpenMP and tokenizers read when they load."""
    return {
        **os.environ,  # noqa: TID251 - handed on, not read
        "PYTHONPATH": os.pathsep.join(path for path in ("", *sys.path) if path),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }


def _back_off(deaths: int) -> float:
    return BACK_OFF_S[min(deaths, len(BACK_OFF_S) - 1)]


def _describe(status: int) -> str:
    """An exit status in words; negative is a signal's number."""
    if status == -signal.SIGKILL:
        return "killed by SIGKILL (out of memory?)"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return "the device was lost" if status == EXIT_DEVICE_LOST else f"exit {status}"


def _end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Wait for a process that was told to end; kill it when it does not."""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
