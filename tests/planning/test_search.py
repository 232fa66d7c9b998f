"""A search finds what enumeration finds, looks at less, and finds the same with any number of processes."""

import msgspec
import pytest

from tests.planning.places import COSTS, make_candidate, make_evaluator, make_load
from triptych.core import Role
from triptych.errors import ConfigError
from triptych.latency import Objectives
from triptych.planning.costs.sizes import Sizes
from triptych.planning.search.evaluation import Evaluator
from triptych.planning.search.goals import Goal, HighestRate, LeastCost
from triptych.planning.search.machines import FixedMachines
from triptych.planning.search.search import Found, Outcome, enumerate_all, processes, search
from triptych.planning.search.space import Candidate, Space

STAGES = Space(num_gpus=4, roles=(Role.E, Role.P, Role.PD, Role.D, Role.EPD), most_roles=2)
QUICK = make_load(25, answer=3)


def searched(
    evaluator: Evaluator, goal: Goal, *, trials: int = 20, seed: int = 0, number: int = 1, space: Space = STAGES
) -> Outcome:
    with processes(evaluator, number) as ask:
        return search(space, evaluator, goal, ask, trials=trials, seed=seed)


def enumerated(evaluator: Evaluator, goal: Goal, space: Space = STAGES) -> Outcome:
    with processes(evaluator, 1) as ask:
        return enumerate_all(space, evaluator, goal, ask)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return make_evaluator(QUICK)


@pytest.fixture(scope="module")
def everything(evaluator: Evaluator) -> Outcome:
    return enumerated(evaluator, HighestRate())


def told(outcome: Outcome) -> list[tuple[str, float]]:
    return [(str(found.candidate), found.rate) for found in outcome.best]


def test_enumeration_knows_every_candidate(everything: Outcome):
    assert len(everything.best) == len(list(STAGES.candidates()))
    assert [one.score for one in everything.best] == sorted((one.score for one in everything.best), reverse=True)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_search_comes_within_three_percent_of_the_best(evaluator: Evaluator, everything: Outcome, seed: int):
    found = searched(evaluator, HighestRate(), seed=seed)
    assert found.best[0].rate >= 0.97 * everything.best[0].rate
    assert found.num_full < len(everything.best)
    whole, best_whole = found.aggregated(), everything.aggregated()
    assert whole is not None and best_whole is not None
    assert whole.rate >= 0.97 * best_whole.rate


def test_what_a_dollar_must_bring_leaves_gpus_unbought(evaluator: Evaluator, everything: Outcome):
    dear = HighestRate(beta=0.7)
    found = searched(evaluator, dear)
    assert found.best[0].candidate.num_gpus < everything.best[0].candidate.num_gpus
    best = max(dear.score(one.rate, one.cost) for one in everything.best)
    assert found.best[0].score >= best - 0.03 * everything.best[0].rate


def test_a_wanted_rate_is_bought_for_the_least(evaluator: Evaluator, everything: Outcome):
    wanted = LeastCost(0.6 * everything.best[0].rate)
    found = searched(evaluator, wanted)
    cheapest = min(one.cost for one in everything.best if one.rate >= wanted.most)
    assert found.best[0].cost == cheapest
    assert found.best[0].rate >= wanted.most


def test_where_nothing_reaches_the_wanted_rate_the_most_comes_first(evaluator: Evaluator, everything: Outcome):
    found = searched(evaluator, LeastCost(3 * everything.best[0].rate))
    assert found.best[0].rate == pytest.approx(everything.best[0].rate, rel=0.03)


def test_equal_searches_have_equal_outcomes_with_any_number_of_processes(evaluator: Evaluator):
    alone = searched(evaluator, HighestRate(), trials=8)
    assert searched(evaluator, HighestRate(), trials=8) == alone
    assert searched(evaluator, HighestRate(), trials=8, number=2) == alone


def test_trials_are_counted():
    done: list[int] = []
    evaluator = make_evaluator(make_load(10))
    with processes(evaluator, 1) as ask:
        search(STAGES, evaluator, HighestRate(), ask, trials=11, advance=lambda: done.append(1))
    assert len(done) == 11


class Narrow(FixedMachines):
    """Prefill fits nowhere but beside encode and decode."""

    def sizes(self, candidate: Candidate) -> dict[Role, Sizes]:
        if Role.EPD not in candidate.family:
            raise ConfigError("p: too small")
        return super().sizes(candidate)


def test_what_does_not_fit_is_counted_with_its_reason():
    evaluator = Evaluator(QUICK, Narrow(COSTS, Sizes()), Objectives(2000.0, 40.0), 0.9)
    found = searched(evaluator, HighestRate(), trials=8)
    narrow = {(one.placement, one.degrees) for one in STAGES.candidates() if Role.EPD not in one.family}
    assert found.rejected == {"p: too small": len(narrow)}, "each placement once, however often it is proposed"
    assert all(Role.EPD in one.candidate.family for one in found.best)


def test_where_nothing_fits_the_reason_is_told():
    evaluator = Evaluator(QUICK, Narrow(COSTS, Sizes()), Objectives(2000.0, 40.0), 0.9)
    space = msgspec.structs.replace(STAGES, roles=(Role.E, Role.PD))
    with pytest.raises(ConfigError, match="p: too small"):
        searched(evaluator, HighestRate(), space=space)
    with pytest.raises(ConfigError, match="--gpus: too few"):
        searched(evaluator, HighestRate(), space=msgspec.structs.replace(space, num_gpus=1))


def test_the_best_that_does_everything_everywhere_is_known():
    split, whole = (Found(make_candidate(placement), 2.0, 3.0, 2.0) for placement in ("1e1pd", "2epd"))
    assert Outcome([split, whole], {}, 0, 0, 2).aggregated() == whole
    assert Outcome([split], {}, 0, 0, 1).aggregated() is None
