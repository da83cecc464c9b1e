"""What many adapters on one base cost against one: the demo model with tiny random adapters that peft has made."""

import tempfile
from pathlib import Path
from shutil import rmtree
from typing import Any, Final

import msgspec

from bench.ceilings import demo_folder
from bench.farm import running
from bench.figures import Effort, Measured, in_turns, shares
from config_db.model_folders import spec_of_directory
from config_db.spec import ModelSpec, Source

MODEL: Final = "bench/adapted"
COUNT: Final = 8
RANK: Final = 8
TARGETS: Final = ("query", "value")


def adapters8_ratio(effort: Effort) -> Measured:
    """64 callers x 1 short text, each request for one of 8 adapters, uniform: texts per second over all for one."""
    measured = Measured()
    folder = Path(tempfile.mkdtemp(prefix="farmhand-bench-adapters-"))
    try:
        names = _make(folder)
        with running(FARMHAND_MODEL_DIRS=str(folder)) as farm:
            farm.publish([_spec(folder, names)])
            many, one = [f"{MODEL}#{name}" for name in names], [f"{MODEL}#{names[0]}"]
            farm.load(16, 8, 3, "short", *many)
            farm.load(16, 8, 3, "short", MODEL)
            for among, alone in in_turns(
                effort,
                lambda: farm.load(64, 1, effort.seconds, "short", *many),
                lambda: farm.load(64, 1, effort.seconds, "short", *one),
            ):
                measured.samples.append(among["texts_s"] / alone["texts_s"])
            bare = farm.load(64, 1, effort.seconds, "short", MODEL)
            measured.note(
                f"{farm.precision()}, rank {RANK} on {' and '.join(TARGETS)}; last round: {_rates(among, alone)}"
            )
            measured.note(
                f"without an adapter {bare['texts_s']:.0f} texts/s; 8 adapters, ms: {shares(among['cpu_ms'])}"
            )
            among, alone = (farm.load(16, 32, effort.seconds, "short", *each) for each in (many, one))
            measured.note(f"32 texts a request, 16 callers: {_rates(among, alone)}")
    finally:
        rmtree(folder, ignore_errors=True)
    return measured


def _rates(among: dict[str, Any], alone: dict[str, Any]) -> str:
    ratio = among["texts_s"] / alone["texts_s"]
    return f"{COUNT} adapters {among['texts_s']:.0f}, one {alone['texts_s']:.0f} texts/s, {ratio:.2f}"


def _make(folder: Path) -> list[str]:
    """Adapters in folders of their own names."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    names = [f"adapter{number}" for number in range(COUNT)]
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=list(TARGETS), init_lora_weights=False)
        get_peft_model(AutoModel.from_pretrained(demo_folder()), config).save_pretrained(str(folder / name))
    return names


def _spec(folder: Path, names: list[str]) -> ModelSpec:
    adapters = {name: Source(path=str(folder / name)) for name in names}
    return msgspec.structs.replace(spec_of_directory(demo_folder()), id=MODEL, adapters=adapters)
