"""The worker's side and the hosts together: real processes, a real kombu event loop, and the fake family."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import psutil
import pytest
from kombu.asynchronous.hub import Hub

from config_db.spec import ModelSpec
from tasks import codec
from tasks.messages import Request, encode_body
from tasks.names import Operation
from tests.fakes.family import PLACE, fake_spec, fake_vector
from tests.services import wait_until
from workers.host_link import BatchTiming, HostBatch, HostConfig, HostPool, HostView, PartResult

LONG_S = 60.0
ROOT = Path(__file__).parents[2]


@dataclass
class Recorder:
    """What a worker is told, in order."""

    ready: list[int] = field(default_factory=list)
    done: dict[int, tuple[list[PartResult], BatchTiming]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    lost: list[tuple[int, list[int], list[int], str]] = field(default_factory=list)
    models: list[tuple[int, str, str, dict[str, Any]]] = field(default_factory=list)

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

    def computing(self, host: int, batch: int) -> None:
        """Run the loop until the host computes this micro-batch."""
        board = self.pool._hosts[host].board
        self.until(lambda: any(note.batch == batch and note.stage == 3 for note in board.doing()), "computing")


def _vector(part: PartResult) -> Any:
    assert part.result is not None, part.error
    return codec.array_of(codec.unpack(part.result)[0]["dense"]["values"])


def _code(part: PartResult) -> str | None:
    return None if part.error is None else part.error["code"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., LivePool]]:
    """Starts pools; afterwards no process of theirs is left."""
    lives: list[LivePool] = []

    def started(**config: Any) -> LivePool:
        events, hub = Recorder(), Hub()
        hub.call_repeatedly(0.02, lambda: None)  # so that ``until`` looks again even if nothing is said
        settings = {"model_dirs": (str(tmp_path),), "extra_families": {"fake": PLACE}, "device_memory": 10_000_000}
        pool = HostPool(HostConfig(**{**settings, **config}), events)
        lives.append(LivePool(pool, events, hub, tmp_path))
        pool.start()
        pool.register(hub)
        return lives[-1]

    before = _descendants()
    yield started
    for live in lives:
        live.pool.stop(5.0)
        live.hub.close()
    assert _descendants() <= before


def _runs(process: psutil.Process) -> bool:
    """Whether it is more than an entry that its new parent has not read yet."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _descendants() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_a_batch_comes_back_part_by_part(start: Callable[..., LivePool]) -> None:
    live = start()
    host = live.ready()[0].id
    spec = live.spec(dim=33)
    parts = live.run(host, spec, "one", "two words", "three words here")
    for part, text in zip(parts, ("one", "two words", "three words here"), strict=True):
        assert np.array_equal(_vector(part), fake_vector(text, 33))
    assert [part.tokens for part in parts] == [1, 2, 3]
    timing = live.events.done[1][1]
    assert timing.tokens == 6
    assert timing.load_s > 0
    assert live.pool.hosts()[0].outstanding == 0
    assert live.pool.hosts()[0].resident == {spec.digest: 1_000_000}


def test_hosts_of_fake_families_import_no_torch(start: Callable[..., LivePool]) -> None:
    live = start()
    view = live.ready()[0]
    live.run(view.id, live.spec(), "x")
    assert "torch" not in Path(f"/proc/{view.pid}/maps").read_text()


def test_the_zygote_runs_no_thread_and_hosts_are_killed_first(start: Callable[..., LivePool]) -> None:
    live = start()
    host = psutil.Process(live.ready()[0].pid)
    zygote = host.parent()
    assert zygote is not None
    assert zygote.num_threads() == 1
    score = {process.pid: int(Path(f"/proc/{process.pid}/oom_score_adj").read_text()) for process in (host, zygote)}
    assert score[host.pid] == 800 > score[zygote.pid]


