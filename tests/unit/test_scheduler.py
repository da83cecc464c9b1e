"""Which micro-batch runs next, with literals for hosts and clock."""

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.names import LANES, Lane
from workers.scheduler import BatchLimits, Pick, Policy, Scheduler, Work

A, B = "spec-a", "spec-b"
HERE = frozenset({A})
_numbers = itertools.count(1)


def work(key: str = "a", *, spec: str = A, lane: Lane = Lane.INTERACTIVE, tenant: str = "t", **rest: Any) -> Work:
    fields = {"items": 1, "tokens": 10, "arrived": 0.0, "deadline": 1000.0, **rest}
    return Work(id=next(_numbers), key=key, spec=spec, lane=lane, tenant=tenant, **fields)


def scheduler(*works: Work, max_items: int = 64, max_tokens: int = 1000, **policy: Any) -> Scheduler:
    made = Scheduler(BatchLimits(max_items, max_tokens), Policy(**policy))
    for one in works:
        made.add(one)
    return made


def ids(pick: Pick | None) -> list[int]:
    assert pick is not None
    return [one.id for one in pick.works]


def test_requests_of_one_key_share_a_batch_in_order_of_arrival() -> None:
    works = [work() for _ in range(5)]
    assert ids(scheduler(*works).pick(0, resident=HERE)) == [one.id for one in works]


def test_requests_of_different_keys_do_not() -> None:
    first, second = work("a"), work("b")
    made = scheduler(first, second)
    assert ids(made.pick(0, resident=HERE)) == [first.id]
    assert ids(made.pick(0, resident=HERE)) == [second.id]
    assert made.pick(0, resident=HERE) is None


def test_a_batch_keeps_its_limits() -> None:
    made = scheduler(*(work(items=3, tokens=40) for _ in range(10)), max_items=9, max_tokens=100)
    pick = made.pick(0, resident=HERE)
    assert pick is not None
    assert (pick.items, pick.tokens) == (6, 80)


def test_a_request_beyond_the_limits_runs_by_itself() -> None:
    large, small = work(items=500, tokens=9000), work()
    made = scheduler(large, small)
    assert ids(made.pick(0, resident=HERE)) == [large.id]


def test_the_more_urgent_lane_leads_and_the_others_fill_up() -> None:
    late, urgent = work(lane=Lane.BATCH), work(lane=Lane.INTERACTIVE, arrived=5.0)
    assert ids(scheduler(late, urgent).pick(6, resident=HERE)) == [urgent.id, late.id]


def test_every_lane_moves_under_a_flood_of_the_first() -> None:
    lower = {lane: work(str(lane), lane=lane) for lane in LANES[1:]}
    made = scheduler(*lower.values())
    seen: list[int] = []
    for _ in range(40):
        made.add(work("flood"))
        seen += ids(made.pick(1, resident=HERE))
    assert {one.id for one in lower.values()} <= set(seen)


def test_a_resident_model_goes_before_an_absent_one() -> None:
    absent, resident = work("b", spec=B), work("a", arrived=0.1)
    made = scheduler(absent, resident, unmeasured_load_s=10)
    pick = made.pick(0.2, resident=HERE)
    assert ids(pick) == [resident.id]
    pick = made.pick(0.2, resident=HERE)
    assert pick is not None
    assert pick.loads


def test_an_overdue_absent_model_goes_before_a_resident_one() -> None:
    absent, resident = work("b", spec=B), work("a")
    made = scheduler(absent, resident, unmeasured_load_s=0.5, patience=2)
    assert ids(made.pick(1.0, resident=HERE)) == [absent.id]


def test_a_long_load_is_left_to_the_background_while_resident_work_waits() -> None:
    absent, resident = work("b", spec=B), work("a")
    made = scheduler(absent, resident, unmeasured_load_s=5, foreground_load_s=1)
    assert made.next_absent(0, resident=HERE) == B
    assert ids(made.pick(500, resident=HERE)) == [resident.id]


def test_a_model_resident_elsewhere_is_not_loaded_here_at_once() -> None:
    made = scheduler(work("b", spec=B), unmeasured_load_s=0.5, patience=2)
    assert made.pick(0.9, resident=HERE, elsewhere={B}) is None
    assert made.pick(1.1, resident=HERE, elsewhere={B}) is not None


def test_loading_takes_at_most_a_quarter_of_the_time_while_resident_work_waits() -> None:
    """Two models that thrash one slot, in a simulated clock."""
    made = scheduler(unmeasured_load_s=0.1)
    now, resident, loading_s = 0.0, A, 0.0
    while now < 100:
        for key, spec in (("a", A), ("b", B)):
            if sum(one.key == key for one, _ in made._works.values()) < 5:
                made.add(work(key, spec=spec, arrived=now, deadline=now + 1000))
        pick = made.pick(now, resident={resident})
        assert pick is not None
        if pick.loads:
            resident, loading_s, now = pick.spec, loading_s + 0.1, now + 0.1
            made.note_load(now, pick.spec, 0.1)
        now += 0.01
        made.finished(pick)
    assert 0 < loading_s / now <= 0.26


