"""The pace of an instance is learned; that of answers beside encoders is kept."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.core import RequestId, Stage
from triptych.engine.pace import MAX_PAUSE_S, Metronome, Pace

A, B = RequestId("a"), RequestId("b")


def test_a_stage_without_a_step_has_no_pace_and_the_first_step_sets_it():
    pace = Pace()
    assert pace.of(Stage.ENCODE) == 0.0
    pace.observe(Stage.ENCODE, 4, 2.0)
    assert pace.of(Stage.ENCODE) == 0.5


def test_steps_count_by_what_is_in_them():
    """If single units, of which each is dear, made the pace look slow, batches would be cut into more of them."""
    pace = Pace()
    for _ in range(100):
        pace.observe(Stage.ENCODE, 48, 0.0135)
        pace.observe(Stage.ENCODE, 16, 0.0065)
    assert pace.of(Stage.ENCODE) == pytest.approx(0.02 / 64, rel=0.05)


@given(st.integers(1, 60), st.integers(1, 64), st.floats(0.001, 0.1), st.floats(0, 0.01), st.booleans())
def test_a_row_of_steps_counts_as_single_ones(
    num_steps: int, num_tokens: int, first_s: float, more_s: float, has_begun: bool
):
    row, single = Pace(), Pace()
    for pace in (row, single) if has_begun else ():
        pace.observe(Stage.DECODE, 7, 0.02)
    row.observe_row(Stage.DECODE, num_tokens, num_steps, first_s, more_s)
    for number in range(num_steps):
        single.observe(Stage.DECODE, num_tokens, first_s + number * more_s)
    assert row.of(Stage.DECODE) == pytest.approx(single.of(Stage.DECODE))
    assert row.counters == pytest.approx(single.counters)


def test_totals_of_each_stage_are_kept():
    pace = Pace()
    pace.observe(Stage.DECODE, 4, 2.0)
    pace.observe(Stage.DECODE, 6, 1.0)
    assert pace.counters == {"decode_steps": 2.0, "decode_tokens": 10.0, "decode_busy_s": 3.0}


def test_without_an_interval_nobody_waits():
    metronome = Metronome(0.0)
    metronome.stepped([A], now=10.0)
    assert metronome.wait_s(10.0) <= 0.0


def test_the_next_step_is_due_an_interval_after_the_last():
    metronome = Metronome(0.03)
    metronome.stepped([A], now=10.0)
    assert metronome.wait_s(10.0) == pytest.approx(0.03)
    assert metronome.wait_s(10.05) < 0.0


def test_a_sequence_that_is_ahead_may_pause_but_not_for_longer_than_the_bound():
    metronome = Metronome(0.03)
    for step in range(100):
        metronome.stepped([A], now=10.0 + 0.001 * step)
    assert metronome.wait_s(10.099) == pytest.approx(MAX_PAUSE_S)


def test_the_sequence_that_is_furthest_behind_decides():
    metronome = Metronome(0.03)
    for _ in range(5):
        metronome.stepped([A], now=10.0)
    metronome.stepped([A, B], now=10.0)
    assert metronome.wait_s(10.0) == pytest.approx(0.03)


def test_sequences_that_ended_hold_nothing_up():
    metronome = Metronome(0.03)
    metronome.stepped([A], now=10.0)
    metronome.stepped([], now=10.0)
    assert metronome.wait_s(10.0) <= 0.0


@given(st.floats(0.001, 0.2), st.lists(st.floats(0.0, 0.3), min_size=1, max_size=40))
def test_nobody_is_ever_told_to_wait_longer_than_the_bound(interval_s: float, gaps: list[float]):
    metronome, now = Metronome(interval_s), 0.0
    for gap in gaps:
        now += gap
        metronome.stepped([A], now)
        assert metronome.wait_s(now) <= MAX_PAUSE_S + 1e-9
