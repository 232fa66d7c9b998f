"""As many sequences are with the instances as decode together; fewer while answers are slower than wanted."""

from hypothesis import given
from hypothesis import strategies as st

from triptych.router.slots import EVERY_S, Slots

FEW = 4


def observed(slots: Slots, gap_s: float, seconds: float, *, num_out: int | None = None) -> int:
    """The number after so long, in which tokens came with that gap and every slot was used."""
    for step in range(int(seconds / 0.05)):
        slots.observe(gap_s, slots.number(1, FEW) if num_out is None else num_out, now=step * 0.05)
    return slots.number(1, FEW)


def test_without_an_objective_there_are_as_many_as_decode_together_and_a_few():
    slots = Slots(64)
    assert observed(slots, gap_s=9.0, seconds=5.0) == 64 + FEW
    assert slots.number(3, 2 * FEW) == 3 * 64 + 2 * FEW


def test_answers_that_are_fast_enough_leave_all_slots():
    assert observed(Slots(64, slo_tpot_s=0.1), gap_s=0.05, seconds=5.0) == 64 + FEW


def test_slow_answers_take_slots_away_down_to_a_few():
    slots = Slots(64, slo_tpot_s=0.1)
    assert FEW < observed(slots, gap_s=0.2, seconds=1.0) < 50
    assert observed(slots, gap_s=0.2, seconds=60.0) == FEW, "an objective that cannot be met stops nobody"


def test_slots_come_back_one_by_one_when_answers_are_fast_again():
    slots = Slots(64, slo_tpot_s=0.1)
    least = observed(slots, gap_s=0.2, seconds=10.0)
    now = 10.0
    for _ in range(40):
        now += EVERY_S
        for _ in range(50):
            slots.observe(0.01, slots.number(1, FEW), now)
    assert least + 20 < slots.number(1, FEW) <= 64 + FEW


def test_slots_that_nobody_uses_do_not_come_back():
    slots = Slots(64, slo_tpot_s=0.1)
    least = observed(slots, gap_s=0.2, seconds=10.0)
    for step in range(400):
        slots.observe(0.01, 0, now=10.0 + step * EVERY_S)
    assert slots.number(1, FEW) <= max(least, FEW) + 1


@given(st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(0, 100), st.floats(0.0, 1.0)), max_size=200))
def test_whatever_is_observed_the_number_stays_between_a_few_and_what_decodes_together(seen):
    slots, now = Slots(16, slo_tpot_s=0.1), 0.0
    for gap_s, num_out, passed_s in seen:
        now += passed_s
        slots.observe(gap_s, num_out, now)
        assert FEW <= slots.number(1, FEW) <= 16 + FEW
