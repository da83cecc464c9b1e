"""What dies under ``farmhand up``, which has one worker: one farm, struck again and again with 200 requests in flight.

The requests are published with the real script and their outcomes counted as they stand in Redis. Each strike is made
at a running batch and a queue that is not empty.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic

import psutil
import pytest
import redis
from sqlalchemy.exc import OperationalError

from cli import local_farm
from tasks import names
from tests.e2e.farms import UpFarm
from tests.fakes.family import PLACE
from tests.live import FAKE, LiveFarm, fake_spec
from tests.services import wait_until

SLOW = "fake/slow"
REQUESTS = 200
GRACE_S = 7
"""How long a running batch is waited for when the farm is to end."""

pytestmark = pytest.mark.timeout(120)


class Struck:
    """The farm, and what the tests send it past its API."""

    def __init__(self, up: UpFarm, live: LiveFarm) -> None:
        self.up = up
        self.live = live

    @property
    def worker_log(self) -> str:
        return (self.up.data / "logs" / "worker-1.log").read_text(errors="replace")

    def incarnation(self) -> str:
        """Under which the worker lives now; empty if it has told of none."""
        found = self.live.incarnations().items()
        return next((one for one, told in found if told["pid"] == self.up.worker().pid and told["alive"]), "")

    def is_at_work(self) -> bool:
        """Whether a batch runs and more waits."""
        started = self.live.redis.hlen(names.started(self.incarnation()))
        return started > 0 and self.live.waiting() > 0

    def hosts(self) -> list[int]:
        worker = self.up.worker()
        return [child.pid for child in worker.children(recursive=True) if child.ppid() != worker.pid]

    def child(self, word: str) -> psutil.Process:
        """The child whose command begins with a program of this name."""
        children = psutil.Process(self.up.process.pid).children()
        (found,) = [one for one in children if Path(one.cmdline()[0].split(" ")[0]).name.startswith(word)]
        return found

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Strike in the block: afterwards each request has one good answer, and the farm serves a caller."""
        tasks = self.live.send_many([f"{n}" for n in range(REQUESTS)], model=SLOW)
        wait_until(self.is_at_work, 10, "a running batch and a queue that is not empty")
        yield
        outcomes = self.live.wait_outcomes(tasks, timeout_s=40)
        assert {outcome.state for outcome in outcomes} == {"succeeded"}
        self.live.assert_settled()
        wait_until(self.serves, 20, "an answer to a caller")

    def serves(self) -> bool:
        with suppress(OSError):
            status, _ = self.up.call("POST", f"/v1/encode/{FAKE}", {"items": [{"text": "again"}]})
            return status == 200
        return False

    def kill(self, victim: psutil.Process) -> None:
        victim.kill()
        wait_until(lambda: f"(pid {victim.pid}) was ended by SIGKILL" in self.up.said(), 10, "the line that says so")


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Struck]:
    """Ended by its last test."""
    directory = tmp_path_factory.mktemp("up")
    settings = {
        "EXTRA_FAMILIES": f"fake={PLACE}",
        "PRELOAD_FAMILIES": "",
        "MODEL_DIRS": "/",
        "CONFIG_POLL_S": "0.2",
        "INTAKE_MAX_MESSAGES": "100",
        "HANG_FLOOR_S": "60",
    }
    words = ("--no-demo", "--no-flower", "--hosts", "1")
    up = UpFarm(directory, *words, **{f"FARMHAND_{name}": value for name, value in settings.items()})
    live = None
    try:
        up.wait_ready()
        live = LiveFarm(local_farm.redis_url(up.data), local_farm.database_url(up.data), directory)
        live.add_models(fake_spec(), fake_spec(SLOW, item_ms=10))
        struck = Struck(up, live)
        wait_until(struck.serves, 20, "the models to be known")
        yield struck
    finally:
        if live is not None:
            live.close()
        up.close()


def test_a_killed_worker_is_succeeded(farm: Struck) -> None:
    former = farm.incarnation()
    with farm.at_work():
        farm.kill(farm.up.worker())
        assert farm.live.redis.hlen(names.unacked(former)) > 0
    assert farm.incarnation() != former


def test_a_killed_host_is_replaced(farm: Struck) -> None:
    worker, hosts = farm.up.worker().pid, farm.hosts()
    with farm.at_work():
        psutil.Process(hosts[0]).kill()
    assert set(farm.hosts()).isdisjoint(hosts)
    assert farm.up.worker().pid == worker


def test_a_frozen_worker_thaws_under_a_new_name(farm: Struck) -> None:
    worker, former = farm.up.worker(), farm.incarnation()
    with farm.at_work():
        worker.suspend()
        wait_until(lambda: not farm.live.redis.exists(names.beat(former)), 10, "its heartbeat to expire")
        assert farm.live.redis.hlen(names.unacked(former)) > 0
        worker.resume()
    assert farm.up.worker() == worker
    assert farm.incarnation() != former


def test_a_killed_redis_comes_back_with_all_it_held(farm: Struck) -> None:
    worker, victim = farm.up.worker(), farm.child("redis-server")
    with farm.at_work():
        farm.kill(victim)
        wait_until(lambda: _answers(farm.live), 10, "Redis again")
    assert farm.child("redis-server").pid != victim.pid
    assert farm.up.worker() == worker


def test_a_killed_postgres_is_not_missed(farm: Struck) -> None:
    worker, victim = farm.up.worker(), farm.child("postgres")
    said = len(farm.worker_log)
    with farm.at_work():
        farm.kill(victim)
        wait_until(lambda: "epochs_not_heard" in farm.worker_log[said:], 10, "the worker to notice")
    assert farm.up.worker() == worker
    wait_until(lambda: _takes_a_model(farm.live), 10, "Postgres again")
    later = [farm.live.send("x", model="fake/later")]
    assert farm.live.wait_outcomes(later)[0].state == "succeeded"


def test_a_batch_that_never_ends_holds_up_the_end_for_its_grace_only(farm: Struck) -> None:
    """Nothing outlives the farm, and its end comes within 10 s, as ``UpFarm.stop`` asserts of every farm."""
    farm.live.send("!hang")
    wait_until(lambda: farm.live.redis.hlen(names.started(farm.incarnation())) == 1, 10, "the hang to be running")
    asked_at = monotonic()
    farm.up.stop(signal.SIGTERM)
    assert monotonic() - asked_at > GRACE_S - 1, "it did not wait for the running batch"


def _answers(live: LiveFarm) -> bool:
    with suppress(redis.RedisError):
        return bool(live.redis.ping())
    return False


def _takes_a_model(live: LiveFarm) -> bool:
    with suppress(OperationalError):
        live.add_models(fake_spec("fake/later"))
        return True
    return False
