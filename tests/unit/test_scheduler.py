"""Which micro-batch runs next, with literals for hosts and clock."""

from tasks.names import LANES, Lane
from tests.unit.works import HERE, A, B, ids, scheduler, work


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
    lower = {lane: work(str(lane), lane=lane) for lane in LANES[1:-1]}
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


def test_free_hosts_share_what_waits() -> None:
    made = scheduler(*(work() for _ in range(9)))
    assert [len(ids(made.pick(0, resident=HERE, hosts=hosts))) for hosts in (2, 2, 1)] == [5, 2, 2]


def test_the_first_of_an_urgent_lane_goes_before_older_ones_of_another_key() -> None:
    old, urgent = work("a", lane=Lane.STANDARD), work("b", arrived=5.0)
    assert ids(scheduler(old, urgent).pick(6, resident=HERE)) == [urgent.id]


def test_of_keys_in_one_lane_the_one_whose_first_waited_longest_comes_next() -> None:
    works = [work("a"), work("b", arrived=3.0), work("a", arrived=5.0)]
    made = scheduler(*works, max_items=1)
    assert [ids(made.pick(6, resident=HERE)) for _ in works] == [[one.id] for one in works]


def test_a_batch_takes_no_more_of_a_line_after_one_that_does_not_fit() -> None:
    first, large, small = work(tokens=50), work(tokens=80), work(tokens=10)
    made = scheduler(first, large, small, max_tokens=100)
    assert ids(made.pick(0, resident=HERE)) == [first.id]
    assert ids(made.pick(0, resident=HERE)) == [large.id, small.id]


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


def test_of_a_half_only_those_still_wanted_run() -> None:
    late, removed, stays = work(deadline=1.0), work(), work()
    made = scheduler()
    made.add_together([late, removed, stays])
    made.remove(removed.id)
    assert ids(made.pick(2.0, resident=HERE)) == [stays.id]
    assert [one.id for one in made.take_expired(2.0)] == [late.id]


def test_a_half_waits_for_a_slot_of_its_model_and_others_pass() -> None:
    made = scheduler(work("b", spec=B))
    made.set_concurrency(A, 1)
    made.add(work())
    running = made.pick(0, resident={A})
    assert running is not None
    half = [work(), work()]
    made.add_together(half)
    other = made.pick(0, resident={B})
    assert other is not None
    assert other.spec == B
    assert made.pick(0, resident={A}) is None
    made.finished(running)
    assert ids(made.pick(0, resident={A})) == [one.id for one in half]


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
    works = [work() for _ in range(5)]
    made = scheduler(*works)
    for place in (3, 1, 0):  # two inside the line, then its first, so that the one behind the next comes forward
        assert made.remove(works[place].id) is works[place]
        assert made.remove(works[place].id) is None
    assert ids(made.pick(0, resident=HERE)) == [works[2].id, works[4].id]
    assert made.waiting_by_lane == dict.fromkeys(LANES, 0)


def test_waiting_is_counted_by_lane() -> None:
    made = scheduler(work(), work(lane=Lane.BATCH), work(lane=Lane.BATCH))
    assert made.waiting_by_lane == {**dict.fromkeys(LANES, 0), Lane.INTERACTIVE: 1, Lane.BATCH: 2}


def test_what_would_be_late_by_the_time_it_is_done_is_not_computed() -> None:
    late, next_late, in_time = work(deadline=1.5), work(deadline=1.9), work(deadline=2.5)
    made = scheduler(late, next_late, in_time, other := work("other", spec=B, deadline=1.5, arrived=0.5))
    assert ids(made.pick(1.0, resident={A, B}, lead_s={A: 1.0})) == [in_time.id]
    assert made.take_expired(1.0) == [late, next_late]
    assert ids(made.pick(1.0, resident={A, B}, lead_s={A: 1.0})) == [other.id]


def test_if_all_would_be_late_there_is_nothing_to_do() -> None:
    works = [work(deadline=1.5, tenant=tenant) for tenant in "ab" for _ in range(3)]
    made = scheduler(*works)
    assert made.pick(1.0, resident={A}, lead_s={A: 1.0}) is None
    assert len(made.take_expired(1.0)) == 6
    assert len(made) == 0
