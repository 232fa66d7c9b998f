"""Decode steps in a row: which of them runs when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.planning.simulation.rows import StepTimes

SECONDS = st.floats(0, 0.1)


@given(SECONDS, st.sampled_from([0.0, 1e-18, 1e-9, 1e-6, 1e-3]), st.floats(0, 1), st.integers(1, 60))
def test_the_first_step_that_ends_late_enough_is_found(
    first_s: float, more_s: float, seconds: float, most: int
) -> None:
    times = StepTimes(first_s, more_s)
    assert times.first_after(-seconds, most) == 1
    late = [number for number in range(1, most + 1) if times.seconds(number) >= seconds]
    assert times.first_after(seconds, most) == (late[0] if late else most)


@given(SECONDS, st.floats(0, 1e-3), st.integers(1, 60))
def test_steps_in_a_row_take_as_long_as_one_by_one(first_s: float, more_s: float, number: int) -> None:
    assert StepTimes(first_s, more_s).seconds(number) == pytest.approx(
        sum(first_s + step * more_s for step in range(number))
    )
