"""A plan: what is asked, which of the candidates that a search found are confirmed, and in which order they stand."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import msgspec

from triptych.config import require
from triptych.core import Placement
from triptych.errors import ConfigError
from triptych.planning.costs.profile import Profile
from triptych.planning.search.confirmation import (
    NUM_SEEDS,
    At,
    Runs,
    different_seeds,
    enough_requests,
    kept,
)
from triptych.planning.search.evaluation import Evaluator
from triptych.planning.search.goals import Goal, LeastCost
from triptych.planning.search.load import Load
from triptych.planning.search.machines import ProfiledMachines, Reach
from triptych.planning.search.search import Asking, Found, Outcome
from triptych.planning.search.space import Candidate, Degrees, Space
from triptych.planning.simulation.figures import Figures
from triptych.planning.workloads.demand import Demand, Rows
from triptych.planning.workloads.workload import Slo, Workload

MOST_ROWS = 6
MOST_OF_A_COST = 3  # rows, where what counts is the cost
NUM_FIRST = 2  # of those that are confirmed: where the others begin is known then
USUAL_SHARE = 0.9  # of the rate that a search found
MOST_CURVES = 4
NUM_RATES = 6
LOWEST_RATE, HIGHEST_RATE = 0.4, 1.4  # of the best rate: where curves begin and end
HEADROOM = 1.2  # of a wanted rate: a search looks for so much more, as longer runs keep less
TIE = 0.03  # two placements that differ by less are equally good: no figure is more exact than that


@dataclass(frozen=True, slots=True)
class Question:
    """Everything that a plan depends on but the goal and the search."""

    where: str  # of the workload, for messages
    load: Load
    machines: ProfiledMachines
    space: Space
    evaluator: Evaluator
    runs: Runs  # that confirm what was found with the load
    is_confirmed: bool  # they are longer, or have other seeds
    usual_requests: int  # of one of them, where nobody says how many

    @classmethod
    def of(
        cls,
        *,
        where: str,
        workload: Workload,
        rows_of: Rows,
        slo: Slo,
        profiles: Mapping[int, Profile],
        num_gpus: int,
        choices: Mapping[str, Any],
        num_requests: int,
        num_confirming: int | None = None,
    ) -> "Question":
        """A search looks at `num_requests`, each run that confirms has `num_confirming`: None is as many as the rate
        needs, with 0 there is but one run, of the requests of the search. Rates of the search are those at which the
        demands come, whatever was meant: a few hundred of them are always faster or slower. Where there are phases, all
        rates are those of a factor of 1.

        Raises ConfigError where they have no rate, and for a request that the model cannot take.
        """
        demands = workload.with_requests(num_requests).demands(rows_of, where)
        load, reach = Load(demands, _rate(workload, demands, where)), Reach.of(demands)
        _checked(where, profiles, reach)
        objectives = slo.objectives
        space = Space(num_gpus=num_gpus, degrees=tuple(profiles), **choices)
        first = Evaluator(load, ProfiledMachines(profiles, reach), objectives, slo.attainment)
        usual = enough_requests(objectives, max(map(first.guess, space.aggregated()), default=0.0))
        num_confirming = usual if num_confirming is None else num_confirming
        longer = workload.with_requests(num_confirming or num_requests)
        seeds = different_seeds(workload, NUM_SEEDS if num_confirming else 1)
        runs = Runs(where, longer, rows_of, profiles, objectives, slo.attainment, seeds)
        confirming = [runs.demands(load.rate, seed) for seed in seeds]
        machines = _checked(where, profiles, Reach.of([*demands, *chain(*confirming)]))
        evaluator = Evaluator(load, machines, objectives, slo.attainment)
        is_confirmed = len(seeds) > 1 or len(confirming[0]) > len(demands)
        return cls(where, load, machines, space, evaluator, runs, is_confirmed, usual)

    @property
    def unit(self) -> str:
        """What placements are made of."""
        return "instance" if self.machines.shares_cores else "GPU"

    @property
    def size(self) -> str:
        """How many there may be."""
        number = self.space.num_gpus
        return f"{number} {self.unit}{'s' if number > 1 else ''}"


def _checked(where: str, profiles: Mapping[int, Profile], reach: Reach) -> ProfiledMachines:
    machines = ProfiledMachines(profiles, reach)
    machines.require_context(where)
    return machines


def _rate(workload: Workload, demands: Sequence[Demand], where: str) -> float:
    if workload.phases and workload.rate is not None:
        return workload.rate
    require(len(demands) > 1, where, "one request has no rate; a plan needs at least 2 of them")
    span_s = demands[-1].at_s - demands[0].at_s
    if span_s <= 0:
        raise ConfigError(f"{where}: arrivals: requests that come all at once have no rate; a plan needs one")
    return (len(demands) - 1) / span_s


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate, the highest rate at which all runs kept the SLO, and how it does there."""

    candidate: Candidate
    rate: float
    cost: float
    score: float
    runs: list[Figures]  # with each seed

    @property
    def figures(self) -> Figures:
        """Of the run with the first seed, as `triptych simulate` repeats it."""
        return self.runs[0]

    @property
    def attained(self) -> list[float]:
        return [one.slo_attainment or 0.0 for one in self.runs]


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate at several rates."""

    candidate: Candidate
    rates: list[float]
    figures: list[Figures]
    kept: float | None = None  # which of the rates it keeps, where that is known


# ---- which candidates are told


def searched(goal: Goal) -> Goal:
    """What a search is given."""
    return LeastCost(HEADROOM * goal.most) if isinstance(goal, LeastCost) else goal


def chosen(outcome: Outcome, goal: Goal, *also: Callable[[Candidate], bool]) -> list[Found]:
    """One for each placement, best first; the best aggregated one, and the best of each of `also`, in any case, also
    where they reach less than is wanted."""
    serving = [found for found in outcome.best if found.rate > 0]
    reaching = [found for found in serving if isinstance(goal, LeastCost) and found.rate >= goal.most]
    reaching.sort(key=lambda one: (one.cost, -one.rate))
    best = (_few_of_each_cost(_distinct(reaching)) or _distinct(serving))[:MOST_ROWS]
    everything = _distinct([*reaching, *serving])
    for is_wanted in (lambda one: one.is_aggregated, *also):
        first = next((found for found in everything if is_wanted(found.candidate)), None)
        if first is not None and first not in best:
            best.append(first)
    return best


def _distinct(found: Sequence[Found]) -> list[Found]:
    """The first of each placement, in their order."""
    first: dict[tuple[Placement, Degrees], Found] = {}
    for one in found:
        first.setdefault((one.candidate.placement, one.candidate.degrees), one)
    return list(first.values())


def _few_of_each_cost(found: Sequence[Found]) -> list[Found]:
    return [
        one
        for number, one in enumerate(found)
        if sum(other.cost == one.cost for other in found[:number]) < MOST_OF_A_COST
    ]


def rows(found: Sequence[Found], goal: Goal, ask: Asking[Runs]) -> list[Row]:
    """Those that longer runs confirm at some rate, best first."""
    confirmed = ask(kept, [At(one.candidate, USUAL_SHARE * one.rate) for one in found[:NUM_FIRST]])
    shares = [its.rate / one.rate for its, one in zip(confirmed, found, strict=False)]
    share = max(shares, default=0.0) or USUAL_SHARE  # their luck was much the same: requests were
    confirmed += ask(kept, [At(one.candidate, share * one.rate) for one in found[NUM_FIRST:]])
    return ordered(
        [
            Row(
                candidate=one.candidate,
                rate=its.rate,
                cost=one.cost,
                score=goal.score(min(its.rate, goal.most), one.cost),
                runs=its.figures,
            )
            for one, its in zip(found, confirmed, strict=True)
            if its.rate > 0
        ],
        goal,
    )


def ordered(found: Sequence[Row], goal: Goal) -> list[Row]:
    """Best first. Of those that are as good as the best, the cheapest, and the aggregated one before others."""
    if not found:
        return []
    best = max(found, key=lambda row: row.score)
    margin = 0.0 if isinstance(goal, LeastCost) and reaches(best, goal) else TIE * best.rate
    ties = [row for row in found if row.score >= best.score - margin and row.cost <= best.cost]
    first = min(ties, key=lambda row: (row.cost, not row.candidate.is_aggregated, -row.rate))
    others = [row for row in found if row is not first]
    return [first, *sorted(others, key=lambda row: (-row.score, row.cost, -row.rate))]


def reaches(row: Row, goal: Goal) -> bool:
    """Whether it serves as much as is wanted."""
    return row.rate >= goal.most if isinstance(goal, LeastCost) else row.rate > 0


# ---- curves over the rate


def curves(of: Sequence[Row], ask: Asking[Runs]) -> list[Curve]:
    """The first ones, and the aggregated one, at the same rates, and each at its own: with the requests of the run in
    which the fewest of a row met the SLO."""
    shown = [*of[: MOST_CURVES - 1], *[row for row in of[MOST_CURVES - 1 :] if row.candidate.is_aggregated][:1]]
    rates = spread(max(row.rate for row in of))
    found = []
    for row in shown:
        number = row.attained.index(min(row.attained))
        asked = [(At(row.candidate, rate), number) for rate in rates]
        figures = dict(zip(rates, ask(_figures, asked), strict=True)) | {row.rate: row.runs[number]}
        at = sorted(figures)
        found.append(Curve(candidate=row.candidate, rates=at, figures=[figures[rate] for rate in at], kept=row.rate))
    return found


def _figures(runs: Runs, asked: tuple[At, int]) -> Figures:
    at, number = asked
    return runs.figures(at.candidate, at.rate, runs.seeds[number])


def spread(rate: float) -> list[float]:
    """Rates below and above one."""
    step = (HIGHEST_RATE - LOWEST_RATE) / (NUM_RATES - 1)
    return [rate * (LOWEST_RATE + step * number) for number in range(NUM_RATES)]
