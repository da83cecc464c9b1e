"""After how long a micro-batch is taken to hang."""

import pytest

from workers.policy import DispatchLimits

LIMITS = DispatchLimits(max_items=8, max_tokens=512, hang_floor_s=5.0, hang_unmeasured_s=60.0)


@pytest.mark.parametrize(
    ("expected_s", "hang_s"),
    [(None, 60.0), (0.0, 5.0), (0.5, 5.0), (0.75, 7.5), (3.0, 30.0), (20.0, 200.0)],
    ids=["never measured", "in no time", "at the floor", "above it", "slow", "slower than the unmeasured"],
)
def test_it_is_ten_times_what_was_measured_but_not_below_the_floor(expected_s: float | None, hang_s: float) -> None:
    assert LIMITS.hang_s(expected_s) == hang_s
