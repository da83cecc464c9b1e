"""The figures by name: what each measures. A figure returns its samples, one a round, and what stands beside it."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree, rmtree
from statistics import median
from time import monotonic
from typing import Any, TypeVar

import msgspec
from safetensors.torch import load_file, save_file

from bench.ceilings import Ceilings, ceilings, demo_folder
from bench.farm import DEMO, Farm, running, start, stop
from config_db.model_folders import spec_of_directory
from config_db.spec import ModelSpec

One = TypeVar("One")
Other = TypeVar("Other")
FP32 = "bench/fp32"
EVICTED_MODELS, ROOM_FOR = 12, 6
SPARE = 1.02
"""Room beyond the bare weights."""
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass
class Measured:
    """The samples of one figure and a line that says how they came about."""

    samples: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Say something beside the figure, once."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int
    seconds: float


Figure = Callable[[Effort], Measured]


def list32_ratio(effort: Effort) -> Measured:
    """Requests of 32 short texts, 16 callers: texts per second over the ceiling's."""
    return _ratio(effort, DEMO, "short", callers=16, count=32)


def single64_ratio(effort: Effort) -> Measured:
    """Requests of 1 short text, 64 callers, default precision: over the ceiling's."""
    return _ratio(effort, DEMO, "short", callers=64, count=1)


def single64_fp32_ratio(effort: Effort) -> Measured:
    """The same in float32 on both sides."""
    return _ratio(effort, FP32, "short", callers=64, count=1)


def mixed32_ratio(effort: Effort) -> Measured:
    """Requests of 32 texts of mixed length, 16 callers: over the ceiling's."""
    return _ratio(effort, DEMO, "mixed", callers=16, count=32)


def busy_core_ratio(effort: Effort) -> Measured:
    """Rate at 64 x 1 with one foreign busy core, over the quiet rate of the same round."""
    measured = Measured()
    with running() as farm:
        _warm(farm)
        for busy, quiet in in_turns(
            effort, lambda: _beside_a_busy_core(farm, effort), lambda: farm.load(64, 1, effort.seconds)
        ):
            measured.samples.append(busy["texts_s"] / quiet["texts_s"])
        rates = f"{busy['texts_s']:.0f} of {quiet['texts_s']:.0f} texts/s"
        measured.note(f"{farm.precision()}; last round: {rates}; busy, ms: {_shares(busy)}")
    return measured


def cpu_ms_per_request(effort: Effort) -> Measured:
    """CPU of web, worker and Redis for a request of 1 text, 64 callers, events on, in ms."""
    measured = Measured()
    with running() as farm:
        _warm(farm)
        for _ in range(effort.rounds):
            seen = farm.load(64, 1, effort.seconds)
            measured.samples.append(sum(seen["cpu_ms"][role] for role in ("web", "worker", "redis")))
        measured.note(f"{farm.precision()}; ms: {_shares(seen)}")
    return measured


def overhead_ms_p50(effort: Effort) -> Measured:
    """Latency above the model's own time (tokenising, inference, writing), 1 caller, median, in ms."""
    measured = Measured()
    with running() as farm:
        _warm(farm)
        for _ in range(effort.rounds):
            seen = farm.load(1, 1, effort.seconds)
            measured.samples.append(seen["above_model_ms"])
        latencies = f"p50 {seen['p50_ms']:.1f} ms, p99 {seen['p99_ms']:.1f} ms"
        measured.note(f"{farm.precision()}; {latencies}; ms: {_shares(seen)}")
    return measured


def evict12_ratio(effort: Effort) -> Measured:
    """12 models, device memory for 6, Zipf, requests of 32 short texts, 16 callers: over all resident."""
    measured = Measured()
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="farmhand-bench-models-"))
        stack.callback(rmtree, folder, ignore_errors=True)
        words = [word for path in perturbed(folder) for word in ("--model-dir", str(path))]
        models = tuple(path.name for path in sorted(folder.iterdir()))
        roomy = stack.enter_context(running("--no-demo", "--hosts", "2", *words))
        _warm(roomy, models[0])
        memory = str(int(ROOM_FOR * model_bytes(roomy.precision()) * SPARE))
        tight = stack.enter_context(running("--no-demo", "--hosts", "2", *words, FARMHAND_DEVICE_MEMORY=memory))
        for farm in (roomy, tight):
            farm.load(16, 32, 4 * effort.seconds, "short", *models)
        for less, whole in in_turns(
            effort,
            lambda: tight.load(16, 32, effort.seconds, "short", *models),
            lambda: roomy.load(16, 32, effort.seconds, "short", *models),
        ):
            measured.samples.append(less["texts_s"] / whole["texts_s"])
        rates = f"{less['texts_s']:.0f} of {whole['texts_s']:.0f} texts/s"
        measured.note(f"{roomy.precision()}; last round: {rates}; with eviction, ms: {_shares(less)}")
        measured.note(f"all resident, ms: {_shares(whole)}")
        ones = [farm.load(16, 1, effort.seconds, "short", *models)["texts_s"] for farm in (tight, roomy)]
        measured.note(f"1 text a request: {ones[0]:.0f} of {ones[1]:.0f} texts/s, {ones[0] / ones[1]:.2f}")
    return measured