def test_free_hosts_share_what_waits() -> None:
    made = scheduler(*(work() for _ in range(9)))
    assert len(ids(made.pick(0, resident=HERE, hosts=2))) == 5
    assert len(ids(made.pick(0, resident=HERE, hosts=1))) == 4


def test_max_concurrency_is_kept() -> None:
    made = scheduler(*(work() for _ in range(4)), max_items=1)
    made.set_concurrency(A, 2)
    first = made.pick(0, resident=HERE)
    assert first is not None
    assert made.pick(0, resident=HERE) is not None
    assert made.pick(0, resident=HERE) is None
    made.finished(first)
    assert made.pick(0, resident=HERE) is not None


def test_halves_of_a_lost_batch_run_first_and_exactly_as_given() -> None:
    waiting = [work() for _ in range(3)]
    made = scheduler(*waiting)
    halves = [[work(), work()], [work()]]
    for half in halves:
        made.add_together(half)
    for half in halves:
        assert ids(made.pick(0, resident=HERE)) == [one.id for one in half]
    assert ids(made.pick(0, resident=HERE)) == [one.id for one in waiting]


def test_a_request_that_ran_when_a_worker_died_runs_alone() -> None:
    before, suspect, after = work(), work(alone=True), work()
    made = scheduler(before, suspect, after)
    picks = [ids(made.pick(0, resident=HERE)) for _ in range(2)]
    assert sorted(picks, key=len) == [[suspect.id], [before.id, after.id]]


def test_the_expired_are_not_picked_but_handed_out_once() -> None:
    late, good = work(deadline=1.0), work()
    made = scheduler(late, good)
    assert ids(made.pick(2.0, resident=HERE)) == [good.id]
    assert [one.id for one in made.take_expired(2.0)] == [late.id]
    assert made.take_expired(2.0) == []
    assert len(made) == 0


def test_the_removed_are_gone() -> None:
    gone, stays = work(), work()
    made = scheduler(gone, stays)
    assert made.remove(gone.id) is gone
    assert made.remove(gone.id) is None
    assert ids(made.pick(0, resident=HERE)) == [stays.id]


@pytest.mark.parametrize(("weight", "share"), [(1.0, 0.5), (3.0, 0.75)])
def test_tenants_share_by_weight(weight: float, share: float) -> None:
    made = scheduler(max_items=1, tenant_weights={"big": weight})
    for tenant in ("big", "small"):
        for _ in range(300):
            made.add(work(tenant, tenant=tenant))
    served = Counter(pick.works[0].tenant for _ in range(200) if (pick := made.pick(0, resident=HERE)))
    assert served["big"] / 200 == pytest.approx(share, abs=0.03)


def test_a_tenant_that_was_away_has_saved_up_nothing() -> None:
    made = scheduler(max_items=1)
    for _ in range(50):
        made.add(work("busy", tenant="busy"))
        made.pick(0, resident=HERE)
    for tenant in ("busy", "new"):
        for _ in range(50):
            made.add(work(tenant, tenant=tenant))
    served = Counter(pick.works[0].tenant for _ in range(20) if (pick := made.pick(0, resident=HERE)))
    assert served["busy"] >= 9


SPECS = st.sampled_from(["s1", "s2", "s3"])
WORKS = st.builds(
    lambda key, spec, lane, tenant, items, tokens, deadline, alone: work(
        f"{key}{spec}", spec=spec, lane=lane, tenant=tenant, items=items, tokens=tokens, deadline=deadline, alone=alone
    ),
    st.sampled_from("kl"),
    SPECS,
    st.sampled_from(LANES),
    st.sampled_from("tu"),
    st.integers(1, 40),
    st.integers(1, 2000),
    st.floats(1, 100),
    st.booleans(),
)


@given(works=st.lists(WORKS, max_size=60), removed=st.sets(st.integers(0, 59)), resident=st.sets(SPECS))
def test_every_work_is_picked_expired_or_removed_exactly_once(
    works: list[Work], removed: set[int], resident: set[str]
) -> None:
    made = scheduler(*works)
    ended = Counter(one.id for place, one in enumerate(works) if place in removed and made.remove(one.id))
    now = 0.0
    while len(made):
        pick = made.pick(now, resident=resident)
        if pick is not None:
            assert len({one.key for one in pick.works}) == 1
            assert len(pick.works) == 1 or (pick.items <= 64 and pick.tokens <= 1000)
            assert len(pick.works) == 1 or not any(one.alone for one in pick.works)
            ended.update(one.id for one in pick.works)
            made.finished(pick)
        ended.update(one.id for one in made.take_expired(now))
        now += 1.0
    assert ended == Counter(one.id for one in works)


@given(works=st.lists(WORKS, max_size=60))
def test_within_key_lane_and_tenant_the_first_comes_first(works: list[Work]) -> None:
    made = scheduler(*works)
    order: list[Work] = []
    while (pick := made.pick(0.0, resident={"s1", "s2", "s3"})) is not None:
        order += pick.works
    for one, other in itertools.pairwise(order):
        same = (one.key, one.lane, one.tenant) == (other.key, other.lane, other.tenant)
        assert not same or one.alone or other.alone or one.id < other.id
