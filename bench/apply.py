"""What it costs to bring a whole catalogue into the config DB with ``farmhand config apply``."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from shutil import rmtree
from time import monotonic
from typing import Final

from bench.figures import Effort, Measured
from config_db.config_files import read_files
from config_db.export import file_paths, model_yaml
from config_db.spec import Limits, ModelSpec, Profile, Source
from tests.services import PostgresServer

ROOT: Final = Path(__file__).resolve().parent.parent
MODELS: Final = 1000


def apply1000_s(effort: Effort) -> Measured:
    """The command, from its start to its end: 1000 files, one model each, an empty database; in s."""
    measured = Measured()
    folder = Path(tempfile.mkdtemp(prefix="farmhand-bench-config-"))
    server = PostgresServer()
    try:
        _write_models(folder)
        for _ in range(effort.rounds):
            url = server.fresh_database()
            began = monotonic()
            _apply(folder, url)
            measured.samples.append(monotonic() - began)
        began = monotonic()
        _apply(folder, url)
        measured.note(f"once more, with nothing to change: {monotonic() - began:.2f} s")
        began = monotonic()
        read_files(folder)
        measured.note(f"of it reading and checking the files: {monotonic() - began:.2f} s")
    finally:
        server.remove()
        rmtree(folder, ignore_errors=True)
    return measured


def _write_models(folder: Path) -> None:
    specs = [_model(number) for number in range(MODELS)]
    paths = file_paths(specs)
    for spec in specs:
        path = folder / paths[spec.id]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(model_yaml(spec), encoding="utf-8")


def _apply(folder: Path, url: str) -> None:
    command = [sys.executable, "-m", "cli.main", "config", "apply", str(folder)]
    environment = os.environ | {"FARMHAND_DATABASE_URL": url}
    subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=True)


def _model(number: int) -> ModelSpec:
    """As large as one that a person has written with care."""
    return ModelSpec(
        id=f"bench/model-{number:04}",
        family="dense",
        source=Source(hub=f"bench/model-{number:04}", revision=f"{number:040x}"),
        aliases=(f"model-{number:04}",),
        dims={"dense": 384},
        max_length=512,
        pooling="mean",
        normalize=True,
        prompts={"query": "query: ", "document": "passage: "},
        profiles={"short": Profile(max_length=64)},
        limits=Limits(max_items=256, queue_limit=10_000),
    )
