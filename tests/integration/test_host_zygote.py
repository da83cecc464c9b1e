"""The zygote as a process: what it may do, what ends it, and that nothing outlives it or its worker."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.hosts import LivePool, code, is_running
from tests.services import wait_until

ROOT = Path(__file__).parents[2]


def test_the_zygote_runs_no_thread_and_hosts_are_killed_first(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool()
    host = live.process(live.ready()[0].id)
    zygote = host.parent()
    assert zygote is not None
    assert zygote.num_threads() == 1
    score = {process.pid: int(Path(f"/proc/{process.pid}/oom_score_adj").read_text()) for process in (host, zygote)}
    assert score[host.pid] == 800 > score[zygote.pid]


def test_hosts_ignore_the_signals_of_a_terminal(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool()
    host = live.ready()[0].id
    process = live.process(host)
    zygote = process.parent()
    assert zygote is not None
    for signum in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(signum)
        zygote.send_signal(signum)
    assert code(live.run(host, live.spec(), "still here")[0]) is None


def test_a_killed_zygote_takes_its_hosts_and_comes_back(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool(hosts=2)
    first, second = live.ready(2)
    spec = live.spec()
    live.run(first.id, spec, "warm")
    running = live.send(first.id, spec, "!sleep:30")
    live.computing(first.id, running)
    hosts = [live.process(first.id), live.process(second.id)]
    zygote = hosts[0].parent()
    assert zygote is not None
    zygote.kill()
    live.until(lambda: len(live.events.lost) == 2, "losses")
    assert sorted(loss[0] for loss in live.events.lost) == [first.id, second.id]
    assert next(loss for loss in live.events.lost if loss[0] == first.id)[1] == [running]
    fresh = live.ready(2)
    assert not {view.id for view in fresh} & {first.id, second.id}
    wait_until(lambda: not any(map(is_running, hosts)), 20, "end of the hosts")
    assert code(live.run(fresh[0].id, spec, "back")[0]) is None


WORKER = """
import psutil
from kombu.asynchronous.hub import Hub
from tests.fakes.family import PLACE
from workers.hosts.config import HostConfig
from workers.hosts.pool import HostPool

class Events:
    def on_host_ready(self, host):
        if len(pool.hosts()) == 2:
            print("pids", *(child.pid for child in psutil.Process().children(recursive=True)), flush=True)

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
        wait_until(lambda: not any(map(is_running, children)), 20, "end of zygote and hosts")
