"""The farm under measurement: started as ``make run`` does, its processes told apart by their command lines."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from time import monotonic, sleep
from typing import Any

import httpx
import psutil
from sqlalchemy.orm import Session

from config_db.catalog import apply_models
from config_db.engine import open_engine
from config_db.spec import ModelSpec
from tests.services import free_port, wait_until
from workers.host.families.protocol import Device
from workers.host.precision import candidates

ROOT = Path(__file__).resolve().parent.parent
DEMO = "sentence-transformers/all-MiniLM-L6-v2"
IDLE_SHARE, LOOK_S = 0.25, 0.5
"""A farm rests when its processes together use less than this share of a core for so long."""
ROLES = {
    "workers.host.main": "host",
    "workers.app": "worker",
    "gunicorn": "web",
    "redis": "redis",
    "flower": "flower",
    "postgres": "postgres",
}


@dataclass
class Farm:
    """One running ``farmhand up``."""

    process: "subprocess.Popen[bytes]"
    port: int
    flower_port: int
    data: Path
    output: Path

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Its processes by role."""
        found: dict[str, list[psutil.Process]] = defaultdict(list)
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                line = " ".join(child.cmdline()) or child.name()
                found[next((role for word, role in ROLES.items() if word in line), "other")].append(child)
        return found

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds used so far, by role."""
        return {role: sum(map(cpu_s, processes)) for role, processes in self.processes().items()}

    def pss_mb(self) -> dict[str, float]:
        """Proportional set size by role, in MiB; the supervisor is ``up``."""
        found = {role: sum(map(_pss_mb, processes)) for role, processes in self.processes().items()}
        return {**found, "up": _pss_mb(psutil.Process(self.process.pid))}

    def settle(self) -> None:
        """Wait until nothing of the start is under way: Flower comes last, and what came up rests."""
        wait_until(self._has_flower, 30, "Flower to answer")
        used = sum(self.cpu_s().values())

        def rests() -> bool:
            nonlocal used
            before, began = used, monotonic()
            sleep(LOOK_S)
            used = sum(self.cpu_s().values())
            return used - before < IDLE_SHARE * (monotonic() - began)

        wait_until(rests, 30, "the farm to rest")

    def _has_flower(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{self.flower_port}/healthcheck").is_success
        return False

    def precision(self) -> str:
        """What the models of default precision run in, once one is loaded: the host may have refused the quick one."""
        refused = any("precision_refused" in log.read_text() for log in (self.data / "logs").glob("worker-*.log"))
        return "float32" if refused else candidates("auto", Device())[0]

    def load(self, callers: int, count: int, seconds: float, kind: str = "short", *models: str) -> dict[str, Any]:
        """Run the load generator; adds the farm's CPU milliseconds a request, by role, as ``cpu_ms``."""
        words = [str(word) for word in (self.port, callers, count, seconds, kind, ",".join(models or (DEMO,)))]
        before = self.cpu_s()
        ran = subprocess.run([sys.executable, "-m", "bench.load", *words], cwd=ROOT, capture_output=True, check=True)
        after = self.cpu_s()
        found: dict[str, Any] = json.loads(ran.stdout)
        if found["failed"] or not found["requests"]:
            raise RuntimeError(f"{found['failed']} requests failed, {found['requests']} succeeded")
        used = {role: after[role] - before.get(role, 0.0) for role in after} | {"load": found["cpu_s"]}
        found["cpu_ms"] = {role: seconds * 1000 / found["answered"] for role, seconds in used.items()}
        return found

    def publish(self, specs: Sequence[ModelSpec], *, prune: bool = False) -> None:
        """Serve further models, with ``prune`` only these; returns when the API knows them."""
        environment = self.processes()["worker"][0].environ()
        engine = open_engine(environment["FARMHAND_DATABASE_URL"])
        with Session(engine) as session, session.begin():
            apply_models(session, specs, actor="bench", reason="bench", prune=prune)
        engine.dispose()
        url = f"http://127.0.0.1:{self.port}/v1/models/{specs[-1].id}"
        wait_until(lambda: httpx.get(url).status_code == 200, 20, f"the API to know {specs[-1].id}")


@contextmanager
def running(*words: str, data: Path | None = None, **environment: str) -> Iterator[Farm]:
    """A farm of its own ports and data for the length of the block."""
    directory = Path(tempfile.mkdtemp(prefix="farmhand-bench-"))
    farm = start(data or directory / "data", directory, *words, **environment)
    try:
        farm.settle()
        yield farm
    finally:
        stop(farm)
        rmtree(directory, ignore_errors=True)


def start(data: Path, directory: Path, *words: str, **environment: str) -> Farm:
    """Start a farm and wait until it says that it is ready."""
    port, flower_port, output = free_port(), free_port(), directory / f"up-{monotonic()}.log"
    command = [sys.executable, "-m", "cli.main", "up", "--port", str(port), "--flower-port", str(flower_port)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FARMHAND_")}
    with output.open("wb") as log:
        process = subprocess.Popen(
            [*command, "--data-dir", str(data), *words], cwd=ROOT, env=clean | environment, stdout=log, stderr=log
        )
    farm = Farm(process, port, flower_port, data, output)

    def is_ready() -> bool:
        text = output.read_text()
        if process.poll() is not None:
            raise RuntimeError(f"the farm did not start:\n{text}")
        return "ready after" in text

    try:
        wait_until(is_ready, 120, f"the farm to be ready; see {output}")
    except BaseException:
        stop(farm)
        raise
    return farm


def stop(farm: Farm) -> None:
    """End a farm, if it still runs."""
    farm.process.send_signal(signal.SIGTERM)
    farm.process.wait(20)


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds that a process has used; none if it is gone."""
    with suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def _pss_mb(process: psutil.Process) -> float:
    with suppress(OSError, psutil.Error):
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    return 0.0
