"""What is a hang and what is not, and that a hang is cut whatever the event loop does."""

from collections.abc import Callable

import psutil
import pytest

from tests.hosts import LivePool


def test_a_hang_is_cut_while_the_event_loop_is_blocked(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool()
    host = live.ready()[0].id
    live.run(host, live.spec(), "warm")
    live.send(host, live.spec(), "!hang", hang_s=0.2)
    live.process(host).wait(timeout=5)  # nobody runs the loop meanwhile
    live.until(lambda: live.events.lost, "loss")
    assert live.events.lost[0][3] == "hang"


def test_an_answer_not_yet_read_is_no_hang(start_pool: Callable[..., LivePool]) -> None:
    """The loop is blocked for longer than ``hang_s`` after a batch was answered: the host lives."""
    live = start_pool()
    host = live.ready()[0].id
    live.run(host, live.spec(), "warm")
    batch = live.send(host, live.spec(), "a", hang_s=0.1)
    with pytest.raises(psutil.TimeoutExpired):
        live.process(host).wait(timeout=0.5)
    live.until(lambda: batch in live.events.done, "results")
    assert live.events.lost == []


def test_a_slow_load_is_no_hang(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool()
    host, spec = live.ready()[0].id, live.spec(load_ms=500)
    batch = live.send(host, spec, "a", hang_s=0.1)
    live.until(lambda: spec.digest in live.pool.hosts()[0].loading, "loading")
    live.until(lambda: batch in live.events.done, "results")
    assert live.events.lost == []
    assert live.pool.hosts()[0].loading == frozenset()
