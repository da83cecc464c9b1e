"""Supervision of trivial children. Each supervisor is a process of its own: it takes signals, kills descendants."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic

import psutil
import pytest

from tests.services import wait_until

DRIVER = """
import json, os, sys
from pathlib import Path
from cli import supervisor as supervision
from cli.data_dir import DataDir
from cli.screen import Screen
from cli.supervisor import Stage, Supervisor, Unit
from common.errors import SetupError

supervision.SAY_AGAIN_S = 0.2
directory, children = Path(sys.argv[1]), json.loads(sys.argv[2])
try:
    with DataDir(directory) as data:
        data.take(url="")
        data.await_orphans()
        with Supervisor(data, Screen()) as supervisor:
            for name, (code, stage) in children.items():
                supervisor.add(Unit(
                    name=name,
                    doing=name,
                    command=lambda code=code: [sys.executable, "-c", code],
                    environment=dict(os.environ),
                    stage=Stage[stage],
                    is_ready=lambda _, name=name: (directory / name).exists(),
                ))
            supervisor.run(until=lambda: all(map(supervisor.is_ready, children)))
            supervisor.be_up()
            print("up", flush=True)
            supervisor.run(until=lambda: False)
except SetupError as error:
    sys.exit(error.message)
"""
OBEYS = """
import pathlib, signal, sys
def end(*_):
    with open("ended", "a") as file: file.write("{name} ")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
pathlib.Path("{name}").touch()
while True: signal.pause()
"""
IGNORES = """
import pathlib, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path("{name}").touch()
while True: signal.pause()
"""
WAITS = """
import json, signal
print(json.dumps({"event": "not_ready", "reason": "the seventh cow"}), flush=True)
while True: signal.pause()
"""
FAILS = "import sys; sys.exit('the disk is on fire')"

Start = Callable[..., "Driven"]


class Driven:
    """One supervisor process."""

    def __init__(self, directory: Path, children: dict[str, tuple[str, str]]) -> None:
        self.directory = directory
        named = {name: (code.replace("{name}", name), stage) for name, (code, stage) in children.items()}
        self.output = directory / "output"
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, str(directory), json.dumps(named)],
                cwd=directory,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdout=output,
                stderr=output,
            )

    def wait_up(self) -> None:
        wait_until(lambda: "up" in self.said().splitlines(), 10, f"the children to be up: {self.said()}")

    def said(self) -> str:
        return self.output.read_text()

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Driven] = []

    def make(**children: tuple[str, str]) -> Driven:
        started.append(Driven(tmp_path, children))
        return started[-1]

    yield make
    for one in started:
        with suppress(ProcessLookupError):
            one.process.kill()
        one.process.wait(10)


def test_a_child_that_dies_is_started_again_with_one_line(start: Start) -> None:
    driven = start(worker=(OBEYS, "SERVING"))
    driven.wait_up()
    (child,) = driven.children()
    child.kill()
    wait_until(lambda: [one.pid for one in driven.children()] not in ([], [child.pid]), 20, "another child")
    (line,) = [line for line in driven.said().splitlines() if line.startswith("worker")]
    assert line.startswith(f"worker (pid {child.pid}) was ended by SIGKILL; starting it again in 0.5 s; its log: ")
    assert Path(line.partition("its log: ")[2]).exists()


def test_a_child_that_dies_again_waits_twice_as_long(start: Start) -> None:
    driven = start(worker=(OBEYS, "SERVING"))
    driven.wait_up()
    for wait in ("0.5 s", "1 s"):
        wait_until(driven.children, 20, "a child")
        (child,) = driven.children()
        child.kill()
        said = f"(pid {child.pid}) was ended by SIGKILL; starting it again in {wait};"
        wait_until(lambda said=said: said in driven.said(), 20, said)


def test_what_serves_ends_before_what_stores(start: Start) -> None:
    driven = start(redis=(OBEYS, "STORING"), worker=(OBEYS, "SERVING"), web=(OBEYS, "SERVING"))
    driven.wait_up()
    children = driven.children()
    driven.process.send_signal(signal.SIGTERM)
    assert driven.process.wait(10) == 0
    order = (driven.directory / "ended").read_text().split()
    assert sorted(order[:2]) == ["web", "worker"]
    assert order[2:] == ["redis"]
    assert not any(child.is_running() for child in children)


def test_a_second_signal_ends_what_does_not_listen(start: Start) -> None:
    driven = start(worker=(IGNORES, "SERVING"))
    driven.wait_up()
    (child,) = driven.children()
    driven.process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        driven.process.wait(0.5)
    asked_at = monotonic()
    driven.process.send_signal(signal.SIGINT)
    driven.process.wait(10)
    assert monotonic() - asked_at < 4
    assert not child.is_running()


def test_whatever_does_not_listen_is_gone_within_ten_seconds(start: Start) -> None:
    driven = start(worker=(IGNORES, "SERVING"), redis=(IGNORES, "STORING"))
    driven.wait_up()
    children = driven.children()
    asked_at = monotonic()
    driven.process.send_signal(signal.SIGTERM)
    assert driven.process.wait(10) == 0
    assert monotonic() - asked_at > 7  # a running batch was given its time
    assert len(children) == 2
    assert not any(child.is_running() for child in children)


def test_children_die_with_a_killed_supervisor(start: Start) -> None:
    driven = start(worker=(IGNORES, "SERVING"), redis=(IGNORES, "STORING"))
    driven.wait_up()
    children = driven.children()
    assert len(children) == 2
    driven.process.kill()
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive


def test_a_child_that_takes_long_says_what_it_waits_for(start: Start) -> None:
    driven = start(worker=(WAITS, "SERVING"))
    wait_until(
        lambda: driven.said().splitlines() == ["  ... worker", "  ... worker: the seventh cow"], 20, "both lines"
    )


def test_a_farm_that_cannot_start_says_why_in_one_line_and_leaves_nothing(start: Start) -> None:
    driven = start(redis=(OBEYS, "STORING"), web=(FAILS, "SERVING"))
    assert driven.process.wait(10) == 1
    said = driven.said().splitlines()
    assert len(said) == 1
    assert said[0].startswith("web ended with status 1: the disk is on fire")
    assert (driven.directory / "children.json").read_text() == "{}"
