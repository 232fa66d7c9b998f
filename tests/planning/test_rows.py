"""Decode steps in a row: which of them runs when."""

from hypothesis import given
from hypothesis import strategies as st

from triptych.planning.costs.cost_model import Costs
from triptych.planning.simulation.rows import first_step_after

SECONDS = st.floats(0, 0.1)


@given(
    SECONDS, SECONDS, st.sampled_from([0.0, 1e-18, 1e-9, 1e-6, 1e-3]), SECONDS, st.integers(1, 40), st.integers(1, 60)
)
def test_the_first_step_that_ends_late_enough_is_found(
    step: float, sequence: float, context_s: float, seconds: float, number: int, most: int
) -> None:
    costs = Costs(decode_step=step, decode_sequence=sequence, decode_context=context_s)
    context = 100 * number
    assert first_step_after(costs, -seconds, number, 100 * number, most) == 1
    late = [count for count in range(1, most + 1) if costs.decodes_s(number, context, count) >= 10 * seconds]
    assert first_step_after(costs, 10 * seconds, number, context, most) == (late[0] if late else most)
