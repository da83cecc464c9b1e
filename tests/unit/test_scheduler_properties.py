"""What holds for every sequence of works, whatever their keys, lanes, tenants and sizes."""

from collections import Counter, defaultdict
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from tasks.names import LANES, Lane
from tests.unit.works import scheduler, work
from workers.work import Pick, Work

NAMES = ["s1", "s2", "s3"]
SPECS = st.sampled_from(NAMES)
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


@given(
    works=st.lists(WORKS, max_size=60),
    halves=st.lists(st.lists(st.builds(work), max_size=5), max_size=3),
    removed=st.sets(st.integers(0, 59)),
    resident=st.sets(SPECS),
)
def test_every_work_is_picked_expired_or_removed_exactly_once(
    works: list[Work], halves: list[list[Work]], removed: set[int], resident: set[str]
) -> None:
    made = scheduler(*works)
    for half in halves:
        made.add_together(half)
    everything = [*works, *(one for half in halves for one in half)]
    ended = Counter(one.id for place, one in enumerate(everything) if place in removed and made.remove(one.id))
    now = 0.0
    while len(made):
        pick = made.pick(now, resident=resident)
        if pick is not None:
            ended.update(one.id for one in pick.works)
            made.finished(pick)
        ended.update(one.id for one in made.take_expired(now))
        now += 1.0
    assert ended == Counter(one.id for one in everything)


@given(works=st.lists(WORKS, max_size=60), resident=st.sets(SPECS), hosts=st.integers(1, 4))
def test_a_batch_is_of_one_key_and_keeps_its_limits(works: list[Work], resident: set[str], hosts: int) -> None:
    made = scheduler(*works)
    while (pick := made.pick(0.0, resident=resident, hosts=hosts)) is not None:
        assert (pick.items, pick.tokens) == (sum(w.items for w in pick.works), sum(w.tokens for w in pick.works))
        assert pick.loads == (pick.spec not in resident)
        assert {(one.key, one.spec) for one in pick.works} == {(pick.key, pick.spec)}
        if len(pick.works) > 1:
            assert pick.items <= 64
            assert pick.tokens <= 1000
            assert not any(one.alone for one in pick.works)


@given(works=st.lists(WORKS, max_size=60), removed=st.sets(st.integers(0, 59)))
def test_within_key_lane_and_tenant_the_first_comes_first(works: list[Work], removed: set[int]) -> None:
    made = scheduler(*works)
    for place in removed:
        if place < len(works):
            made.remove(works[place].id)
    order = defaultdict(list)
    while (pick := made.pick(0.0, resident=NAMES)) is not None:
        for one in pick.works:
            if not one.alone:
                order[one.key, one.lane, one.tenant].append(one.id)
    assert all(line == sorted(line) for line in order.values())


@given(
    works=st.lists(WORKS, max_size=60),
    limits=st.dictionaries(SPECS, st.integers(1, 3)),
    resident=st.sets(SPECS),
    finish=st.randoms(use_true_random=False),
)
def test_max_concurrency_is_never_exceeded_and_loses_nothing(
    works: list[Work], limits: dict[str, int], resident: set[str], finish: Random
) -> None:
    made = scheduler(*works)
    for spec, limit in limits.items():
        made.set_concurrency(spec, limit)
    running: list[Pick] = []
    while len(made):
        pick = made.pick(0.0, resident=resident)
        if pick is not None:
            running.append(pick)
            count = Counter(one.spec for one in running)
            assert all(count[spec] <= limit for spec, limit in limits.items())
        if pick is None or finish.random() < 0.3:
            made.finished(running.pop(finish.randrange(len(running))))


@given(
    floods=st.sets(st.sampled_from(LANES), min_size=1),
    lane=st.sampled_from(LANES[:-1]),
    resident=st.booleans(),
    items=st.integers(1, 64),
)
def test_no_lane_starves(floods: set[Lane], lane: Lane, resident: bool, items: int) -> None:
    """Whatever lanes are flooded with resident work, one request of any lane but the last is served within 64 picks.

    So is one for an absent model; and each flooded lane has new requests for absent models that are overdue at once.
    """
    made = scheduler(unmeasured_load_s=0.01)
    mine = work("mine", spec="s1" if resident else "mine", lane=lane, items=items)
    made.add(mine)
    now = 0.0
    for turn in range(64):
        now += 0.1
        for flooded in floods:
            made.add(work(f"flood {flooded}", lane=flooded, spec="s1", arrived=now))
            made.add(work(f"{flooded} {turn}", lane=flooded, spec=f"absent {turn}", arrived=now - 0.05))
        pick = made.pick(now, resident={"s1"})
        assert pick is not None
        if mine in pick.works:
            return
        if pick.loads:
            made.note_load(now, pick.spec, 0.01)
        made.finished(pick)
    raise AssertionError("never served")


@given(works=st.lists(WORKS, max_size=60), resident=st.sets(SPECS), limits=st.dictionaries(SPECS, st.integers(1, 2)))
def test_an_experiment_starts_only_while_nothing_else_waits(
    works: list[Work], resident: set[str], limits: dict[str, int]
) -> None:
    """Neither beside others in a batch, nor as they cannot run now, nor with a model's load."""
    made = scheduler(*works)
    for spec, limit in limits.items():
        made.set_concurrency(spec, limit)
    others = {one.id for one in works if one.lane is not Lane.EXPERIMENT}
    running: list[Pick] = []
    while len(made):
        hint = made.next_absent(0.0, resident=resident)
        assert hint is None or not others or hint in {one.spec for one in works if one.id in others}
        pick = made.pick(0.0, resident=resident)
        if pick is None:
            made.finished(running.pop())
            continue
        running.append(pick)
        if any(one.lane is Lane.EXPERIMENT for one in pick.works):
            assert not others
        others -= {one.id for one in pick.works}
