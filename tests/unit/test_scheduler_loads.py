"""Which model is loaded when: loading keeps to its share of the time, yet every model is served."""

import heapq
from collections import Counter
from dataclasses import dataclass, field

import pytest

from tasks.names import Lane
from tests.unit.works import A, B, ids, scheduler, work
from workers.scheduler import Scheduler
from workers.work import Pick

RUN_S = 0.01


@dataclass
class Host:
    """A host in simulated time: room for so many models, one batch at a time in each of its slots."""

    room: int
    slots: int
    resident: list[str] = field(default_factory=list)
    running: int = 0


@dataclass
class Simulation:
    """Hosts under a flood of closed-loop callers: of every key a number of requests always waits."""

    made: Scheduler
    hosts: list[Host]
    keys: dict[str, str]
    load_s: float
    now: float = 0.0
    loads: list[tuple[float, float]] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)
    _ends: list[tuple[float, int, Host, Pick]] = field(default_factory=list)

    def run(self, until: float) -> None:
        while self.now < until:
            self._ask()
            for host in self.hosts:
                while host.running < host.slots and (pick := self._pick(host)) is not None:
                    self._start(host, pick)
            self.now, _, host, pick = heapq.heappop(self._ends)
            self._end(host, pick)

    def _ask(self) -> None:
        for key, spec in self.keys.items():
            while self._waiting[key] < 5:
                self._waiting[key] += 1
                self.made.add(work(key, spec=spec, arrived=self.now, deadline=self.now + 1000))

    def __post_init__(self) -> None:
        self._waiting: Counter[str] = Counter()

    def _pick(self, host: Host) -> Pick | None:
        return self.made.pick(self.now, resident=host.resident)

    def _start(self, host: Host, pick: Pick) -> None:
        self._waiting[pick.key] -= len(pick.works)
        self.served[pick.key] += len(pick.works)
        host.running += 1
        taken_s = RUN_S
        if pick.loads:
            taken_s += self.load_s
            self.loads.append((self.now, self.now + self.load_s))
        heapq.heappush(self._ends, (self.now + taken_s, pick.works[0].id, host, pick))

    def _end(self, host: Host, pick: Pick) -> None:
        if pick.loads:
            host.resident = [*host.resident[-(host.room - 1) :], pick.spec] if host.room > 1 else [pick.spec]
            self.made.note_load(self.now, pick.spec, self.load_s)
        host.running -= 1
        self.made.finished(pick)


@pytest.mark.parametrize(("hosts", "slots"), [(1, 1), (1, 2), (2, 2)])
def test_loading_takes_at_most_a_quarter_of_the_time_while_resident_work_waits(hosts: int, slots: int) -> None:
    """Four models thrash room for two, every host with batches picked ahead of the one that runs."""
    keys = {f"k{n}": f"s{n}" for n in range(4)}
    farm = Simulation(
        scheduler(unmeasured_load_s=0.1), [Host(2, slots, ["s0", "s1"]) for _ in range(hosts)], keys, load_s=0.1
    )
    farm.run(until=60)
    loading_s = sum(min(end, farm.now) - start for start, end in farm.loads)
    assert 0 < loading_s / farm.now <= 0.25
    assert min(farm.served[key] for key in keys) > 0.05 * max(farm.served.values())


def test_a_second_load_does_not_start_beside_the_first() -> None:
    made = scheduler(unmeasured_load_s=0.1, max_items=1)
    for spec in (B, "spec-c"):
        made.add(work(spec, spec=spec))
    made.add(resident := work())
    first = made.pick(1.0, resident={A})
    assert first is not None
    assert first.loads
    assert ids(made.pick(1.0, resident={A})) == [resident.id]


def test_after_a_load_resident_work_has_three_times_as_long() -> None:
    made = scheduler(work(spec=B, key="b"), unmeasured_load_s=0.2)
    first = made.pick(1.0, resident={A})
    assert first is not None
    made.note_load(2.0, B, 0.2)
    made.finished(first)
    for now, expected in ((2.59, A), (2.61, "spec-c")):
        made.add(work("c", spec="spec-c"))
        made.add(work(arrived=2.0))
        pick = made.pick(now, resident={A})
        assert pick is not None
        assert pick.spec == expected


