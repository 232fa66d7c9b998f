"""Samples keep their bounds, their means and their weights."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.planning import files
from triptych.planning.workloads.distributions import (
    MOST,
    Distribution,
    Lognormal,
    Megapixels,
    Normal,
    Sizes,
    SizeValues,
    Uniform,
    Values,
    check_sizes,
    counts,
    pick,
    pixel_sizes,
    sample,
)

MANY = 100_000


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.mark.parametrize(
    ("distribution", "mean"),
    [
        (3.5, 3.5),
        ([1.0, 2.0, 6.0], 3.0),
        (Uniform(least=2, most=4), 3.0),
        (Normal(mean=50, deviation=5), 50.0),
        (Lognormal(mean=400, cv=1.5), 400.0),
        (Lognormal(mean=400, cv=0), 400.0),
        (Values(values=[1, 10], weights=[3, 1]), 3.25),
    ],
)
def test_samples_have_the_mean_that_was_asked_for(
    rng: np.random.Generator, distribution: Distribution, mean: float
) -> None:
    assert sample(distribution, rng, MANY).mean() == pytest.approx(mean, rel=0.02)


def test_the_deviation_of_a_lognormal_is_its_cv_times_its_mean(rng: np.random.Generator) -> None:
    assert sample(Lognormal(mean=100, cv=0.5), rng, MANY).std() == pytest.approx(50, rel=0.03)


@pytest.mark.parametrize("kind", [lambda b: Normal(mean=5, deviation=9, **b), lambda b: Lognormal(mean=5, cv=3, **b)])
def test_what_falls_outside_of_the_bounds_is_moved_to_them(rng: np.random.Generator, kind) -> None:
    drawn = sample(kind({"least": 2, "most": 8}), rng, MANY)
    assert (drawn.min(), drawn.max()) == (2, 8)


@pytest.mark.filterwarnings("error")
def test_no_number_is_larger_than_the_largest_that_may_be_written(rng: np.random.Generator) -> None:
    for wide in (Lognormal(mean=MOST, cv=MOST), Normal(mean=MOST, deviation=MOST)):
        assert counts(wide, rng, 10_000).max() == MOST


def test_a_normal_number_is_never_negative(rng: np.random.Generator) -> None:
    assert sample(Normal(mean=1, deviation=5), rng, MANY).min() == 0


def test_whole_numbers_of_a_uniform_distribution_are_equally_likely_up_to_both_ends(rng: np.random.Generator) -> None:
    numbers = np.bincount(counts(Uniform(least=1, most=4), rng, MANY))
    assert numbers[0] == 0
    assert numbers[1:] == pytest.approx([MANY / 4] * 4, rel=0.03)


def test_whole_numbers_are_rounded_and_at_least_the_least(rng: np.random.Generator) -> None:
    assert counts(2.6, rng, 3).tolist() == [3, 3, 3]
    assert counts(0, rng, 3, least=1).tolist() == [1, 1, 1]


@given(
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=6).filter(lambda weights: sum(weights) > 0),
    seed=st.integers(0, 100),
)
def test_what_has_no_weight_is_never_drawn(weights: list[float], seed: int) -> None:
    drawn = pick(weights, np.random.default_rng(seed), 200)
    assert all(weights[index] > 0 for index in drawn)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ("4032x3024", {(4032, 3024)}),
        (["10x20", "30x40"], {(10, 20), (30, 40)}),
        (SizeValues(values=["10x20", "30x40"], weights=[0, 1]), {(30, 40)}),
        (Megapixels(megapixels=12, shapes=["4:3"]), {(4000, 3000)}),
        (Megapixels(megapixels=0.000001, shapes=["1:1"]), {(1, 1)}),
    ],
)
def test_sizes_are_widths_and_heights(rng: np.random.Generator, sizes: Sizes, expected: set[tuple[int, int]]) -> None:
    assert set(pixel_sizes(sizes, rng, 100)) == expected


def test_megapixels_have_the_area_and_all_shapes(rng: np.random.Generator) -> None:
    sizes = pixel_sizes(Megapixels(megapixels=[1, 2]), rng, 1000)
    assert np.mean([width * height for width, height in sizes]) == pytest.approx(1.5e6, rel=0.02)
    assert {width > height for width, height in sizes} == {True, False}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (-1, "-1 is not valid; a number of at least 0 and at most 10000000 is needed"),
        ([], "expected array of length >= 1, got []"),
        ({"distribution": "norml"}, "did you mean 'normal'? known are uniform, normal, lognormal, values"),
        ({"distribution": "uniform", "least": 3, "most": 2}, "least: 3 is above most, 2; at most that is needed"),
        ({"distribution": "values", "values": [1, 2], "weights": [1]}, "1 weights for 2 values"),
        ({"distribution": "values", "values": [1], "weights": [0]}, "at least one must be above 0"),
        ({"distribution": "lognormal", "mean": 0, "cv": 1}, "mean: 0 is not valid; a number above 0 and at most 1000"),
        ({"distribution": "lognormal", "mean": 1e9, "cv": 1}, "mean: 1000000000.0 is not valid; a number above 0 and"),
    ],
)
def test_what_no_distribution_is_like_is_refused(value: object, told: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        files.convert(value, Distribution)  # type: ignore[type-var]
    assert told in str(caught.value)


@pytest.mark.parametrize("value", ["4032*3024", "0x10", "4032x", ["10x10", "ten"], "100000x1"])
def test_what_is_no_size_is_refused(value: Sizes) -> None:
    with pytest.raises(ValueError, match=r"^size.*: '.*' is no size in pixels; use WIDTHxHEIGHT such as 4032x3024"):
        check_sizes(value, "size")


def test_what_is_no_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^shapes\[1\]: '4/3' is no shape; use WIDTH:HEIGHT such as 4:3"):
        Megapixels(megapixels=1, shapes=["1:1", "4/3"])
