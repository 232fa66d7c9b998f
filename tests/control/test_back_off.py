"""How long a failing instance is left alone before the next attempt."""

from hypothesis import given
from hypothesis import strategies as st

from triptych.control.back_off import HEALTHY_S, LONGEST_S, BackOff


def test_the_first_restart_is_at_once_and_the_later_ones_ever_later() -> None:
    back_off = BackOff()
    assert [back_off.next_s(1.0) for _ in range(9)] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_a_minute_of_service_clears_what_was_before() -> None:
    back_off = BackOff()
    for _ in range(5):
        back_off.next_s(0.0)
    assert back_off.next_s(HEALTHY_S) == 0.0
    assert back_off.next_s(HEALTHY_S - 1) == 0.5


@given(st.lists(st.floats(0, 1e6), max_size=100))
def test_no_history_makes_it_wait_longer_than_the_bound(served: list[float]) -> None:
    back_off = BackOff()
    assert all(0 <= back_off.next_s(served_s) <= LONGEST_S for served_s in served)
