"""The client in processes of other kinds: greenlets, and children of a fork."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.client import FarmClient
from tests.integration.test_client import call_for, vectors
from tests.standin import StandIn, vector_of

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
GREENLETS = """
from gevent import monkey
monkey.patch_all()
import sys
import gevent
from tasks.client import FarmClient
from tests.integration.test_client import call_for, vectors
from tests.standin import vector_of
client = FarmClient(sys.argv[1], queue_limit=1000, result_ttl_s=60)
def one(at):
    assert vectors(client.run(call_for(f"text {at}"))) == [vector_of(f"text {at}")]
    return True
jobs = [gevent.spawn(one, at) for at in range(500)]
gevent.joinall(jobs, timeout=20, raise_error=True)
assert all(job.value for job in jobs)
jobs = [gevent.spawn(client.run, call_for(f"text {at}")) for at in range(50)]
gevent.sleep(0)
gevent.killall(jobs)
assert client.waiting == 0, client.waiting
client.close()
"""


@pytest.fixture
def standin(redis_url: str) -> StandIn:
    return StandIn(redis_url).start()


def test_greenlets_each_get_their_own_outcome_and_killed_ones_leave_no_waiter(redis_url: str, standin: StandIn) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GREENLETS, redis_url], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    standin.stop()
    assert done.returncode == 0, done.stderr


def test_a_client_used_before_a_fork_works_on_both_sides_of_it(redis_url: str, standin: StandIn) -> None:
    client = FarmClient(redis_url, queue_limit=1000, result_ttl_s=60)
    client.run(call_for("before"))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if vectors(client.run(call_for("child"))) == [vector_of("child")] else 2
        finally:
            os._exit(status)
    assert vectors(client.run(call_for("parent"))) == [vector_of("parent")]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    client.close()
    standin.stop()
