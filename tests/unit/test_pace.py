"""What workers measure of their queues, and what admission makes of it."""

import pytest

from tasks.live_workers import WorkerView
from tasks.names import Lane, queue_name
from tasks.pace import KEPT_SHARE, Paces
from workers.throughput import FORGET_S, LEAD_FORGET_S, Part, Throughput

QUEUES = {lane: queue_name("default", "cpu", lane) for lane in Lane}
INTERACTIVE, STANDARD = QUEUES[Lane.INTERACTIVE], QUEUES[Lane.STANDARD]
LATER = 1e9


def parts(count: int, queue: str = INTERACTIVE, *, tokens: int = 10, requests: float = 1.0) -> list[Part]:
    return [Part(queue, tokens, requests, LATER)] * count


def worker(name: str = "w", *, hosts: int = 1, request_s: dict[str, float] | None = None, **rest: object) -> WorkerView:
    fields = {
        "incarnation": name,
        "node": name,
        "pool": "default",
        "machine_profile": "cpu",
        "epoch": 1,
        "epoch_id": "",
        "queues": frozenset(QUEUES.values()),
        "resident": frozenset(),
        "transport": "farm",
        "is_ready": True,
        **rest,
    }
    return WorkerView(hosts=hosts, request_s=request_s or {}, **fields)  # type: ignore[arg-type]


def paces(*workers: WorkerView) -> Paces:
    made = Paces()
    made.read(workers)
    return made


def numbers(text: str) -> list[float]:
    return [float(one) for one in text.split()]


def test_a_batch_that_waited_behind_another_is_counted_from_its_end() -> None:
    pace = Throughput()
    pace.sent(1, "spec", 0.0, counts=True)
    pace.sent(2, "spec", 0.0, counts=True)
    assert pace.done(7, 1, 1.0, parts(10))
    assert not pace.done(7, 2, 2.0, parts(10))
    assert pace.request_s() == {INTERACTIVE: 0.1}
    assert pace.computed_s == 2.0


def test_only_batches_that_left_others_waiting_tell_a_pace() -> None:
    pace = Throughput()
    pace.sent(1, "spec", 0.0, counts=False)
    pace.done(7, 1, 1.0, parts(1))
    assert pace.request_s() == {}
    assert pace.computed_s == 1.0


def test_time_is_parted_by_tokens_and_slices_are_parts_of_a_request() -> None:
    pace = Throughput()
    pace.sent(1, "spec", 0.0, counts=True)
    pace.done(7, 1, 1.0, [*parts(1, tokens=90, requests=0.5), *parts(1, STANDARD, tokens=10)])
    assert pace.request_s() == {INTERACTIVE: 1.8, STANDARD: 0.1}


def test_what_was_measured_of_late_counts_most_and_is_forgotten_in_the_end() -> None:
    pace, now = Throughput(), 0.0
    for batch in range(40):
        pace.sent(batch, "spec", now, counts=True)
        now += 1.0 if batch < 20 else 2.0
        pace.done(7, batch, now, parts(10))
    assert pace.request_s()[INTERACTIVE] == pytest.approx(0.2, rel=0.02)
    assert pace.lead_s["spec"] == pytest.approx(2.0, rel=0.02)
    pace.tend(now + LEAD_FORGET_S)
    assert pace.lead_s == {}
    assert pace.request_s() != {}
    pace.tend(now + FORGET_S)
    assert pace.request_s() == {}


def test_what_is_computed_for_nobody_is_told() -> None:
    pace = Throughput()
    pace.sent(1, "spec", 0.0, counts=False)
    pace.done(7, 1, 1.0, [Part(INTERACTIVE, 30, 1.0, LATER), Part(INTERACTIVE, 10, 1.0, 0.5)])
    assert pace.late_s == 0.25


def test_batches_of_a_lost_host_leave_nothing_behind() -> None:
    pace = Throughput()
    pace.sent(1, "spec", 0.0, counts=True)
    pace.lost(7, [1])
    pace.done(7, 1, 1.0, parts(1))
    assert pace.computed_s == 0.0


def test_hosts_add_up_and_who_has_just_come_counts_as_the_others() -> None:
    known = worker("a", hosts=2, request_s={INTERACTIVE: 0.2})
    assert paces(known).request_s(INTERACTIVE) == pytest.approx(0.1)
    assert paces(known, worker("b", hosts=2)).request_s(INTERACTIVE) == pytest.approx(0.05)
    slow = worker("b", hosts=1, request_s={INTERACTIVE: 1.0})
    assert paces(known, slow).request_s(INTERACTIVE) == pytest.approx(1 / 11)


def test_an_unknown_pace_predicts_nothing() -> None:
    for known in (paces(), paces(worker()), paces(worker(request_s={STANDARD: 1.0}))):
        assert known.text(INTERACTIVE, weight=1.0, timeout_s=1.0) == ""
        assert known.request_s(INTERACTIVE) is None


def test_the_text_says_what_the_script_reckons_with() -> None:
    busy = worker(request_s={INTERACTIVE: 0.1, STANDARD: 0.5}, weights={"standard": 6.0})
    known = paces(busy)
    assert numbers(known.text(INTERACTIVE, weight=1.0, timeout_s=10.0)) == [10 * KEPT_SHARE, 0.1, 1.0, 0.0]
    assert numbers(known.text(STANDARD, weight=2.0, timeout_s=4.0)) == [4 * KEPT_SHARE, 0.5, 3.0, 16.0, 0.1]
