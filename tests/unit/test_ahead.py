"""A host is given its next micro-batch before it needs it, and as late as that allows."""

import pytest

from tests.unit.works import A, scheduler, work
from workers.ahead import Ahead
from workers.work import Pick

S_PER_TOKEN = 0.001
HOST, OTHER = 1, 2


def ahead(*, gather_s: float = 0.03) -> Ahead:
    made = scheduler(gather_s=gather_s)
    made.pace.learn("a", 1000, 1000 * S_PER_TOKEN)
    return Ahead(made)


def pick(tokens: int = 100, key: str = "a") -> Pick:
    return Pick((), key, A, loads=False, tokens=tokens, items=1)


def test_a_host_without_anything_is_given_something_at_once() -> None:
    made = ahead()
    made.sent(OTHER, 1, pick(), now=5.0)
    assert made.wait_s(HOST, 5.0) == 0


def test_one_that_computes_is_given_more_when_half_of_it_should_be_done() -> None:
    made = ahead()
    made.sent(HOST, 1, pick(40), now=5.0)
    assert made.wait_s(HOST, 5.0) == pytest.approx(0.02)
    assert made.wait_s(HOST, 5.01) == pytest.approx(0.01)
    assert made.wait_s(HOST, 5.03) == 0


def test_it_is_not_put_off_for_long_whatever_is_thought_of_the_batch_before() -> None:
    made = ahead()
    made.sent(HOST, 1, pick(5000), now=5.0)
    assert made.wait_s(HOST, 5.0) == pytest.approx(0.03)


def test_a_batch_that_waits_for_its_model_holds_nobody_up() -> None:
    made = ahead()
    made.sent(HOST, 1, Pick((), "a", A, loads=True, tokens=100, items=1), now=5.0)
    assert made.wait_s(HOST, 5.0) == 0
    made.sent(HOST, 2, pick(), now=5.0)
    made.done(HOST, 2, now=5.1)
    assert made.wait_s(HOST, 5.1) == 0


def test_what_is_done_out_of_turn_does_not_start_the_first_anew() -> None:
    made = ahead()
    made.sent(HOST, 1, pick(40), now=5.0)
    made.sent(HOST, 2, pick(40), now=5.01)
    made.done(HOST, 2, now=5.015)
    assert made.wait_s(HOST, 5.015) == pytest.approx(0.005)


def test_what_stands_behind_another_is_computed_from_its_end() -> None:
    made = ahead()
    made.sent(HOST, 1, pick(40), now=5.0)
    made.sent(HOST, 2, pick(50), now=5.02)
    made.done(HOST, 1, now=5.2)
    assert made.wait_s(HOST, 5.2) == pytest.approx(0.025)
    made.done(HOST, 2, now=5.3)
    assert made.wait_s(HOST, 5.3) == 0


def test_it_waits_for_nothing_that_was_never_measured() -> None:
    made = ahead()
    made.sent(HOST, 1, pick(key="new"), now=5.0)
    assert made.wait_s(HOST, 5.0) == 0


def test_devices_of_their_own_are_fed_at_once() -> None:
    made = ahead(gather_s=0.0)
    made.sent(HOST, 1, pick(), now=5.0)
    assert made.wait_s(HOST, 5.0) == 0


def test_while_others_ask_nothing_is_put_behind_what_lasts() -> None:
    made = scheduler(work(tenant="loud"), work("b", tenant="quiet"), gather_s=0.03, shared_s=0.04)
    made.pace.learn("a", 1000, 1000 * S_PER_TOKEN)
    one = Ahead(made)
    one.sent(HOST, 1, pick(100), now=0.1)
    assert one.wait_s(HOST, 0.19) is None


def test_a_host_that_died_and_what_was_given_up_are_forgotten() -> None:
    made = ahead()
    made.sent(HOST, 1, pick(), now=5.0)
    made.sent(OTHER, 2, pick(), now=5.0)
    made.lost(HOST)
    assert made.wait_s(HOST, 5.0) == 0
    assert made.wait_s(OTHER, 5.0)
    made.forget()
    assert made.wait_s(OTHER, 5.0) == 0
    made.done(OTHER, 2, now=5.1)
