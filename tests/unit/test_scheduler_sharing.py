"""A batch is short while works of several tenants or lanes arrive, and long while one alone asks."""

import pytest

from tasks.names import Lane
from tests.unit.works import HERE, A, ids, scheduler, work
from workers.scheduler import Scheduler
from workers.sharing import KEEPS_S
from workers.work import Pick

S_PER_TOKEN = 0.001
"""40 tokens, which is four works, last 40 ms."""


def flooded(*, arrived: float = 0.0, learns: bool = True) -> Scheduler:
    made = scheduler(*(work(tenant="loud", arrived=arrived) for _ in range(20)), shared_s=0.04)
    if learns:
        made.pace.learn("a", 1000, 1000 * S_PER_TOKEN)
    return made


def test_one_tenant_alone_gets_long_batches() -> None:
    made = flooded(arrived=10.0)
    assert len(ids(made.pick(11.5, resident=HERE))) == 20


@pytest.mark.parametrize("other", [{"tenant": "quiet"}, {"tenant": "loud", "lane": Lane.BATCH}])
def test_beside_others_batches_are_short(other: dict[str, object]) -> None:
    made = flooded()
    made.add(work("b", arrived=5.0, **other))
    made.add(work(tenant="loud", arrived=5.0))
    first, second = (ids(made.pick(5.1, resident=HERE)) for _ in range(2))
    assert max(len(first), len(second)) == 4


def test_once_the_others_are_gone_batches_are_long_again() -> None:
    made = flooded()
    made.add(work("b", tenant="quiet", arrived=5.0))
    made.add(work(tenant="loud", arrived=5.0))
    assert len(ids(made.pick(5.1, resident=HERE))) <= 4
    assert max(len(ids(made.pick(5.1 + KEEPS_S, resident=HERE))) for _ in range(2)) > 4


def test_nothing_is_put_behind_what_lasts_while_others_ask() -> None:
    made = flooded()
    long, short = made.pick(0.1, resident=HERE), Pick((), "a", A, loads=False, tokens=10, items=1)
    assert long is not None
    assert not made.is_enough(0.1, [long])
    made.add(work("b", tenant="quiet", arrived=5.0))
    assert made.is_enough(5.1, [long])
    assert not made.is_enough(5.1, [short])
    assert not made.is_enough(5.1 + KEEPS_S, [long])


def test_a_work_that_is_longer_runs_by_itself() -> None:
    made = flooded()
    made.add(work(tenant="quiet", tokens=500, arrived=5.0))
    assert len(ids(made.pick(5.1, resident=HERE))) == 4
    assert any(len(ids(made.pick(5.1, resident=HERE))) == 1 for _ in range(5))


def test_what_was_never_measured_is_not_cut() -> None:
    made = flooded(learns=False)
    made.add(work("b", tenant="quiet", arrived=5.0))
    assert len(ids(made.pick(5.1, resident=HERE))) in (1, 20)
