import math
import statistics

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.latency import Objectives, Percentiles, percentile


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=50))
def test_percentiles_are_those_of_the_standard_library(values: list[float]):
    ordered = sorted(values)
    cuts = statistics.quantiles(ordered, n=100, method="inclusive")
    for percent in (50, 90, 99):
        assert percentile(ordered, percent) == pytest.approx(cuts[percent - 1])


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 9)), max_size=20))
def test_values_that_are_counted_have_the_percentiles_of_values_that_are_written_out(counted: list[tuple[float, int]]):
    written_out = [value for value, count in counted for _ in range(count)]
    one, other = Percentiles.of_repeated(counted), Percentiles.of(written_out)
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert msgspec.structs.astuple(one) == pytest.approx(msgspec.structs.astuple(other))


def test_nothing_has_no_percentiles():
    assert Percentiles.of([]) is None
    assert Percentiles.of_repeated([(1.0, 0)]) is None


@pytest.mark.parametrize(
    ("ttft_s", "tpot_s", "e2e_s", "met"),
    [
        (0.5, 0.05, 2.0, True),
        (0.51, 0.05, 2.0, False),
        (0.5, 0.051, 2.0, False),
        (0.5, None, 2.0, True),
        (0.5, 0.05, 2.1, False),
        (math.inf, None, math.inf, False),
    ],
)
def test_an_objective_is_met_at_its_limit_and_a_single_token_has_no_pace(
    ttft_s: float, tpot_s: float | None, e2e_s: float, met: bool
):
    assert Objectives(500, 50, 2000).met(ttft_s, tpot_s, e2e_s) is met


def test_without_objectives_all_is_well():
    assert not Objectives()
    assert Objectives().met(1e9, 1e9, 1e9)
    assert Objectives(tpot_ms=1.0)
