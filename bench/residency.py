"""What it costs that models leave and come back: reloads, memory, and many models in little memory."""

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from http.client import HTTPConnection
from pathlib import Path
from re import compile as pattern
from shutil import rmtree
from statistics import median
from threading import Event
from time import perf_counter

import msgspec
import psutil

from bench import texts
from bench.farm import DEMO, Farm, running, start, stop
from bench.figures import Effort, Measured, in_turns, model_bytes, perturbed
from tests.services import wait_until
from workers.host.families.protocol import Device
from workers.host.precision import quick

SPARE = 1.02
"""Room beyond the bare weights."""
RELOADS = 20
"""Reloads of one round."""
ZIPF_MODELS, ZIPF_QUICK_MODELS, ZIPF_SHARE = 200, 40, 10
"""One of so many has room at a time."""
ZIPF_CALLERS, ZIPF_TEXTS = 32, 32
RESIDENT_MODELS = 40
LEAK_CYCLES, LEAK_WARM_UP = 200, 40
_LOAD_S = pattern(r"change['\"]?[=:]\s*['\"]?loaded.*load_s['\"]?[=:]\s*([0-9.e-]+)")
_LOAD_S_FIRST = pattern(r"load_s['\"]?[=:]\s*([0-9.e-]+).*change['\"]?[=:]\s*['\"]?loaded")


