"""Calls that are due on a real kombu loop."""

from collections.abc import Iterator
from time import monotonic
from typing import Any

import pytest
from kombu.asynchronous.hub import Hub

from workers.kicks import Kicks

LONG_S = 60.0


@pytest.fixture
def hub() -> Iterator[Any]:
    made = Hub()
    made.call_repeatedly(0.01, lambda: None)
    yield made
    made.close()


class Counted:
    def __init__(self) -> None:
        self.times: list[float] = []
        self.kicks = Kicks(lambda: self.times.append(monotonic()))

    def until(self, hub: Any, count: int) -> None:
        began = monotonic()
        while len(self.times) < count:
            assert monotonic() - began < 10, self.times
            hub.run_once()


def test_a_burst_is_one_call(hub: Any) -> None:
    counted = Counted()
    counted.kicks.use(hub)
    for _ in range(5):
        counted.kicks.soon()
    counted.until(hub, 1)
    counted.kicks.soon()
    counted.until(hub, 2)
    assert len(counted.times) == 2


def test_the_earlier_instant_counts(hub: Any) -> None:
    counted = Counted()
    counted.kicks.use(hub)
    began = monotonic()
    counted.kicks.at(began + LONG_S)
    counted.kicks.at(began + 0.05)
    counted.kicks.at(began + LONG_S)
    counted.until(hub, 1)
    assert counted.times[0] >= began + 0.05
    counted.kicks.at(monotonic() - 1)
    counted.until(hub, 2)


def test_without_a_loop_nothing_is_called_and_a_new_one_is_used(hub: Any) -> None:
    counted = Counted()
    counted.kicks.soon()
    counted.kicks.at(monotonic())
    counted.kicks.use(Hub())
    counted.kicks.soon()
    counted.kicks.at(monotonic() + LONG_S)
    counted.kicks.use(hub)  # the loop before it was reset and has forgotten
    counted.kicks.soon()
    counted.until(hub, 1)
    counted.kicks.at(monotonic() + 0.01)
    counted.until(hub, 2)
