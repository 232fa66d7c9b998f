"""How numbers and picture sizes of a workload are spread: what a workload file may say, and numpy arrays of samples.

In a file a plain number is always the same, a list is drawn from evenly, and everything else is an object that names
its `distribution`.
"""

import re
from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from triptych.planning.quantities import PixelSize, parse_pixels

MOST = 10_000_000
Number = Annotated[float, Meta(ge=0, le=MOST)]
Positive = Annotated[float, Meta(gt=0, le=MOST)]
Numbers = Annotated[list[Number], Meta(min_length=1)]
PixelSizes = Annotated[list[PixelSize], Meta(min_length=1)]
Shape = str  # "WIDTH:HEIGHT", as in PixelSize
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class _Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="distribution"):
    """The object says which one it is."""


class Uniform(_Named, frozen=True, kw_only=True, tag="uniform"):
    """Everything between the two is as likely; of whole numbers both ends too."""

    least: Number
    most: Number

    def __post_init__(self) -> None:
        _check_bounds(self.least, self.most)


class Normal(_Named, frozen=True, kw_only=True, tag="normal"):
    """What falls outside of the bounds is moved to the nearer one."""

    mean: Number
    deviation: Number
    least: Number = 0.0
    most: Number | None = None

    def __post_init__(self) -> None:
        _check_bounds(self.least, self.most)


class Lognormal(_Named, frozen=True, kw_only=True, tag="lognormal"):
    """`mean` is that of the numbers themselves, `cv` their deviation over their mean. What falls outside of the bounds
    is moved to the nearer one."""

    mean: Positive
    cv: Number
    least: Number = 0.0
    most: Number | None = None

    def __post_init__(self) -> None:
        _check_bounds(self.least, self.most)


class Values(_Named, frozen=True, kw_only=True, tag="values"):
    """So many times each value as its weight says."""

    values: Numbers
    weights: Numbers

    def __post_init__(self) -> None:
        check_weights(len(self.values), self.weights)


Distribution = Number | Numbers | Uniform | Normal | Lognormal | Values


class SizeValues(_Named, frozen=True, kw_only=True, tag="values"):
    """So many times each size as its weight says."""

    values: PixelSizes
    weights: Numbers

    def __post_init__(self) -> None:
        check_sizes(self.values, "values")
        check_weights(len(self.values), self.weights)


class Megapixels(_Named, frozen=True, kw_only=True, tag="megapixels"):
    """An area, and independently of it one of the shapes: "4:3" lies on its side, "3:4" stands upright."""

    megapixels: Distribution
    shapes: Annotated[list[Shape], Meta(min_length=1)] = msgspec.field(default_factory=lambda: ["4:3", "3:4"])

    def __post_init__(self) -> None:
        for index, shape in enumerate(self.shapes):
            if re.fullmatch("[1-9][0-9]?:[1-9][0-9]?", shape) is None:
                raise ValueError(f"shapes[{index}]: {shape!r} is no shape; use WIDTH:HEIGHT such as 4:3")


Sizes = PixelSize | PixelSizes | SizeValues | Megapixels


def sample(distribution: Distribution, rng: np.random.Generator, number: int) -> Floats:
    match distribution:
        case Uniform(least=least, most=most):
            return rng.uniform(least, most, number)
        case Normal(mean=mean, deviation=deviation):
            return _clipped(rng.normal(mean, deviation, number), distribution)
        case Lognormal(mean=mean, cv=cv):
            sigma = np.sqrt(np.log1p(cv * cv))
            return _clipped(rng.lognormal(np.log(mean) - 0.5 * sigma * sigma, sigma, number), distribution)
        case Values(values=values, weights=weights):
            return np.array(values)[pick(weights, rng, number)]
        case list():
            return np.array(distribution)[rng.integers(len(distribution), size=number)]
        case _:
            return np.full(number, float(distribution))


def counts(distribution: Distribution, rng: np.random.Generator, number: int, *, least: int = 0) -> Integers:
    """Whole numbers of at least `least`."""
    if isinstance(distribution, Uniform):  # rounded it would give half as many of both ends
        low, high = round(distribution.least), round(distribution.most)
        drawn = rng.integers(low, high, size=number, endpoint=True)
    else:
        drawn = np.rint(sample(distribution, rng, number)).astype(np.int64)
    return np.maximum(drawn, least)


def pixel_sizes(sizes: Sizes, rng: np.random.Generator, number: int) -> list[tuple[int, int]]:
    """Widths and heights."""
    match sizes:
        case Megapixels():
            return _shaped(sizes, rng, number)
        case SizeValues(values=values, weights=weights):
            known, drawn = values, pick(weights, rng, number)
        case list():
            known, drawn = sizes, rng.integers(len(sizes), size=number)
        case _:
            known, drawn = [sizes], np.zeros(number, np.int64)
    parsed = [parse_pixels(size) for size in known]
    return [parsed[index] for index in drawn.tolist()]


def pick(weights: Sequence[float] | Floats, rng: np.random.Generator, number: int) -> Integers:
    """Indices, each as often as its weight says."""
    cumulative = np.cumsum(weights)
    drawn: Integers = np.searchsorted(cumulative, rng.random(number) * cumulative[-1], side="right")
    return np.minimum(drawn, len(cumulative) - 1)


def check_sizes(sizes: Sizes, key: str) -> None:
    """Raises ValueError naming the key."""
    known = enumerate(sizes) if isinstance(sizes, list) else [(None, sizes)]
    for index, size in known:
        if isinstance(size, str):
            try:
                parse_pixels(size)
            except ValueError as error:
                raise ValueError(f"{key if index is None else f'{key}[{index}]'}: {error}") from None


def check_weights(number: int, weights: list[float]) -> None:
    if len(weights) != number:
        raise ValueError(f"weights: {len(weights)} weights for {number} values; one weight for each value is needed")
    if not sum(weights) > 0:
        raise ValueError("weights: all weights are 0; at least one must be above 0")


def _check_bounds(least: float, most: float | None) -> None:
    if most is not None and least > most:
        raise ValueError(f"least: {least:g} is above most, {most:g}; at most that is needed")


def _clipped(drawn: Floats, bounds: Normal | Lognormal) -> Floats:
    return np.clip(drawn, bounds.least, MOST if bounds.most is None else bounds.most)


def _shaped(sizes: Megapixels, rng: np.random.Generator, number: int) -> list[tuple[int, int]]:
    pixels = 1e6 * sample(sizes.megapixels, rng, number)
    shapes = np.array([[int(side) for side in shape.split(":")] for shape in sizes.shapes])
    widths, heights = shapes[rng.integers(len(shapes), size=number)].T
    scale = np.sqrt(pixels / (widths * heights))
    sides = np.maximum(np.rint([widths * scale, heights * scale]), 1).astype(np.int64)
    return list(zip(*sides.tolist(), strict=True))