def host_reload_ms(effort: Effort) -> Measured:
    """Request to answer of an evicted model whose weights are in host memory, above that of a resident one, in ms."""
    measured = Measured()
    with models(2) as folders, _one_host(folders, room_for=1) as farm:
        one, other = (path.name for path in folders)
        for model in (one, other) * 3:
            _ask_ms(farm, model)
        for _ in range(effort.rounds):
            resident = [_ask_ms(farm, one) for _ in range(RELOADS)]
            swapped = [_ask_ms(farm, model) for _ in range(RELOADS // 2) for model in (other, one)]
            measured.samples.append(median(swapped) - median(resident[1:]))
        measured.note(f"last round: resident {median(resident):.1f} ms, reloaded {median(swapped):.1f} ms")
        measured.note(f"loads told by the host, median: {median(_loads_s(farm)[4:]) * 1000:.1f} ms")
    return measured


def disk_reload_ms(effort: Effort) -> Measured:
    """The same of a model that this machine has never run, of a known architecture, its files in the page cache."""
    measured = Measured()
    directory = Path(tempfile.mkdtemp(prefix="farmhand-bench-"))
    try:
        with models(1 + 4 * effort.rounds) as folders:
            words = ["--no-demo", "--hosts", "1", *_model_words(folders)]
            for again in (False, True):
                farm = start(directory / "data", directory, *words)
                try:
                    farm.settle()
                    resident, seen = _never_seen(farm, [path.name for path in folders])
                    wait_until(lambda: _copies(directory) == len(folders), 120, "a copy of every model")
                finally:
                    stop(farm)
                if again:
                    measured.note(f"known to another host of this machine: {median(seen):.1f} ms")
                else:
                    measured.samples += [median(seen[at : at + 4]) for at in range(0, len(seen), 4)]
                    measured.note(f"resident {resident:.1f} ms")
    finally:
        rmtree(directory, ignore_errors=True)
    return measured


def zipf200_ratio(effort: Effort) -> Measured:
    """Many models, memory for a tenth, Zipf, 32 callers, 32 short texts: texts per second over all resident."""
    return _zipf(effort)[0]


def swap_share(effort: Effort) -> Measured:
    """In that run, time spent loading over the time that hosts were busy."""
    return _zipf(effort)[1]


def leak_pct(effort: Effort) -> Measured:
    """Growth of a host's anonymous memory over 200 loads and unloads, in percent."""
    measured = Measured()
    with models(2) as folders, _one_host(folders, room_for=1) as farm:
        cycles = LEAK_CYCLES if effort.rounds > 2 else LEAK_CYCLES // 2
        names = [path.name for path in folders]
        for place in range(LEAK_WARM_UP):
            _ask_ms(farm, names[place % 2])
        began = _own_mb(farm)
        for place in range(cycles):
            _ask_ms(farm, names[place % 2])
        ended = _own_mb(farm)
        measured.samples.append(100 * max(0.0, ended - began) / began)
        measured.note(f"{cycles} cycles after {LEAK_WARM_UP}: {began:.1f} MiB before, {ended:.1f} MiB after")
    return measured


def mem_per_model_mb(effort: Effort) -> Measured:
    """Proportional set size that a further resident model costs, over 40 of them, in MiB."""
    measured = Measured()
    count = RESIDENT_MODELS if effort.rounds > 2 else RESIDENT_MODELS // 4
    with models(count + 1) as folders, _one_host(folders) as farm:
        first, *others = (path.name for path in folders)
        _ask_ms(farm, first)
        before = farm.pss_mb()["host"]
        for model in others:
            _ask_ms(farm, model)
        farm.settle()
        after = farm.pss_mb()["host"]
        measured.samples.append((after - before) / count)
        measured.note(f"{count} models, one host, {_precision()}; weights {model_bytes(_precision()) / 2**20:.1f} MiB")
    return measured


def host_idle_mb(effort: Effort) -> Measured:
    """Proportional set size of a host without a model, with the zygote it shares its pages with, in MiB."""
    measured = Measured()
    with running("--no-demo", "--hosts", "1") as farm:
        for _ in range(effort.rounds):
            measured.samples.append(farm.pss_mb()["host"])
    with running("--no-demo", "--hosts", "2") as farm:
        measured.note(f"a second host adds {farm.pss_mb()['host'] - measured.samples[-1]:.0f} MiB")
    return measured


def load_beside_p99_ratio(effort: Effort) -> Measured:
    """p99 of a warm model while others load over and over on the same host, over its p99 without."""
    measured = Measured()
    with models(3) as folders, _one_host(folders, room_for=2) as farm:
        warm, *others = (path.name for path in folders)
        for model in (*others, warm) * 2:
            _ask_ms(farm, model)
        for beside, alone in in_turns(
            effort,
            lambda: _beside_loads(farm, warm, others, effort),
            lambda: farm.load(2, 8, effort.seconds, "short", warm)["p99_ms"],
        ):
            measured.samples.append(beside / alone)
        measured.note(f"last round: p99 {alone:.1f} ms, beside loads {beside:.1f} ms; one host, 2 callers, 8 texts")
    return measured


@contextmanager
def models(count: int) -> Iterator[Sequence[Path]]:
    """Folders of as many models of the demo's architecture, each with weights of its own."""
    folder = Path(tempfile.mkdtemp(prefix="farmhand-bench-models-"))
    try:
        yield perturbed(folder, count)
    finally:
        rmtree(folder, ignore_errors=True)


@cache
def _zipf(effort: Effort) -> tuple[Measured, Measured]:
    """Both figures of one run."""
    ratio, share = Measured(), Measured()
    count = ZIPF_MODELS if effort.rounds > 2 else ZIPF_QUICK_MODELS
    memory, enough = (str(2 * int(room * model_bytes(_precision()) * SPARE)) for room in (count / ZIPF_SHARE, count))
    with models(count) as folders:
        names, words = tuple(path.name for path in folders), _model_words(folders)
        with (
            running("--no-demo", "--hosts", "2", *words, FARMHAND_DEVICE_MEMORY=enough) as roomy,
            running("--no-demo", "--hosts", "2", *words, FARMHAND_DEVICE_MEMORY=memory) as tight,
        ):
            for farm in (roomy, tight):
                for name in names:
                    _ask_ms(farm, name)
                farm.load(ZIPF_CALLERS, ZIPF_TEXTS, 4 * effort.seconds, "short", *names)
            for texts_a_request in (ZIPF_TEXTS, 1, 8):
                last = _zipf_rounds(effort, roomy, tight, names, texts_a_request)
                if texts_a_request == ZIPF_TEXTS:
                    ratio.samples, share.samples = [one[0] for one in last], [one[1] for one in last]
                    ratio.note(f"{count} models, room for {count // ZIPF_SHARE} a host; last round: {last[-1][2]}")
                else:
                    ratio.note(
                        f"{texts_a_request} texts a request: {median(one[0] for one in last):.2f}; {last[-1][2]}"
                    )
    share.notes = ratio.notes
    return ratio, share


def _zipf_rounds(
    effort: Effort, roomy: Farm, tight: Farm, names: Sequence[str], count: int
) -> list[tuple[float, float, str]]:
    """Of each round the ratio, the share of time spent loading, and a line."""
    found = []

    def swapping() -> tuple[float, float]:
        loads, used = sum(_loads_s(tight)), tight.cpu_s()["host"]
        seen = tight.load(ZIPF_CALLERS, count, effort.seconds, "short", *names)
        return seen["texts_s"], (sum(_loads_s(tight)) - loads) / (tight.cpu_s()["host"] - used)

    for (rate, share), whole in in_turns(
        effort, swapping, lambda: roomy.load(ZIPF_CALLERS, count, effort.seconds, "short", *names)["texts_s"]
    ):
        line = f"{rate:.0f} of {whole:.0f} texts/s, {share:.1%} of the hosts' time spent loading"
        found.append((rate / whole, share, line))
    return found


def _never_seen(farm: Farm, names: Sequence[str]) -> tuple[float, list[float]]:
    """Milliseconds of a resident model, and of each further one above that."""
    first, *others = names
    for _ in range(3):
        _ask_ms(farm, first)
    resident = median(_ask_ms(farm, first) for _ in range(RELOADS))
    return resident, [_ask_ms(farm, model) - resident for model in others]


def _copies(directory: Path) -> int:
    """Kept copies of weights, which are written when the loads are over."""
    return len(list(directory.rglob("copies/*.safetensors")))


def _beside_loads(farm: Farm, warm: str, others: Sequence[str], effort: Effort) -> float:
    stopped = Event()

    def swap() -> None:
        while not stopped.is_set():
            for model in others:
                _ask_ms(farm, model)

    with ThreadPoolExecutor(1) as pool:
        swapping = pool.submit(swap)
        try:
            return float(farm.load(2, 8, effort.seconds, "short", warm)["p99_ms"])
        finally:
            stopped.set()
            swapping.result(30)


@contextmanager
def _one_host(folders: Sequence[Path], *, room_for: int | None = None) -> Iterator[Farm]:
    """A farm of one host, with memory for so many of the models; None: for all."""
    memory = "64GiB" if room_for is None else str(int(room_for * model_bytes(_precision()) * SPARE))
    with running("--no-demo", "--hosts", "1", *_model_words(folders), FARMHAND_DEVICE_MEMORY=memory) as farm:
        yield farm


def _model_words(folders: Sequence[Path]) -> list[str]:
    return [word for path in folders for word in ("--model-dir", str(path))]


def _precision() -> str:
    """What the demo model runs in on this machine."""
    return quick(Device())


def _ask_ms(farm: Farm, model: str = DEMO) -> float:
    """Milliseconds from the request of one short text to its answer."""
    body = msgspec.msgpack.encode({"items": [{"text": texts.short(1)[0]}]})
    connection = HTTPConnection("127.0.0.1", farm.port, timeout=60)
    connection.connect()
    try:
        began = perf_counter()
        connection.request("POST", f"/v1/encode/{model}", body, {"Content-Type": "application/msgpack"})
        answer = connection.getresponse()
        said = answer.read()
        taken_ms = (perf_counter() - began) * 1000
    finally:
        connection.close()
    if answer.status != 200:
        raise RuntimeError(f"{model}: {answer.status} {said[:200]!r}")
    return taken_ms


def _loads_s(farm: Farm) -> list[float]:
    """Seconds of every load so far, as the workers have logged them."""
    lines = [line for log in (farm.data / "logs").glob("worker-*.log") for line in log.read_text().splitlines()]
    found = (_LOAD_S.search(line) or _LOAD_S_FIRST.search(line) for line in lines if "residency_changed" in line)
    return [float(one[1]) for one in found if one]


def _own_mb(farm: Farm) -> float:
    """Anonymous memory of the hosts, in MiB: what they have mapped from files is not counted."""
    zygotes = {process.ppid() for process in farm.processes()["host"]}
    hosts = [process for process in farm.processes()["host"] if process.pid not in zygotes]
    return sum(_anonymous_mb(process) for process in hosts)


def _anonymous_mb(process: psutil.Process) -> float:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024