def test_one_batch_is_prepared_while_another_is_computed(start: Callable[..., LivePool]) -> None:
    """Both notes stand on the board at once; the order of answers stays the order of sending."""
    live = start()
    host, spec = live.ready()[0].id, live.spec(prepare_ms=150)
    live.run(host, spec, "warm")
    first = live.send(host, spec, "!sleep:0.6")
    live.computing(host, first)
    second = live.send(host, spec, "b")
    board = live.pool._hosts[host].board
    live.until(lambda: {(note.stage, note.batch) for note in board.doing()} == {(3, first), (2, second)}, "overlap")
    live.until(lambda: second in live.events.done, "both results")
    assert live.events.order[-2:] == [first, second]


def test_only_the_raising_part_of_eight_fails(start: Callable[..., LivePool]) -> None:
    live = start()
    texts = [f"t{number}" for number in range(7)]
    parts = live.run(live.ready()[0].id, live.spec(), *texts[:3], "!raise", *texts[3:])
    assert [_code(part) for part in parts] == [None] * 3 + ["INFERENCE_ERROR"] + [None] * 4
    assert "told to raise" in (parts[3].error or {})["message"]
    assert live.events.lost == []


def test_refused_and_damaged_parts_fail_alone(start: Callable[..., LivePool]) -> None:
    live = start()
    host, spec = live.ready()[0].id, live.spec()
    good = encode_body(spec.id, Request(items=[{"text": "good"}]))
    refused = encode_body(spec.id, Request(items=[{"text": "!refuse"}]))
    batch = live.send(host, spec, bodies=(b"\xc1 no msgpack", good, refused))
    live.until(lambda: batch in live.events.done, "results")
    codes = [_code(part) for part in live.events.done[batch][0]]
    assert codes == ["MESSAGE_REFUSED", None, "INVALID_INPUT"]


def test_an_adapter_nobody_has_is_an_error_not_the_base_model(start: Callable[..., LivePool]) -> None:
    live = start()
    host, spec = live.ready()[0].id, live.spec()
    body = encode_body(spec.id, Request(items=[{"text": "x"}]))
    live.pool.send(host, HostBatch(1, spec, Operation.ENCODE, "some-lora", (body,), LONG_S))
    live.until(lambda: 1 in live.events.done, "an answer")
    assert _code(live.events.done[1][0][0]) == "INVALID_INPUT"


def test_a_request_too_large_for_the_device_fails_alone(start: Callable[..., LivePool]) -> None:
    live = start()
    parts = live.run(live.ready()[0].id, live.spec(), "a", "!oom", "b")
    assert [_code(part) for part in parts] == [None, "RESOURCE_EXHAUSTED", None]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("!segfault", "killed by SIGSEGV"),
        ("!exit", "exit 1"),
        ("!lost", "the device was lost"),
        ("!prepare-segfault", "killed by SIGSEGV"),
    ],
)
def test_what_kills_a_host_is_suspected_and_another_takes_its_place(
    start: Callable[..., LivePool], text: str, reason: str
) -> None:
    live = start()
    host, spec = live.ready()[0].id, live.spec()
    live.run(host, spec, "warm")
    batch = live.send(host, spec, "a", text)
    live.until(lambda: live.events.lost, "loss")
    assert live.events.lost == [(host, [batch], [], reason)]
    other = live.ready()[0].id
    assert other != host
    assert np.array_equal(_vector(live.run(other, spec, "b")[0]), fake_vector("b"))


def test_a_batch_waiting_behind_the_killer_is_innocent(start: Callable[..., LivePool]) -> None:
    live = start()
    host, spec = live.ready()[0].id, live.spec()
    live.run(host, spec, "warm")
    first = live.send(host, spec, "!hang", hang_s=0.3)
    second = live.send(host, spec, "b", hang_s=0.3)
    live.until(lambda: live.events.lost, "loss")
    assert live.events.lost == [(host, [first], [second], "hang")]
    live.ready()


def test_a_hang_is_cut_while_the_event_loop_is_blocked(start: Callable[..., LivePool]) -> None:
    live = start()
    view = live.ready()[0]
    live.run(view.id, live.spec(), "warm")
    live.send(view.id, live.spec(), "!hang", hang_s=0.2)
    process = psutil.Process(view.pid)
    process.wait(timeout=5)  # nobody runs the loop meanwhile
    live.until(lambda: live.events.lost, "loss")
    assert live.events.lost[0][3] == "hang"


