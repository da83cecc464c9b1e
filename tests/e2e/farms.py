"""A farm as its operator has it: ``farmhand up`` as a process, seen through its output, its API and its signals."""

import http.client
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from cli.data_dir import why_not_free
from tests.services import free_port, wait_until

ROOT = Path(__file__).resolve().parent.parent.parent
READY_S = 60
STOP_S = 10
MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def farmhand(*words: str, timeout_s: float = 30, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run one command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *words],
        cwd=ROOT,
        env=clean_environment() | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def clean_environment() -> dict[str, str]:
    """This process's, without settings of a farm."""
    return {name: value for name, value in os.environ.items() if not name.startswith("FARMHAND_")}


class UpFarm:
    """One ``farmhand up``."""

    def __init__(self, directory: Path, *words: str, port: int | None = None, **environment: str) -> None:
        self.data = directory / "farm"
        self.port, self.flower_port = port or free_port(), free_port()
        self.output = directory / f"up-{self.port}-{self.flower_port}.log"
        self.words = ["--data-dir", str(self.data), "--port", str(self.port), "--flower-port", str(self.flower_port)]
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cli.main", "up", *self.words, *words],
                cwd=ROOT,
                env=clean_environment() | environment,
                stdout=output,
                stderr=output,
            )

    def wait_ready(self) -> "UpFarm":
        """Until it says so; fails at once if it ended."""

        def is_ready() -> bool:
            assert self.process.poll() is None, f"farmhand up ended:\n{self.said()}"
            return "ready after" in self.said()

        wait_until(is_ready, READY_S, f"the farm to be ready:\n{self.said()}")
        return self

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        """Every process of the farm but the supervisor."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def worker(self) -> psutil.Process:
        """The Celery worker."""
        (worker,) = [one for one in psutil.Process(self.process.pid).children() if "workers.app" in one.cmdline()]
        return worker

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """One request to the API: status and decoded answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = None if body is None else json.dumps(body)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, body=sent, headers={"Content-Type": "application/json", **named})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def encode(self, *texts: str, **headers: str) -> tuple[int, Any]:
        return self.call("POST", f"/v1/encode/{MODEL}", {"items": [{"text": text} for text in texts]}, **headers)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it as an operator would, and prove that nothing of it is left."""
        family = self.family()
        self.process.send_signal(number)
        assert self.process.wait(STOP_S) == 0, self.said()
        left = [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        assert not left, f"outlived the farm: {left}"
        self.assert_no_ports()

    def assert_no_ports(self) -> None:
        kept = json.loads((self.data / "ports.json").read_text()).values()
        taken = [port for port in (self.port, self.flower_port, *kept) if why_not_free("127.0.0.1", port)]
        assert not taken

    def close(self) -> None:
        """Whatever happened, leave nothing."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
