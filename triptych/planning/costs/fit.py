"""Costs from measurements: least squares of relative errors, in which no cost is below 0."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

import numpy as np
import numpy.typing as npt

from triptych.planning.costs.profile import Residual

Floats = npt.NDArray[np.float64]
OUTLIER = 2.5  # times the median error
LEAST_ERROR = 1e-6
ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """What was in one step, by the names of the costs that it pays, and how long it took."""

    amounts: Mapping[str, float]
    seconds: float


@dataclass(frozen=True, slots=True)
class Fit:
    costs: dict[str, float]  # seconds of one of each
    residual: Residual


def fit(samples: Sequence[Sample], names: Sequence[str]) -> Fit:
    """The costs that describe the samples best. Of equal steps the median counts, so that one that was disturbed counts
    for nothing; the residual is over these medians. A cost that no sample pays is 0."""
    assert samples, "nothing was measured"
    groups: dict[tuple[float, ...], list[float]] = {}
    for sample in samples:
        groups.setdefault(tuple(sample.amounts.get(name, 0.0) for name in names), []).append(sample.seconds)
    seconds = np.array([median(of_one) for of_one in groups.values()])
    assert seconds.min() > 0, "a step that took no time"
    relative = np.array(list(groups)) / seconds[:, None]
    costs, errors = _robust(relative)
    residual = Residual(samples=len(samples), median=float(np.median(errors)), worst=float(errors.max()))
    return Fit(dict(zip(names, map(float, costs), strict=True)), residual)


def _robust(relative: Floats) -> tuple[Floats, Floats]:
    """Costs, and the relative error of each sample. Errors that are many times the median count as if they were no more
    than that (Huber's weights): one sample that something disturbed must not bend all costs."""
    weights = np.ones(len(relative))
    for _ in range(ROUNDS):
        costs = _nonnegative(relative * weights[:, None], weights)
        errors = np.abs(relative @ costs - 1.0)
        bound = OUTLIER * max(float(np.median(errors)), LEAST_ERROR)
        weights = np.sqrt(np.minimum(1.0, bound / np.maximum(errors, LEAST_ERROR)))
    return costs, errors


def _nonnegative(relative: Floats, target: Floats) -> Floats:
    """Least squares of `relative @ costs = target` with no cost below 0: that of the best set of columns whose own
    least squares are positive. There are few columns, so all sets are tried, which needs no tolerance."""
    scale = relative.max(axis=0)  # columns differ by ten powers of ten
    paid = [int(column) for column in np.flatnonzero(scale)]
    best, best_error = np.zeros(len(scale)), float("inf")
    for size in range(1, len(paid) + 1):
        for columns in combinations(paid, size):
            chosen = list(columns)
            found, *_ = np.linalg.lstsq(relative[:, chosen] / scale[chosen], target, rcond=None)
            error = float(np.sum((relative[:, chosen] / scale[chosen] @ found - target) ** 2))
            if found.min() >= 0 and error < best_error * (1 - 1e-9):
                best, best_error = np.zeros(len(scale)), error
                best[chosen] = found / scale[chosen]
    return best