def start_s(effort: Effort) -> Measured:
    """Seconds from the second ``farmhand up`` to ready, demo model answered."""
    measured = Measured()
    directory = Path(tempfile.mkdtemp(prefix="farmhand-bench-"))
    try:
        stop(start(directory / "data", directory))
        for _ in range(effort.rounds):
            began = monotonic()
            farm = start(directory / "data", directory)
            measured.samples.append(monotonic() - began)
            stop(farm)
    finally:
        rmtree(directory, ignore_errors=True)
    return measured


def farm_idle_mb(effort: Effort) -> Measured:
    """Proportional set size of the whole idle farm with one model loaded, in MiB."""
    measured = Measured()
    with running() as farm:
        for _ in range(effort.rounds):
            found = farm.pss_mb()
            measured.samples.append(sum(found.values()))
        measured.note(", ".join(f"{role} {size:.0f}" for role, size in sorted(found.items())))
    return measured


def growth(effort: Effort) -> Measured:
    """Rate with 1000 models registered over the rate with one; beside it growth with callers and texts a request."""
    measured = Measured()
    model, *others = (msgspec.structs.replace(spec_of_directory(demo_folder()), id=f"bench/{n}") for n in range(1000))
    with running() as farm:
        farm.publish([model], prune=True)
        _warm(farm, model.id)
        measured.note(farm.precision())
        for callers in (1, 4, 16, 64, 256):
            seen = farm.load(callers, 1, effort.seconds, "short", model.id)
            measured.note(f"{callers} callers x 1: {seen['texts_s']:.0f} texts/s, p50 {seen['p50_ms']:.1f} ms")
        for count in (1, 4, 16, 64, 256):
            seen = farm.load(4, count, effort.seconds, "short", model.id)
            measured.note(f"4 callers x {count}: {seen['texts_s']:.0f} texts/s, p50 {seen['p50_ms']:.1f} ms")
        rates = {}
        for total in (1, 10, 100, 1000):
            farm.publish([model, *others[: total - 1]])
            seen = farm.load(64, 1, effort.seconds, "short", model.id)
            rates[total] = seen["texts_s"]
            measured.note(f"{total} models registered, 64 x 1: {rates[total]:.0f} texts/s; ms: {_shares(seen)}")
        measured.samples.append(rates[1000] / rates[1])
    return measured


def _ratio(effort: Effort, model: str, kind: str, *, callers: int, count: int) -> Measured:
    """Interleaved rounds of ceiling and farm, in the precision that the farm runs the model in."""
    measured = Measured()
    with ExitStack() as stack:
        farm = stack.enter_context(running())
        if model == FP32:
            farm.publish([_fp32()])
        _warm(farm, model)
        precision = "float32" if model == FP32 else farm.precision()
        ceiling = stack.enter_context(ceilings(precision))
        for seen, top in in_turns(
            effort,
            lambda: farm.load(callers, count, effort.seconds, kind, model),
            lambda: ceiling.run(kind, effort.seconds),
        ):
            measured.samples.append(seen["texts_s"] / top)
        rates = f"farm {seen['texts_s']:.0f}, ceiling {top:.0f} texts/s"
        measured.note(f"{precision}; last round: {rates}; ms: {_shares(seen)}")
        measured.note(_library(ceiling, effort))
    return measured


def in_turns(effort: Effort, one: Callable[[], One], other: Callable[[], Other]) -> Iterator[tuple[One, Other]]:
    """Both in every round; each goes first in every second one, so that neither gains by its place."""
    for place in range(effort.rounds):
        if place % 2:
            first = one()
            yield first, other()
        else:
            second = other()
            yield one(), second


def _beside_a_busy_core(farm: Farm, effort: Effort) -> dict[str, Any]:
    """A load of 64 x 1 while a foreign process does nothing but use a core."""
    foreign = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        return farm.load(64, 1, effort.seconds)
    finally:
        foreign.kill()
        foreign.wait()


def _library(ceiling: Ceilings, effort: Effort) -> str:
    return (
        f"SentenceTransformer.encode, float32, short texts by 32: {ceiling.run('library', effort.seconds):.0f} texts/s"
    )


def _warm(farm: Farm, model: str = DEMO) -> None:
    """Let every host load the model before anything counts."""
    farm.load(16, 8, 3, "short", model)


def _fp32() -> ModelSpec:
    return msgspec.structs.replace(spec_of_directory(demo_folder()), id=FP32, precision="float32")


def _shares(seen: dict[str, Any]) -> str:
    return shares(seen["cpu_ms"])


def shares(cpu_ms: Mapping[str, float]) -> str:
    """CPU milliseconds a request by role, as a line."""
    return ", ".join(f"{role} {used:.3g}" for role, used in sorted(cpu_ms.items()) if used >= 0.005)


def model_bytes(precision: str) -> int:
    """What one resident demo model holds."""
    weights = load_file(demo_folder() / "model.safetensors").values()
    return ITEM_BYTES[precision] * sum(tensor.numel() for tensor in weights if tensor.is_floating_point())


def perturbed(folder: Path, count: int = EVICTED_MODELS) -> Sequence[Path]:
    """The demo model with different weights, some times over, each in files of its own."""
    made = []
    for place in range(count):
        path = folder / f"model-{place:03}"
        copytree(demo_folder(), path)
        weights = load_file(path / "model.safetensors")
        for tensor in weights.values():
            if tensor.is_floating_point():
                tensor.mul_(1 + place / 1000)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        made.append(path)
    return made


def spread(samples: Sequence[float]) -> float:
    """Half the distance between the extremes, over the median."""
    return (max(samples) - min(samples)) / 2 / median(samples) if len(samples) > 1 and median(samples) else 0.0
