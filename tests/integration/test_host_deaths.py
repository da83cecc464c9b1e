"""What dies and what is told: suspects, innocents, and another host in the lost one's place."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from tests.fakes.family import fake_vector
from tests.hosts import LivePool, code, vector


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("!segfault", "killed by SIGSEGV"),
        ("!exit", "exit 1"),
        ("!lost", "the device was lost"),
        ("!prepare-segfault", "killed by SIGSEGV"),
    ],
)
def test_what_kills_a_host_is_suspected_and_another_takes_its_place(
    start_pool: Callable[..., LivePool], text: str, reason: str
) -> None:
    live = start_pool()
    host, spec = live.ready()[0].id, live.spec()
    live.run(host, spec, "warm")
    batch = live.send(host, spec, "a", text)
    live.until(lambda: live.events.lost, "loss")
    assert live.events.lost == [(host, [batch], [], reason)]
    other = live.ready()[0].id
    assert other != host
    assert np.array_equal(vector(live.run(other, spec, "b")[0]), fake_vector("b"))


def test_a_batch_waiting_behind_the_killer_is_innocent(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool()
    host, spec = live.ready()[0].id, live.spec()
    live.run(host, spec, "warm")
    first = live.send(host, spec, "!hang", hang_s=0.3)
    second = live.send(host, spec, "b", hang_s=0.3)
    live.until(lambda: live.events.lost, "loss")
    assert live.events.lost == [(host, [first], [second], "hang")]
    live.ready()


def test_a_host_killed_from_outside_is_replaced(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool(hosts=2)
    victim, other = live.ready(2)
    running = live.send(victim.id, live.spec(), "!sleep:30")
    live.computing(victim.id, running)
    live.process(victim.id).kill()
    live.until(lambda: live.events.lost, "loss")
    assert live.events.lost == [(victim.id, [running], [], "killed by SIGKILL (out of memory?)")]
    assert {view.id for view in live.ready(2)} > {other.id}


def test_an_idle_host_killed_loses_nothing(start_pool: Callable[..., LivePool]) -> None:
    live = start_pool()
    live.process(live.ready()[0].id).kill()
    live.until(lambda: live.events.lost, "loss")
    assert live.events.lost[0][1:3] == ([], [])
    live.ready()


def test_a_model_whose_load_kills_is_refused_after_two_hosts(start_pool: Callable[..., LivePool]) -> None:
    """Its requests are innocent, so they come again whole: without an end to it they would kill hosts for ever."""
    live = start_pool()
    spec = live.spec(load_fails="segfault")
    for death in (1, 2):
        batch = live.send(live.ready()[0].id, spec, "a", "b")
        live.until(partial(_has_lost, live, death), "loss")
        assert live.events.lost[-1][1:3] == ([], [batch])
    parts = live.run(live.ready()[0].id, spec, "a", "b")
    assert [code(part) for part in parts] == ["MODEL_LOAD_FAILED"] * 2
    assert code(live.run(live.ready()[0].id, live.spec("fake/other"), "x")[0]) is None


def _has_lost(live: LivePool, count: int) -> bool:
    return len(live.events.lost) == count