def test_a_short_load_does_not_cut_the_pause_after_a_long_one() -> None:
    made = scheduler(work("b", spec=B), work("c", spec="spec-c"), unmeasured_load_s=0.1)
    picks = [made.pick(1.0, resident=()) for _ in range(2)]
    made.note_load(2.0, B, 0.9)
    made.note_load(2.0, "spec-c", 0.01)
    for pick in picks:
        assert pick is not None
        made.finished(pick)
    made.add(work("d", spec="spec-d"))
    made.add(resident := work())
    assert ids(made.pick(4.0, resident={A})) == [resident.id]


def test_overdue_requests_for_absent_models_do_not_starve_older_resident_ones() -> None:
    made = scheduler(resident := work(arrived=1.0), work("b", spec=B, arrived=1.1), unmeasured_load_s=0.1)
    assert ids(made.pick(5.0, resident={A})) == [resident.id]


def test_overdue_requests_of_a_tenant_who_had_much_wait_for_those_of_one_who_had_little() -> None:
    made = scheduler(work(tenant="busy"), unmeasured_load_s=0.1)
    made.pick(0, resident={A})
    made.add(work("b", spec=B, tenant="busy"))
    made.add(resident := work(tenant="new", arrived=4.0))
    assert ids(made.pick(5.0, resident={A})) == [resident.id]


def test_a_lower_lane_keeps_its_turn_until_loading_is_allowed_again() -> None:
    made = scheduler(work("b", spec=B), unmeasured_load_s=0.1)
    before = made.pick(1.0, resident={A})
    assert before is not None
    made.note_load(1.0, B, 0.5)
    made.finished(before)
    made.add(low := work("low", spec="low", lane=Lane.BATCH))
    for _ in range(20):
        made.add(resident := work())
        assert ids(made.pick(2.4, resident={A})) == [resident.id]
    made.add(work("c", spec="spec-c"))
    assert ids(made.pick(2.6, resident={A})) == [low.id]


def test_a_load_in_the_background_holds_up_no_other() -> None:
    made = scheduler(work("b", spec=B), unmeasured_load_s=0.1)
    before = made.pick(0.0, resident={A})
    assert before is not None
    made.finished(before)
    made.note_load(1.0, B, 0.9)  # evicted, and hinted back
    made.add(work("c", spec="spec-c"))
    made.add(work())
    pick = made.pick(1.1, resident={A})
    assert pick is not None
    assert pick.spec == "spec-c"


def test_a_batch_that_died_while_loading_holds_up_no_other() -> None:
    made = scheduler(work("b", spec=B), unmeasured_load_s=0.1)
    lost = made.pick(1.0, resident={A})
    assert lost is not None
    made.finished(lost)
    made.add(work("c", spec="spec-c"))
    made.add(work())
    pick = made.pick(1.1, resident={A})
    assert pick is not None
    assert pick.spec == "spec-c"


def test_a_model_that_loads_long_does_not_hide_one_that_loads_quickly() -> None:
    made = scheduler(work("b", spec=B), work("c", spec="spec-c"), work(arrived=1.0), unmeasured_load_s=0.1)
    made.note_load(0.0, B, 20.0)
    pick = made.pick(100.0, resident={A})
    assert pick is not None
    assert pick.spec == "spec-c"


def test_what_loads_in_the_background_is_not_loaded_in_the_foreground() -> None:
    made = scheduler(work("b", spec=B), resident := work(), unmeasured_load_s=0.1)
    assert ids(made.pick(5.0, resident={A}, loading={B})) == [resident.id]


def test_the_hint_names_lower_lanes_in_their_turn() -> None:
    """Absent models of the first lane never cease; those of a lower one are announced all the same."""
    made = scheduler(work("b", spec=B, lane=Lane.BATCH), work("c", spec="spec-c"))
    assert B in {made.next_absent(0, resident={A}) for _ in range(8)}
