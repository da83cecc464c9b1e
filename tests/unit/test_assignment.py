"""Which worker serves which pool: for any pools and any live workers."""

from collections import Counter
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from config_db.access import PoolSpec
from workers.assignment import Candidate, assign

PROFILES = ("cpu", "l4")
START = datetime(2026, 1, 1, tzinfo=UTC)

workers = st.lists(
    st.builds(
        lambda number, profile: Candidate(f"i{number}", f"node{number}", profile),
        st.integers(0, 40),
        st.sampled_from(PROFILES),
    ),
    max_size=20,
    unique_by=lambda worker: worker.incarnation,
)
pools = st.dictionaries(
    st.sampled_from("abcdef"),
    st.builds(
        PoolSpec,
        machine_profiles=st.dictionaries(st.sampled_from(PROFILES), st.integers(1, 6), min_size=1),
        created_at=st.none() | st.integers(0, 3).map(lambda second: START + timedelta(seconds=second)),
    ),
    max_size=4,
)


@given(pools, workers)
def test_every_pool_gets_what_there_is_and_no_more(pools: dict[str, PoolSpec], workers: list[Candidate]) -> None:
    assigned = assign(pools, workers)
    found = Counter((assigned[one.incarnation], one.machine_profile) for one in workers if one.incarnation in assigned)
    for profile in PROFILES:
        there = sum(one.machine_profile == profile for one in workers)
        wanted = sum(spec.machine_profiles.get(profile, 0) for spec in pools.values())
        assert sum(count for (_, other), count in found.items() if other == profile) == min(there, wanted)
        for name, spec in pools.items():
            assert found[name, profile] <= spec.machine_profiles.get(profile, 0)


@given(pools, workers, st.randoms())
def test_whoever_computes_it_finds_the_same(
    pools: dict[str, PoolSpec], workers: list[Candidate], random: object
) -> None:
    shuffled, turned = list(workers), dict(reversed(pools.items()))
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert assign(turned, shuffled) == assign(pools, workers)


@given(pools, workers, st.data())
def test_a_worker_that_dies_moves_one_a_pool_at_most(
    pools: dict[str, PoolSpec], workers: list[Candidate], data: st.DataObject
) -> None:
    """And nobody of another profile; one that served no pool moves nobody."""
    if not workers:
        return
    gone = data.draw(st.sampled_from(workers))
    before, after = assign(pools, workers), assign(pools, [one for one in workers if one != gone])
    moved = [one for one in workers if one != gone and before.get(one.incarnation) != after.get(one.incarnation)]
    assert all(one.machine_profile == gone.machine_profile for one in moved)
    assert len(moved) <= (len(pools) if gone.incarnation in before else 0)


@given(pools, workers, st.integers(1, 3))
def test_a_pool_that_grows_keeps_whom_it_has(pools: dict[str, PoolSpec], workers: list[Candidate], more: int) -> None:
    if not pools:
        return
    name = next(iter(pools))
    larger = PoolSpec(
        machine_profiles={profile: count + more for profile, count in pools[name].machine_profiles.items()},
        created_at=pools[name].created_at,
    )
    before, after = assign(pools, workers), assign({**pools, name: larger}, workers)
    kept = {incarnation for incarnation, pool in before.items() if pool == name}
    assert kept <= {incarnation for incarnation, pool in after.items() if pool == name}


@given(pools, workers)
def test_the_oldest_pools_choose_first(pools: dict[str, PoolSpec], workers: list[Candidate]) -> None:
    """A pool that comes later takes nothing from those that are there."""
    late = PoolSpec(machine_profiles={"cpu": 3, "l4": 3}, created_at=START + timedelta(days=1))
    before, after = assign(pools, workers), assign({**pools, "late": late}, workers)
    assert {one: pool for one, pool in after.items() if pool != "late"} == before


def test_a_worker_that_starts_again_comes_back_to_its_place() -> None:
    pool = {"p": PoolSpec(machine_profiles={"cpu": 1})}
    workers = [Candidate(f"i{number}", f"node{number}", "cpu") for number in range(8)]
    (reserved,) = assign(pool, workers)
    again = [Candidate(f"{one.incarnation}-again", one.node, "cpu") for one in workers]
    assert assign(pool, again) == {f"{reserved}-again": "p"}
