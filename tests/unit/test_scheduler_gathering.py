"""Small batches wait a little for company while another of their key runs, where hosts share cores."""

import pytest

from tests.unit.works import HERE, ids, scheduler, work
from workers.scheduler import Scheduler

GATHER_S = 0.03
S_PER_TOKEN = 0.0001
"""300 tokens last as long as company is waited for."""


def measured(*works_tokens: int) -> Scheduler:
    made = scheduler(*(work(tokens=tokens) for tokens in works_tokens), gather_s=GATHER_S)
    made.pace.learn("a", 1000, 1000 * S_PER_TOKEN)
    return made


def test_a_small_batch_waits_for_company_while_one_of_its_key_runs() -> None:
    made = measured(10)
    running = made.pick(0.0, resident=HERE, spread=1)
    assert running is not None
    made.add(work(arrived=0.0))
    assert made.pick(0.01, resident=HERE, spread=0) is None
    assert made.gathers_s == pytest.approx(GATHER_S - 0.01)
    made.finished(running)
    assert len(ids(made.pick(0.01, resident=HERE, spread=0))) == 1
    assert made.gathers_s is None


def test_it_waits_no_longer_than_that() -> None:
    made = measured(10)
    made.pick(0.0, resident=HERE, spread=1)
    made.add(work(arrived=0.01))
    assert made.pick(0.039, resident=HERE, spread=0) is None
    assert len(ids(made.pick(0.041, resident=HERE, spread=0))) == 1


def test_it_goes_ahead_once_it_is_worth_a_pass() -> None:
    made = measured(10)
    made.pick(0.0, resident=HERE, spread=1)
    made.add(work(tokens=200))
    assert made.pick(0.01, resident=HERE, spread=0) is None
    made.add(work(tokens=100))
    assert len(ids(made.pick(0.01, resident=HERE, spread=0))) == 2


def test_what_has_left_counts_no_more() -> None:
    made = measured(10)
    made.pick(0.0, resident=HERE, spread=1)
    gone = work(tokens=290)
    made.add(gone)
    made.remove(gone.id)
    made.add(work(tokens=20))
    assert made.pick(0.01, resident=HERE, spread=0) is None


def test_other_keys_and_unmeasured_ones_go_ahead() -> None:
    made = measured(10)
    made.pick(0.0, resident=HERE, spread=1)
    made.add(work("a"))
    other = work("b")
    made.add(other)
    assert ids(made.pick(0.01, resident=HERE, spread=0)) == [other.id]
    made.add(work("b"))
    assert made.pick(0.01, resident=HERE, spread=0) is not None


def test_hosts_that_may_take_small_batches_do() -> None:
    made = measured(10)
    made.pick(0.0, resident=HERE, spread=2)
    made.add(work())
    assert len(ids(made.pick(0.01, resident=HERE, spread=1))) == 1


def test_free_hosts_do_not_share_what_is_small_already() -> None:
    made = measured(*[10] * 20)
    assert len(ids(made.pick(0.0, resident=HERE, hosts=2, spread=1))) == 20


def test_free_hosts_share_what_is_worth_a_pass_each() -> None:
    made = measured(*[10] * 60)
    assert len(ids(made.pick(0.0, resident=HERE, hosts=2, spread=1))) == 30


def test_devices_of_their_own_wait_for_nobody() -> None:
    made = scheduler(work(), work())
    made.pace.learn("a", 1000, 1000 * S_PER_TOKEN)
    made.pick(0.0, resident=HERE, hosts=2, spread=1)
    assert made.pick(0.0, resident=HERE, hosts=1, spread=0) is not None