def test_an_answer_not_yet_read_is_no_hang(start: Callable[..., LivePool]) -> None:
    """The loop is blocked for longer than ``hang_s`` after a batch was answered: the host lives."""
    live = start()
    view = live.ready()[0]
    live.run(view.id, live.spec(), "warm")
    batch = live.send(view.id, live.spec(), "a", hang_s=0.1)
    with pytest.raises(psutil.TimeoutExpired):
        psutil.Process(view.pid).wait(timeout=0.5)
    live.until(lambda: batch in live.events.done, "results")
    assert live.events.lost == []


def test_a_slow_load_is_no_hang(start: Callable[..., LivePool]) -> None:
    live = start()
    host, spec = live.ready()[0].id, live.spec(load_ms=500)
    batch = live.send(host, spec, "a", hang_s=0.1)
    live.until(lambda: spec.digest in live.pool.hosts()[0].loading, "loading")
    live.until(lambda: batch in live.events.done, "results")
    assert live.events.lost == []
    assert live.pool.hosts()[0].loading == frozenset()


def test_a_host_killed_from_outside_is_replaced(start: Callable[..., LivePool]) -> None:
    live = start(hosts=2)
    victim, other = live.ready(2)
    running = live.send(victim.id, live.spec(), "!sleep:30")
    live.computing(victim.id, running)
    os.kill(victim.pid, signal.SIGKILL)
    live.until(lambda: live.events.lost, "loss")
    assert live.events.lost == [(victim.id, [running], [], "killed by SIGKILL (out of memory?)")]
    assert {view.id for view in live.ready(2)} > {other.id}


def test_an_idle_host_killed_loses_nothing(start: Callable[..., LivePool]) -> None:
    live = start()
    view = live.ready()[0]
    os.kill(view.pid, signal.SIGKILL)
    live.until(lambda: live.events.lost, "loss")
    assert live.events.lost[0][1:3] == ([], [])
    live.ready()


def test_hosts_ignore_the_signals_of_a_terminal(start: Callable[..., LivePool]) -> None:
    live = start()
    view = live.ready()[0]
    zygote = psutil.Process(view.pid).parent()
    assert zygote is not None
    for signum in (signal.SIGINT, signal.SIGTERM):
        os.kill(view.pid, signum)
        zygote.send_signal(signum)
    assert _code(live.run(view.id, live.spec(), "still here")[0]) is None


def test_a_killed_zygote_takes_its_hosts_and_comes_back(start: Callable[..., LivePool]) -> None:
    live = start(hosts=2)
    first, second = live.ready(2)
    spec = live.spec()
    live.run(first.id, spec, "warm")
    running = live.send(first.id, spec, "!sleep:30")
    live.computing(first.id, running)
    hosts = [psutil.Process(first.pid), psutil.Process(second.pid)]
    zygote = hosts[0].parent()
    assert zygote is not None
    zygote.kill()
    live.until(lambda: len(live.events.lost) == 2, "losses")
    assert sorted(loss[0] for loss in live.events.lost) == [first.id, second.id]
    assert next(loss for loss in live.events.lost if loss[0] == first.id)[1] == [running]
    fresh = live.ready(2)
    assert not {view.id for view in fresh} & {first.id, second.id}
    wait_until(lambda: not any(map(_runs, hosts)), 5, "end of the hosts")
    assert _code(live.run(fresh[0].id, spec, "back")[0]) is None


def test_a_hint_loads_beside_the_running_batch(start: Callable[..., LivePool]) -> None:
    live = start()
    host, one, two = live.ready()[0].id, live.spec("fake/one"), live.spec("fake/two", load_ms=50)
    live.run(host, one, "warm")
    running = live.send(host, one, "!sleep:0.5")
    live.computing(host, running)
    live.pool.load(host, two)
    live.until(lambda: two.digest in live.pool.hosts()[0].resident, "the hinted model")
    assert running not in live.events.done
    assert live.events.models[-1][1:3] == (two.digest, "loaded")
    live.until(lambda: running in live.events.done, "results")


