"""Sort and pack: every text once, groups true, budgets kept."""

from hypothesis import given
from hypothesis import strategies as st

from workers.host.packing import plan

LENGTHS = st.lists(st.integers(1, 300), max_size=80)


@given(lengths=LENGTHS, budget=st.integers(1, 600), padded=st.booleans())
def test_every_text_stands_in_one_pass(lengths: list[int], budget: int, padded: bool) -> None:
    passes = plan(lengths, pass_tokens=budget, padded=padded)
    assert sorted(row for one in passes for row in one.rows) == list(range(len(lengths)))


@given(lengths=LENGTHS, budget=st.integers(1, 600), padded=st.booleans())
def test_only_a_text_longer_than_the_budget_exceeds_it_and_alone(lengths: list[int], budget: int, padded: bool) -> None:
    for one in plan(lengths, pass_tokens=budget, padded=padded):
        cost = len(one.rows) * one.width if padded else one.tokens
        assert cost <= budget or len(one.rows) == 1


@given(lengths=LENGTHS, budget=st.integers(1, 600))
def test_groups_cover_a_pass_in_the_order_of_its_texts(lengths: list[int], budget: int) -> None:
    for one in plan(lengths, pass_tokens=budget, padded=False):
        told = [group.length for group in one.groups for _ in range(group.count)]
        assert told == [lengths[row] for row in one.rows]
        assert [group.start for group in one.groups] == [0, *(group.end for group in one.groups)][: len(one.groups)]
        assert len({group.length for group in one.groups}) == len(one.groups)


def test_short_texts_share_a_pass() -> None:
    (one,) = plan([3, 5, 3], pass_tokens=16, padded=False)
    assert one.rows == (0, 2, 1)
    assert [(group.start, group.count, group.length) for group in one.groups] == [(0, 2, 3), (6, 1, 5)]


def test_only_the_texts_that_are_run_stand_in_passes_by_their_places() -> None:
    passes = plan([9, 4, 9, 2, 9], pass_tokens=6, padded=False, places=[1, 3, 4])
    assert [one.rows for one in passes] == [(3, 1), (4,)]
    assert plan([9, 4], pass_tokens=6, padded=True, places=[]) == []
