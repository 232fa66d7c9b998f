"""When requests come: renewal processes, as a workload file may name them, and numpy arrays of times.

A process is drawn in intervals of mean 1 and stretched afterwards, so that the same seed gives the same pattern at
every rate, and the mean rate is exactly the one that was asked for.
"""

import math
from typing import Annotated, Protocol

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from triptych.planning.quantities import PerSecond

Floats = NDArray[np.float64]

MOST_CV = 100.0  # burstier ones come, for all that anybody can wait, never or all at once
LEAST_SHAPE = 0.2  # of a Weibull distribution, for the same reason: its cv is 16


class Intervals(Protocol):
    """Time between two arrivals, of mean 1."""

    def intervals(self, rng: np.random.Generator, number: int) -> Floats: ...

    def first(self, rng: np.random.Generator) -> float:
        """Of somebody who comes at an arbitrary moment, until the next arrival: with it as many arrive in any span of
        time, on average, as the rate says, also in a short one."""
        ...


class _Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="process"):
    """The object says which one it is."""


class Poisson(_Named, frozen=True, kw_only=True, tag="poisson"):
    rate: PerSecond

    def intervals(self, rng: np.random.Generator, number: int) -> Floats:
        return rng.standard_exponential(number)

    def first(self, rng: np.random.Generator) -> float:
        return float(rng.standard_exponential())


class Gamma(_Named, frozen=True, kw_only=True, tag="gamma"):
    """`cv`: deviation of the intervals over their mean. 1 is Poisson, above it is bursty, below it more even."""

    rate: PerSecond
    cv: Annotated[float, Meta(gt=0, le=MOST_CV)]

    @property
    def shape(self) -> float:
        return 1 / (self.cv * self.cv)

    def intervals(self, rng: np.random.Generator, number: int) -> Floats:
        return rng.gamma(self.shape, 1 / self.shape, number)

    def first(self, rng: np.random.Generator) -> float:
        return float(rng.random() * rng.gamma(self.shape + 1, 1 / self.shape))


class Weibull(_Named, frozen=True, kw_only=True, tag="weibull"):
    """`shape` 1 is Poisson, below it is bursty, above it more even."""

    rate: PerSecond
    shape: Annotated[float, Meta(ge=LEAST_SHAPE)]

    @property
    def scale(self) -> float:
        return 1 / math.gamma(1 + 1 / self.shape)

    def intervals(self, rng: np.random.Generator, number: int) -> Floats:
        return self.scale * rng.weibull(self.shape, number)

    def first(self, rng: np.random.Generator) -> float:
        longer = rng.gamma(1 + 1 / self.shape) ** (1 / self.shape)
        return float(rng.random() * self.scale * longer)


class Uniform(_Named, frozen=True, kw_only=True, tag="uniform"):
    """One after the other, always as far apart."""

    rate: PerSecond

    def intervals(self, rng: np.random.Generator, number: int) -> Floats:
        return np.ones(number)

    def first(self, rng: np.random.Generator) -> float:
        return 0.5


class AllAtOnce(_Named, frozen=True, kw_only=True, tag="all_at_once"):
    """Everything is there when the workload begins: offline inference."""


Arrivals = Poisson | Gamma | Weibull | Uniform | AllAtOnce


def first_times(arrivals: Arrivals, rng: np.random.Generator, number: int, factor: float = 1.0) -> Floats:
    """Of so many requests, `factor` times as fast as the process says. The first interval begins at 0."""
    if isinstance(arrivals, AllAtOnce):
        return np.zeros(number)
    return np.cumsum(arrivals.intervals(rng, number)) / (arrivals.rate * factor)


def times_within(arrivals: Arrivals, rng: np.random.Generator, seconds: float, factor: float = 1.0) -> Floats:
    """Of all requests within so many seconds."""
    assert not isinstance(arrivals, AllAtOnce), "what comes at once fills no span of time"
    rate = arrivals.rate * factor
    times, _ = until(arrivals, rng, arrivals.first(rng), seconds * rate)
    return times / rate


def until(process: Intervals, rng: np.random.Generator, first: float, end: float) -> tuple[Floats, float]:
    """Arrivals before `end`, in mean intervals, and the one after it, if the first one comes at `first`."""
    parts, last = [np.array([first])], first
    while last < end:
        number = int((end - last) * 1.05) + 16
        parts.append(last + np.cumsum(process.intervals(rng, number)))
        last = float(parts[-1][-1])
    times = np.concatenate(parts)
    number = int(np.searchsorted(times, end))
    return times[:number], float(times[number])
