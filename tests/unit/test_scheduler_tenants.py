"""Tenants of one lane share it by weight, and nobody is kept in the books for ever."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.names import Lane
from tests.unit.works import HERE, held_objects, ids, scheduler, work


@pytest.mark.parametrize(("weight", "share"), [(1.0, 0.5), (3.0, 0.75)])
def test_tenants_share_by_weight(weight: float, share: float) -> None:
    made = scheduler(max_items=1, tenant_weights={"big": weight})
    for tenant in ("big", "small"):
        for _ in range(300):
            made.add(work(tenant, tenant=tenant))
    served = Counter(pick.works[0].tenant for _ in range(200) if (pick := made.pick(0, resident=HERE)))
    assert served["big"] / 200 == pytest.approx(share, abs=0.03)


def test_other_weights_count_from_when_they_are_told() -> None:
    made = scheduler(max_items=1)
    for tenant in ("big", "small"):
        for _ in range(300):
            made.add(work(tenant, tenant=tenant))
    picked = [pick.works[0].tenant for _ in range(100) if (pick := made.pick(0, resident=HERE))]
    made.weigh_tenants({"big": 3.0})
    picked += [pick.works[0].tenant for _ in range(200) if (pick := made.pick(0, resident=HERE))]
    assert Counter(picked[:100])["big"] == 50
    assert Counter(picked[100:])["big"] == pytest.approx(150, abs=6)


@given(
    weights=st.dictionaries(st.sampled_from("abcd"), st.sampled_from([0.5, 1.0, 2.0, 5.0]), min_size=2),
    sizes=st.fixed_dictionaries({tenant: st.integers(1, 40) for tenant in "abcd"}),
    keys=st.integers(1, 3),
)
def test_tokens_are_shared_by_weight_whatever_the_sizes(
    weights: dict[str, float], sizes: dict[str, int], keys: int
) -> None:
    """Of tenants that always have work, each has had its share of the tokens, to within two of the largest works."""
    made, served = scheduler(max_items=1, tenant_weights=weights), Counter[str]()
    for turn in range(600):
        for tenant in weights if turn else [*weights] * 20:
            made.add(work(f"{tenant}{turn % keys}", tenant=tenant, tokens=sizes[tenant]))
        pick = made.pick(0, resident=HERE)
        assert pick is not None
        served[pick.works[0].tenant] += pick.tokens
        made.finished(pick)
    assert made.weight_by_lane() == {Lane.INTERACTIVE: sum(weights.values())}
    per_weight = [served[tenant] / weights[tenant] for tenant in weights]
    assert max(per_weight) - min(per_weight) <= 2 * max(sizes.values()) / min(weights.values())


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


def test_a_large_request_is_charged_by_its_tokens() -> None:
    made = scheduler(max_items=1)
    for tenant, tokens in (("large", 300), ("small", 100)):
        for _ in range(100):
            made.add(work(tenant, tenant=tenant, tokens=tokens))
    served = Counter(pick.works[0].tenant for _ in range(80) if (pick := made.pick(0, resident=HERE)))
    assert served["small"] / served["large"] == pytest.approx(3, rel=0.1)


def test_a_batch_is_filled_from_all_tenants_the_least_served_first() -> None:
    made = scheduler(work(tenant="busy"))
    made.pick(0, resident=HERE)
    busy, new, other = work(tenant="busy"), work(tenant="new", tokens=20), work(tenant="other")
    for one in (busy, new, other):
        made.add(one)
    assert ids(made.pick(0, resident=HERE)) == [new.id, other.id, busy.id]


def test_a_tenant_whose_models_are_all_absent_does_not_hold_up_the_others() -> None:
    made = scheduler(work("b", spec="spec-b", tenant="idle"), unmeasured_load_s=1e9)
    made.add(served := work(tenant="busy"))
    assert ids(made.pick(0, resident=HERE)) == [served.id]


def test_tenants_that_come_once_leave_nothing_behind() -> None:
    """Each asks once while another's request always waits under the same key, so that the key never falls empty."""
    made = scheduler(work(tenant="first"), max_items=1)
    for n in range(5000):
        made.add(work(tenant=f"tenant-{n}"))
        pick = made.pick(0, resident=HERE)
        assert pick is not None
        made.finished(pick)
    assert len(made) == 1
    assert held_objects(made) < 5000


def test_deadlines_of_what_was_served_are_forgotten() -> None:
    """A request of an hour's patience is served at once; 20 000 of them leave no trace."""
    made = scheduler()
    for _ in range(20_000):
        made.add(work(deadline=3600.0))
        assert made.pick(0, resident=HERE) is not None
    assert held_objects(made) < 5000
