"""Arrivals come at exactly the rate that was asked for, as bursty as their process says."""

import numpy as np
import pytest

from triptych.planning import files
from triptych.planning.quantities import PerSecond
from triptych.planning.workloads.arrivals import (
    AllAtOnce,
    Arrivals,
    Gamma,
    Poisson,
    Uniform,
    Weibull,
    first_times,
    times_within,
)

RATE = PerSecond(4)
PROCESSES = [
    Poisson(rate=RATE),
    Gamma(rate=RATE, cv=0.3),
    Gamma(rate=RATE, cv=3),
    Weibull(rate=RATE, shape=0.6),
    Weibull(rate=RATE, shape=2),
    Uniform(rate=RATE),
]
MANY = 200_000


def rng(seed: int = 3) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("process", PROCESSES)
def test_a_number_of_requests_comes_at_the_rate(process: Arrivals) -> None:
    times = first_times(process, rng(), MANY)
    assert len(times) == MANY
    assert MANY / times[-1] == pytest.approx(RATE, rel=0.03)
    assert (np.diff(times) >= 0).all() and times[0] >= 0


@pytest.mark.parametrize("process", PROCESSES)
def test_in_a_short_time_as_many_come_on_average_as_the_rate_says(process: Arrivals) -> None:
    numbers = [len(times_within(process, rng(seed), 5.0)) for seed in range(2000)]
    error = 4 * np.std(numbers) / len(numbers) ** 0.5
    assert np.mean(numbers) == pytest.approx(5 * RATE, abs=error + 1e-9)


@pytest.mark.parametrize("process", PROCESSES)
def test_all_times_are_within_the_time_that_was_asked_for(process: Arrivals) -> None:
    times = times_within(process, rng(), 100.0)
    assert times.min() >= 0 and times.max() < 100


@pytest.mark.parametrize(
    ("process", "cv"),
    [(PROCESSES[0], 1), (PROCESSES[1], 0.3), (PROCESSES[2], 3), (PROCESSES[4], 0.5227), (PROCESSES[5], 0)],
)
def test_intervals_deviate_as_much_as_the_process_says(process: Arrivals, cv: float) -> None:
    """Of a Weibull distribution of shape 2: sqrt(4 / pi - 1)."""
    intervals = np.diff(first_times(process, rng(), MANY))
    assert intervals.std() / intervals.mean() == pytest.approx(cv, rel=0.03, abs=1e-9)


@pytest.mark.parametrize("process", PROCESSES)
def test_at_another_rate_the_same_pattern_is_played_faster(process: Arrivals) -> None:
    assert first_times(process, rng(), 50, 2.0) * 2 == pytest.approx(first_times(process, rng(), 50))
    assert times_within(process, rng(), 50.0, 2.0) * 2 == pytest.approx(times_within(process, rng(), 100.0))


def test_all_at_once_is_at_the_beginning() -> None:
    assert first_times(AllAtOnce(), rng(), 3).tolist() == [0, 0, 0]


def test_equal_intervals_are_equal() -> None:
    assert first_times(Uniform(rate=RATE), rng(), 3).tolist() == [0.25, 0.5, 0.75]
    assert times_within(Uniform(rate=RATE), rng(), 1.0).tolist() == [0.125, 0.375, 0.625, 0.875]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (
            {"process": "poison", "rate": "1 req/s"},
            "did you mean 'poisson'? known are poisson, gamma, weibull, uniform",
        ),
        ({"process": "poisson", "rate": "0 req/s"}, "rate: '0 req/s' is out of range; a finite number above 0"),
        ({"process": "poisson", "rate": 3}, "rate: 3 has no unit; use req/s, req/min or req/h"),
        ({"process": "gamma", "rate": "1 req/s", "cv": 0}, "cv: 0 is not valid; a number above 0 and at most 100"),
        ({"process": "weibull", "rate": "1 req/s", "shape": 0.1}, "shape: 0.1 is not valid; a number of at least 0.2"),
        ({"process": "all_at_once", "rate": "1 req/s"}, "rate: unknown key; known are process"),
    ],
)
def test_what_is_no_process_is_refused(value: object, told: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        files.convert(value, Arrivals)  # type: ignore[type-var]
    assert told in str(caught.value)
