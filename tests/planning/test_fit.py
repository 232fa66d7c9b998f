import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.planning.costs.fit import Sample, fit

NAMES = ("step", "item", "row")
COSTS = st.fixed_dictionaries(
    {"step": st.floats(1e-4, 1e-2), "item": st.floats(1e-4, 1e-1), "row": st.floats(1e-6, 1e-4)}
)


def samples_of(costs: dict[str, float], noise: float, seed: int) -> list[Sample]:
    rng = random.Random(seed)
    samples = []
    for items in (1, 2, 4, 8):
        for rows in (16, 64, 256, 1024):
            amounts = {"step": 1.0, "item": float(items), "row": float(items * rows)}
            exact = sum(costs[name] * amount for name, amount in amounts.items())
            samples += [Sample(amounts, exact * (1 + rng.uniform(-noise, noise))) for _ in range(5)]
    return samples


@given(COSTS)
@settings(deadline=None)
def test_costs_are_found_in_samples_without_noise(costs: dict[str, float]) -> None:
    found = fit(samples_of(costs, 0.0, 0), NAMES)
    assert found.costs == pytest.approx(costs, rel=1e-4)
    assert found.residual.worst < 1e-6
    assert found.residual.samples == 80


@given(COSTS, st.integers(0, 1000))
@settings(deadline=None)
def test_predictions_are_as_good_as_the_measurements(costs: dict[str, float], seed: int) -> None:
    found = fit(samples_of(costs, 0.1, seed), NAMES)
    for sample in samples_of(costs, 0.0, 0):
        foreseen = sum(found.costs[name] * amount for name, amount in sample.amounts.items())
        assert foreseen == pytest.approx(sample.seconds, rel=0.1)
    assert found.residual.median <= found.residual.worst <= 0.25


def test_one_disturbed_step_among_equal_ones_changes_nothing() -> None:
    costs = {"step": 1e-3, "item": 1e-2, "row": 1e-5}
    samples = samples_of(costs, 0.0, 0)
    samples += [Sample(samples[0].amounts, 10.0)]
    assert fit(samples, NAMES).costs == pytest.approx(costs, rel=1e-4)


def test_no_cost_is_below_0() -> None:
    falling = [Sample({"step": 1.0, "row": rows}, 1.0 - rows / 100) for rows in (1.0, 10.0, 50.0)]
    found = fit(falling, ("step", "row"))
    assert found.costs["row"] == 0.0
    assert found.costs["step"] > 0.0


def test_a_cost_that_nothing_pays_is_0() -> None:
    assert fit([Sample({"step": 1.0}, 0.5)], ("step", "row")).costs == {"step": pytest.approx(0.5), "row": 0.0}


def test_a_cost_that_nothing_pays_is_0_also_where_the_others_do_not_explain_everything() -> None:
    rng = random.Random(3)
    samples = [Sample({"token": float(n)}, 0.01 * n * rng.uniform(0.9, 1.1)) for n in range(1, 40)]
    assert fit(samples, ("token", "picture")).costs["picture"] == 0.0


def test_samples_that_were_disturbed_bend_the_costs_little() -> None:
    costs, rng = {"step": 1e-3, "item": 1e-2, "row": 1e-5}, random.Random(5)
    samples = [
        Sample(amounts, sum(costs[name] * amount for name, amount in amounts.items()) * rng.uniform(0.97, 1.03))
        for amounts in ({"step": 1.0, "item": float(n % 5), "row": float(n * 37 % 900)} for n in range(40))
    ]
    disturbed = [Sample(one.amounts, one.seconds * (2.0 if n % 10 == 0 else 1.0)) for n, one in enumerate(samples)]
    assert fit(disturbed, NAMES).costs == pytest.approx(fit(samples, NAMES).costs, rel=0.1)
