"""The option ``keep_alive``: what the door lets through, and that it parts no micro-batches."""

from typing import Any

import pytest

from common.errors import RequestError
from tasks.batching import batch_key
from tasks.keep_alive import MAX_S, check_keep_alive, keep_alive_s
from tasks.names import Operation


@pytest.mark.parametrize("asked", [0, 0.5, 60, MAX_S])
def test_seconds_up_to_the_bound_are_taken(asked: float) -> None:
    check_keep_alive({"keep_alive": asked}, param="options")
    assert keep_alive_s({"keep_alive": asked}) == asked


def test_nothing_asked_is_nothing() -> None:
    for options in ({}, {"keep_alive": None}):
        check_keep_alive(options, param="options")
        assert keep_alive_s(options) is None


@pytest.mark.parametrize("asked", [-1, MAX_S + 1, float("nan"), float("inf"), "5m", True, [1], 10**400])
def test_anything_else_is_refused_with_its_field(asked: Any) -> None:
    with pytest.raises(RequestError, match="from 0 to 3600") as refused:
        check_keep_alive({"keep_alive": asked}, param="params.options")
    assert refused.value.param == "params.options.keep_alive"
    assert keep_alive_s({"keep_alive": asked}) is None  # of a message that passed no door


def test_it_parts_no_micro_batches() -> None:
    keys = {batch_key("m", "d", Operation.ENCODE, None, options) for options in ({}, {"keep_alive": 5})}
    assert len(keys) == 1
