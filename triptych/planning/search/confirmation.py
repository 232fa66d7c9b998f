"""Whether what a search found lasts: the best candidates in longer runs with several seeds, at lower rates until every
run keeps the SLO.

A search looks at a few hundred requests, whose luck the best of many candidates had. The runs here are drawn and played
as `triptych simulate` does, so that it repeats them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import msgspec

from triptych.latency import Objectives
from triptych.planning.costs.profile import Profile
from triptych.planning.search.evaluation import Evaluator
from triptych.planning.search.load import Load
from triptych.planning.search.machines import ProfiledMachines, Reach
from triptych.planning.search.space import Candidate
from triptych.planning.simulation.figures import Figures
from triptych.planning.workloads.demand import Demand, Rows
from triptych.planning.workloads.workload import Workload

NUM_SEEDS = 3
LEAST_REQUESTS, MOST_REQUESTS = 2000, 5000  # of a run that is long enough
LEAST_TIMES = 30  # as long as the first token may take: what queues hide at the end of a run is then little of it
FIRST_STEP, STEP_GROWTH, MOST_STEP = 0.04, 1.6, 0.5  # between rates that are tried
TOLERANCE = 0.04  # of the highest rate that all runs keep
MARGIN = 0.04  # below it: three runs of 2,000 requests tell the mean load, with which a queue grows or not, no better
LEAST_IS_REACHED = 1.01  # rates have three digits


class Kept(msgspec.Struct, frozen=True):
    """A rate that every run kept, by a margin below the highest such; 0 and nothing where there is none."""

    rate: float
    figures: list[Figures]  # by seed


@dataclass(frozen=True, slots=True)
class At:
    """A candidate at a rate."""

    candidate: Candidate
    rate: float


@dataclass(frozen=True)
class Runs:
    """Of one workload, a run for each seed. It can be sent to another process."""

    where: str  # of the workload, for messages
    workload: Workload
    rows_of: Rows
    profiles: Mapping[int, Profile]
    objectives: Objectives
    target: float
    seeds: tuple[int, ...]

    def demands(self, rate: float, seed: int) -> list[Demand]:
        """Those of `triptych simulate` at this rate."""
        workload = msgspec.structs.replace(self.workload, seed=seed)
        return workload.at_rate(rate, self.where).demands(self.rows_of, self.where)

    def evaluator(self, rate: float, seed: int) -> Evaluator:
        demands = self.demands(rate, seed)
        machines = ProfiledMachines(self.profiles, Reach.of(demands))
        return Evaluator(Load(demands, rate), machines, self.objectives, self.target)

    def attained(self, candidate: Candidate, rate: float, seed: int) -> Figures | None:
        """None where the SLO is not kept, or where the requests of this seed do not fit."""
        evaluator = self.evaluator(rate, seed)
        return None if evaluator.misfit(candidate) else evaluator.attained(candidate, rate)

    def figures(self, candidate: Candidate, rate: float, seed: int) -> Figures:
        """At any rate."""
        return self.evaluator(rate, seed).figures(candidate, rate)


def kept(runs: Runs, about: At) -> Kept:
    """Of a candidate, looked for from a rate that may be about right. The seed that missed the SLO last is tried first:
    where it is missed again the others need not run."""
    order, found = list(runs.seeds), {}

    def attains(rate: float) -> bool:
        figures: dict[int, Figures] = {}
        for seed in list(order):
            one = runs.attained(about.candidate, rate, seed)
            if one is None:
                order.remove(seed)
                order.insert(0, seed)
                return False
            figures[seed] = one
        found[rate] = [figures[seed] for seed in runs.seeds]
        return True

    evaluator = runs.evaluator(about.rate, runs.seeds[0])
    if evaluator.misfit(about.candidate):
        return Kept(0.0, [])
    rate = kept_rate(attains, about.rate, least=evaluator.idle_rate, most=evaluator.bound(about.candidate))
    while rate >= evaluator.idle_rate:
        rate = _rounded(rate * (1 - MARGIN))
        if attains(rate):
            return Kept(rate, found[rate])
    return Kept(0.0, [])


def kept_rate(attains: Callable[[float], bool], guess: float, *, least: float, most: float) -> float:
    """About the highest rate at which `attains` is true, in three digits. Tried in small steps from the guess, which is
    near, and then halfway; 0.0 if it is false at `least` already."""
    low, high, step = 0.0, math.inf, FIRST_STEP
    rate = _rounded(min(max(guess, least), most))
    while True:
        if attains(rate):
            low = rate
        else:
            high = rate
        if low and (high <= low * (1 + TOLERANCE) or low >= most):
            return low
        if high <= least * LEAST_IS_REACHED:
            return 0.0
        if low and not math.isinf(high):
            rate = _rounded(math.sqrt(low * high))
            continue
        rate = _rounded(min(most, low * (1 + step)) if low else max(least, high * (1 - step)))
        if rate == low:  # no digit is left below the most
            return low
        step = min(MOST_STEP, step * STEP_GROWTH)


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


# ---- which runs


def enough_requests(objectives: Objectives, rate: float) -> int:
    """Of one run at about that rate."""
    limit_ms = objectives.ttft_ms if objectives.ttft_ms is not None else objectives.e2e_ms
    assert limit_ms is not None, "TTFT or all of the time must be bounded"
    return min(MOST_REQUESTS, max(LEAST_REQUESTS, math.ceil(LEAST_TIMES * rate * limit_ms / 1e3)))


def different_seeds(workload: Workload, number: int) -> tuple[int, ...]:
    """That of the workload, and those after it. A recorded trace is the same with any."""
    is_fixed = workload.trace is not None and not workload.kinds and workload.trace.format != "servegen"
    return tuple(workload.seed + index for index in range(1 if is_fixed else number))
