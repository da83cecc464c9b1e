"""The hosts of one worker: sends them micro-batches from the event loop, tells what they say, and replaces the dead.

Owns the hosts and what was sent to each and not yet answered. Knows nothing of requests: it is given micro-batches and
gives results, or says which micro-batches a dying host was working on (suspects) and which it merely held (innocent).

States of a host: asked for -> warming up (it loads what is to be there before anyone asks) -> ready [-> retiring: its
memory has grown, and it is given nothing more] -> lost, and then another one, under a new number, takes its place. The
event loop's thread owns everything here; the watchdog's thread kills hosts that hang.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from common.errors import FarmError
from common.logs import get_logger
from config_db.spec import ModelSpec, Source
from tasks.live_workers import LoadFailure
from workers.host.frames import NO_ROOM, Batch, Done, Evict, Fetch, Fetched, FromHost, Grown, Load, ModelNews, Ready
from workers.host.stages import Stage
from workers.hosts.checks import check_devices
from workers.hosts.config import HostConfig
from workers.hosts.link import Link
from workers.hosts.load_failures import LoadFailures
from workers.hosts.protocol import BatchTiming, HostBatch, HostEvents, HostView, PartResult
from workers.hosts.state import HostState
from workers.hosts.watchdog import Watchdog
from workers.hosts.zygote import STATUS_WAIT_S, Zygote, back_off, describe_status

log = get_logger("workers")

WARM_UP_LIMIT_S: Final = 120.0
"""A host that still loads what is to be there beforehand is given work nevertheless after so long."""


class HostPool:
    """The model processes of one worker.

    Args:
        config: how many hosts on which devices.
        events: who is told.
        preloads: the models that a new host loads, and runs once, before it counts as ready.
    """

    def __init__(
        self, config: HostConfig, events: HostEvents, preloads: Callable[[], Iterable[ModelSpec]] = tuple
    ) -> None:
        self._config = config
        self._events = events
        self._preloads = preloads
        self._hub: Any = None
        self._hosts: dict[int, HostState] = {}
        self._next_host = 1
        self._early_deaths = 0
        self._load_failures = LoadFailures()
        self._zygote = Zygote(
            config, on_started=self._ask_for_hosts, on_exited=self._on_exited, on_lost=self._on_zygote_lost
        )
        self._watchdog = Watchdog(lambda: list(self._hosts.values()), self._zygote.kill)

    # -- what the worker asks ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring the zygote up and ask it for hosts; they say when they are ready.

        The zygote dies with the thread that calls this: the worker's main one, which the event loop runs in, too.

        Raises:
            SetupError: a device that hosts are to run on is not there.
        """
        check_devices(self._config)
        self._zygote.start()
        self._watchdog.start()

    def register(self, hub: Any) -> None:
        """Read on this hub from now on; called again after every ``hub.reset()``."""
        self._hub = hub
        self._zygote.register(hub)
        for host in self._hosts.values():
            host.link.register(hub, self._on_readable, host)

    def hosts(self) -> list[HostView]:
        """Those that are ready."""
        return [host.view for host in self._hosts.values() if host.takes_work]

    def loading(self) -> frozenset[str]:
        """Digests of the specs that some host loads or was asked to load, be it ready or not."""
        return frozenset().union(*(host.view.loading for host in self._hosts.values()))

    def load_failures(self) -> Mapping[str, LoadFailure]:
        """How the last load of a spec failed, by digest, if it has not been loaded since."""
        return self._load_failures.last()

    def send(self, host: int, batch: HostBatch) -> None:
        """Give a host a micro-batch; never blocks. A host that dies meanwhile is reported as lost with it."""
        target = self._hosts[host]
        target.owe(batch.id, batch.hang_s)
        refusal = self._load_failures.refusal(batch.spec)
        if refusal is not None and batch.spec.digest not in target.view.resident:
            self._hub.call_soon(self._refuse, target, batch.id, len(batch.parts), refusal)
            return
        target.introduce(batch.spec)
        target.link.write(Batch(batch.id, batch.spec.digest, batch.operation, batch.adapters, batch.parts))
        self._watchdog.wake()

    def load(self, host: int, spec: ModelSpec, *, warm_up: bool = False) -> bool:
        """Hint that this model is likely next: the host loads it beside its work, if memory allows.

        With ``warm_up`` it also runs once. Returns whether the host was asked.
        """
        target = self._hosts[host]
        is_known = spec.digest in target.view.resident or spec.digest in target.view.loading
        if is_known or self._load_failures.refusal(spec):
            return False
        target.view.loading |= {spec.digest}
        target.introduce(spec)
        target.link.write(Load(spec.digest, warm_up))
        self._watchdog.wake()
        return True

    def place(self, specs: Iterable[ModelSpec]) -> None:
        """Tell hosts of changed placements: pins, tiers and idle times hold at once, without a load."""
        for spec in specs:
            for host in self._hosts.values():
                if spec.digest in host.introduced:
                    host.introduce(spec)

    def evict(self, spec_digest: str, reason: str) -> None:
        """Have every host that holds this model let it go: it was ``replaced`` or ``removed``."""
        for host in self._hosts.values():
            if spec_digest in host.view.resident:
                host.link.write(Evict(spec_digest, reason))

    def fetch(self, host: int, adapter: str, source: Source) -> None:
        """Have a host bring an adapter's files onto this machine's disk, beside its work."""
        self._hosts[host].link.write(Fetch(adapter, source))

    def stop(self, timeout_s: float) -> None:
        """End every host and the zygote; afterwards no child is left."""
        self._watchdog.stop()
        for host in self._hosts.values():
            host.link.close()
        self._hosts.clear()
        self._zygote.stop(timeout_s)

    # -- a host's birth ------------------------------------------------------------------------------------------

    def _ask_for_hosts(self) -> None:
        for _ in range(self._config.hosts - len(self._hosts)):
            self._ask_for_host()

    def _ask_for_host(self) -> None:
        staying = sum(not host.is_retiring for host in self._hosts.values())
        if not self._zygote.is_up or staying >= self._config.hosts:
            return
        number, self._next_host = self._next_host, self._next_host + 1
        device = self._free_device()
        try:
            stream, board = self._zygote.fork(number, device)
        except OSError as error:
            log.warning("host_not_asked", error=str(error))
            if self._hub is not None:
                self._hub.call_later(1.0, self._ask_for_host)
            return
        host = self._hosts[number] = HostState(HostView(number), device, Link(stream), board)
        if self._hub is not None:
            host.link.register(self._hub, self._on_readable, host)
        self._watchdog.wake()

    def _free_device(self) -> str:
        """The device with the fewest hosts."""
        used = [host.device for host in self._hosts.values()]
        return min(self._config.devices, key=used.count)

    # -- what hosts say ------------------------------------------------------------------------------------------

    def _on_readable(self, host: HostState) -> None:
        self._drain(host)
        if host.link.has_ended and not host.link.is_closed:
            self._on_end_of_file(host)

    def _drain(self, host: HostState) -> None:
        """Take what the host has sent."""
        for message in host.link.receive():
            self._on_message(host, message)

    def _on_message(self, host: HostState, message: FromHost) -> None:
        match message:
            case Done():
                self._on_done(host, message)
            case ModelNews():
                self._on_news(host, message)
            case Fetched():
                self._events.on_fetched(message.adapter, message.error)
            case Ready():
                host.ready = message
                host.view.device, host.view.budget_bytes = message.device, message.budget_bytes
                self._early_deaths = 0
                self._warm_up(host)
            case Grown():
                self._on_grown(host, message)

    def _warm_up(self, host: HostState) -> None:
        """Have the host load what is to be there before it is given work."""
        for spec in self._preloads():
            if self.load(host.view.id, spec, warm_up=True):
                host.warming.add(spec.digest)
        if host.warming:
            self._hub.call_later(WARM_UP_LIMIT_S, self._announce, host)
        else:
            self._announce(host)

    def _announce(self, host: HostState) -> None:
        """It is ready. Once per host, unless it was lost meanwhile."""
        if host.is_announced or self._hosts.get(host.view.id) is not host:
            return
        if host.warming:
            log.warning("warm_up_unfinished", host=host.view.id, specs=sorted(host.warming))
        host.is_announced = True
        self._events.on_host_ready(host.view.id)

    def _on_grown(self, host: HostState, grown: Grown) -> None:
        """Replace a host whose memory has grown beyond what explains it, when it has answered what it has."""
        log.warning(
            "host_retired",
            host=host.view.id,
            held_bytes=grown.held_bytes,
            explained_bytes=grown.explained_bytes,
            bound_bytes=grown.bound_bytes,
        )
        host.killed_for = f"its memory grew by more than {grown.bound_bytes:,} bytes that nothing explains"
        host.is_retiring = True
        if host.device == "cpu":  # two hosts at once would want the memory of a GPU twice
            self._ask_for_host()
        self._end_retired(host)

    def _end_retired(self, host: HostState) -> None:
        if host.is_retiring and not host.outstanding:
            host.link.close()

    def _on_done(self, host: HostState, done: Done) -> None:
        host.settle(done.batch)
        results = [PartResult(answer.result, answer.tokens, answer.error) for answer in done.answers]
        timing = BatchTiming(done.tokenization_ms, done.inference_ms, done.postprocessing_ms, done.load_s, done.tokens)
        self._events.on_batch_done(host.view.id, done.batch, results, timing)
        self._end_retired(host)

    def _on_news(self, host: HostState, news: ModelNews) -> None:
        view = host.view
        if news.event.startswith("adapter_"):
            self._events.on_model(view.id, news.spec, news.event, news.detail)
            return
        if news.event == "loading":
            view.loading |= {news.spec}
            return
        if news.event != "evicted":
            view.loading -= {news.spec}
        if news.event == "loaded":
            view.resident[news.spec] = news.detail["bytes"]
            self._load_failures.loaded(news.spec)
        elif news.event == "load_failed":
            self._load_failures.failed(news.spec, news.detail["error"])
        elif news.event == "evicted":
            view.resident.pop(news.spec, None)
            view.evictions.append({"spec": news.spec, **news.detail})
        if news.event not in ("skipped", "warm") or news.detail.get("why") == NO_ROOM:
            self._events.on_model(view.id, news.spec, news.event, news.detail)
        if news.event in ("warm", "load_failed", "skipped") and news.spec in host.warming:
            host.warming.discard(news.spec)
            if not host.warming:
                self._announce(host)

    def _refuse(self, host: HostState, batch: int, parts: int, refusal: FarmError) -> None:
        if self._hosts.get(host.view.id) is not host:
            return  # the host was lost meanwhile, and the micro-batch with it
        host.settle(batch)
        refused = PartResult(None, 0, refusal.as_dict())
        self._events.on_batch_done(host.view.id, batch, [refused] * parts, BatchTiming(0.0, 0.0, 0.0, 0.0, 0))

    # -- a host's death ------------------------------------------------------------------------------------------

    def _on_end_of_file(self, host: HostState) -> None:
        """Nothing more comes from it; how it died is the zygote's to say, which is given a moment for it."""
        host.link.close()
        self._hub.call_later(STATUS_WAIT_S, self._report_lost, host)

    def _on_exited(self, number: int, status: int) -> None:
        host = self._hosts.get(number)
        if host is not None:
            host.status = status
            self._drain(host)
            self._report_lost(host)

    def _on_zygote_lost(self, reason: str) -> None:
        """The hosts died with it."""
        for host in list(self._hosts.values()):
            self._drain(host)
            host.killed_for = host.killed_for or reason
            self._report_lost(host, replace=False)

    def _report_lost(self, host: HostState, *, replace: bool = True) -> None:
        """Ask for a replacement first, then say what was lost. Once per host."""
        if self._hosts.pop(host.view.id, None) is None:
            return
        host.link.close()
        doing = host.board.doing()
        host.board.close()
        reason = host.killed_for or (describe_status(host.status) if host.status is not None else "its link was closed")
        suspects = {note.batch for note in doing if note.stage is not Stage.LOAD} & host.outstanding.keys()
        for note in doing:
            spec = host.spec_of(note.spec_number)
            if note.stage is Stage.LOAD and spec is not None:
                self._load_failures.host_died(spec, reason)
        self._early_deaths = 0 if host.ready is not None else self._early_deaths + 1
        if replace:
            self._replace()
        innocent = host.outstanding.keys() - suspects
        self._events.on_host_lost(host.view.id, sorted(suspects), sorted(innocent), reason)

    def _replace(self) -> None:
        wait_s = back_off(self._early_deaths)
        if wait_s:
            self._hub.call_later(wait_s, self._ask_for_host)
        else:
            self._ask_for_host()