def test_a_hint_without_memory_changes_nothing(start: Callable[..., LivePool]) -> None:
    live = start(device_memory=1_500_000)
    host, one, two = live.ready()[0].id, live.spec("fake/one"), live.spec("fake/two")
    live.run(host, one, "warm")
    live.pool.load(host, two)
    assert live.pool.hosts()[0].loading == {two.digest}
    live.until(lambda: not live.pool.hosts()[0].loading, "the end of the hinted load")
    assert set(live.pool.hosts()[0].resident) == {one.digest}
    assert [event for _, _, event, _ in live.events.models] == ["loaded"]


def test_a_hint_for_a_broken_model_fails_it_once(start: Callable[..., LivePool]) -> None:
    live = start()
    host, broken = live.ready()[0].id, live.spec(load_fails="permanent")
    for _ in range(2):
        live.pool.load(host, broken)
        live.until(lambda: not live.pool.hosts()[0].loading, "the end of the hinted load")
    assert [event for _, _, event, _ in live.events.models] == ["load_failed"]


def test_a_resident_model_is_served_while_another_loads(start: Callable[..., LivePool]) -> None:
    live = start()
    host, one, slow = live.ready()[0].id, live.spec("fake/one"), live.spec("fake/slow", load_ms=700)
    live.run(host, one, "warm")
    waiting = live.send(host, slow, "a")
    served = live.send(host, one, "b")
    live.until(lambda: served in live.events.done, "the resident model's results")
    assert waiting not in live.events.done
    live.until(lambda: waiting in live.events.done, "the loaded model's results")


def test_the_least_recently_used_model_leaves_for_room(start: Callable[..., LivePool]) -> None:
    live = start(device_memory=2_500_000)
    host = live.ready()[0].id
    specs = [live.spec(f"fake/m{number}") for number in range(3)]
    for spec in (specs[0], specs[1], specs[0], specs[2]):
        assert _code(live.run(host, spec, "x")[0]) is None
    view = live.pool.hosts()[0]
    assert set(view.resident) == {specs[0].digest, specs[2].digest}
    assert view.budget_bytes == 2_500_000 >= sum(view.resident.values())
    assert [(event, digest) for _, digest, event, _ in live.events.models if event == "evicted"] == [
        ("evicted", specs[1].digest)
    ]


def test_hosts_of_one_device_share_its_memory(start: Callable[..., LivePool]) -> None:
    live = start(hosts=2, device_memory=4_000_000)
    assert [view.budget_bytes for view in live.ready(2)] == [2_000_000, 2_000_000]


def test_memory_is_measured_when_none_is_set(start: Callable[..., LivePool]) -> None:
    live = start(device_memory=None, device_fraction=0.5)
    assert 2**20 < live.ready()[0].budget_bytes < psutil.virtual_memory().total


def test_a_model_larger_than_the_device_is_refused(start: Callable[..., LivePool]) -> None:
    live = start(device_memory=500_000)
    part = live.run(live.ready()[0].id, live.spec(), "x")[0]
    assert _code(part) == "RESOURCE_EXHAUSTED"
    assert "FARMHAND_DEVICE_MEMORY" in (part.error or {})["message"]


def test_evicting_on_demand(start: Callable[..., LivePool]) -> None:
    live = start()
    host, spec = live.ready()[0].id, live.spec()
    live.run(host, spec, "x")
    live.pool.evict(host, spec.digest)
    live.until(lambda: not live.pool.hosts()[0].resident, "an eviction")
    assert live.events.models[-1][2:] == ("evicted", {"bytes": 1_000_000, "reason": "asked"})


def test_a_broken_model_fails_every_part_and_is_not_tried_again_at_once(start: Callable[..., LivePool]) -> None:
    live = start()
    host, spec = live.ready()[0].id, live.spec(load_fails="permanent")
    parts = live.run(host, spec, "a", "b")
    assert [_code(part) for part in parts] == ["MODEL_LOAD_FAILED"] * 2
    assert {name: (parts[0].error or {})[name] for name in ("error_class", "permanent", "attempts")} == {
        "error_class": "CONFIG",
        "permanent": True,
        "attempts": 1,
    }
    again = live.run(host, spec, "c")[0].error or {}
    assert again["attempts"] == 1
    assert [event for _, _, event, _ in live.events.models] == ["load_failed"]


def test_unknown_families_and_missing_files_fail_with_their_reason(start: Callable[..., LivePool]) -> None:
    live = start(extra_families={})
    part = live.run(live.ready()[0].id, live.spec(), "a")[0]
    assert "no model family 'fake'" in (part.error or {})["message"]
    live = start()
    missing = fake_spec(path=live.files / "nowhere")
    part = live.run(live.ready()[0].id, missing, "a")[0]
    assert _code(part) == "MODEL_LOAD_FAILED"


def test_a_model_whose_load_kills_is_refused_after_two_hosts(start: Callable[..., LivePool]) -> None:
    """Its requests are innocent, so they come again whole: without an end to it they would kill hosts for ever."""
    live = start()
    spec = live.spec(load_fails="segfault")
    for death in (1, 2):
        batch = live.send(live.ready()[0].id, spec, "a", "b")
        live.until(partial(_has_lost, live, death), "loss")
        assert live.events.lost[-1][1:3] == ([], [batch])
    parts = live.run(live.ready()[0].id, spec, "a", "b")
    assert [_code(part) for part in parts] == ["MODEL_LOAD_FAILED"] * 2
    assert _code(live.run(live.ready()[0].id, live.spec("fake/other"), "x")[0]) is None


def _has_lost(live: LivePool, count: int) -> bool:
    return len(live.events.lost) == count


def test_bodies_and_results_of_many_megabytes(start: Callable[..., LivePool]) -> None:
    live = start()
    host, spec = live.ready()[0].id, live.spec(dim=500_000)
    text = "x" * 10 * 2**20
    started = monotonic()
    batch = live.send(host, spec, text, "small", text)
    assert monotonic() - started < 1.0  # nothing waited for the host to read
    live.until(lambda: batch in live.events.done, "results")
    parts = live.events.done[batch][0]
    for part, sent in zip(parts, (text, "small", text), strict=True):
        assert np.array_equal(_vector(part), fake_vector(sent, 500_000))


def test_registering_again_after_a_reset_goes_on(start: Callable[..., LivePool]) -> None:
    live = start()
    host, spec = live.ready()[0].id, live.spec()
    live.run(host, spec, "warm")
    text = "x" * 5 * 2**20
    batch = live.send(host, spec, text)  # more than the socket takes: the writer is registered, too
    live.hub.reset()
    live.hub.close()
    live.hub = Hub()
    live.hub.call_repeatedly(0.02, lambda: None)
    live.pool.register(live.hub)
    live.pool.register(live.hub)
    live.until(lambda: batch in live.events.done, "results")
    assert _code(live.run(host, spec, "after")[0]) is None
    os.kill(live.pool.hosts()[0].pid, signal.SIGKILL)
    live.until(lambda: live.events.lost, "loss")
    live.ready()


def test_a_zygote_that_cannot_import_still_serves_what_it_can(start: Callable[..., LivePool]) -> None:
    live = start(preimport=("no_such_module_anywhere",))
    assert _code(live.run(live.ready()[0].id, live.spec(), "x")[0]) is None


WORKER = """
import sys
from kombu.asynchronous.hub import Hub
from tests.fakes.family import PLACE
from workers.host_link import HostConfig, HostPool

class Events:
    def on_host_ready(self, host):
        views = pool.hosts()
        if len(views) == 2:
            print("pids", pool._zygote.pid, *(view.pid for view in views), flush=True)

pool, hub = HostPool(HostConfig(hosts=2, extra_families={"fake": PLACE}), Events()), Hub()
pool.start()
pool.register(hub)
hub.call_repeatedly(0.1, lambda: None)
while True:
    hub.run_once()
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_worker_that_dies(signum: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", WORKER], cwd=ROOT, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        line = next(line for line in worker.stdout if line.startswith("pids"))
        children = [psutil.Process(int(pid)) for pid in line.split()[1:]]
        assert len(children) == 3
        worker.send_signal(signum)
        worker.wait(5)
        wait_until(lambda: not any(map(_runs, children)), 5, "end of zygote and hosts")
