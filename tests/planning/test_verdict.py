"""Whether splitting pays is said in plain words, and by how much."""

import pytest

from tests.planning.places import make_candidate
from triptych.planning.search.goals import Goal, LeastCost, MostGoodput
from triptych.planning.search.search import Found, Outcome
from triptych.planning.search.verdict import verdict

SPLIT, WHOLE = make_candidate("2e1pd"), make_candidate("3epd")


def said(goal: Goal, split: tuple[float, float], whole: tuple[float, float]) -> str:
    """Of a goodput and a cost of each."""
    found = [Found(SPLIT, *split, goal.score(*split)), Found(WHOLE, *whole, goal.score(*whole))]
    return verdict(Outcome(sorted(found, key=lambda one: -one.score), {}, 0, 0, 2), goal)


@pytest.mark.parametrize(
    ("split", "whole", "words"),
    [
        ((4.0, 6.0), (2.0, 6.0), "Splitting pays: 2e1pd serves 4 req/s within the SLO, the best aggregated placement, "
         "3epd, 2: 2.00 times as much."),
        ((3.0, 6.0), (4.0, 6.0), "Aggregated wins: 3epd serves 4 req/s within the SLO, the best split placement, "
         "2e1pd, 3 (25% less). Disaggregation is not needed."),
        ((4.02, 6.0), (4.0, 6.0), "No difference: 2e1pd serves 4.02 req/s within the SLO, and 3epd serves 4 req/s "
         "within the SLO. Disaggregation is not needed."),
        ((4.0, 6.0), (0.0, 6.0), "Splitting is needed: aggregated instances reach 0 req/s, 2e1pd serves 4 req/s within "
         "the SLO."),
        ((0.0, 6.0), (4.0, 6.0), "Aggregated wins: only 3epd serves 4 req/s within the SLO. Disaggregation is not "
         "needed."),
        ((4.0, 9.0), (2.0, 6.0), "Splitting pays: 2e1pd serves 4 req/s within the SLO, the best aggregated placement, "
         "3epd, 2: 2.00 times as much, at 1.50 times the cost."),
    ],
)  # fmt: skip
def test_goodputs_are_compared(split: tuple[float, float], whole: tuple[float, float], words: str):
    assert said(MostGoodput(), split, whole) == words


@pytest.mark.parametrize(
    ("split", "whole", "words"),
    [
        ((2.0, 4.0), (2.0, 6.0), "Splitting pays: 2e1pd costs 4 per hour, the best aggregated placement, 3epd, 6 per "
         "hour, 50% more."),
        ((2.0, 9.0), (2.0, 6.0), "Aggregated wins: 3epd costs 6 per hour, the best split placement, 2e1pd, 9 per hour, "
         "50% more. Disaggregation is not needed."),
        ((2.0, 6.0), (2.0, 6.0), "Aggregated wins: 3epd costs 6 per hour, the best split placement, 2e1pd, 6 per hour. "
         "Disaggregation is not needed."),
        ((2.0, 6.0), (1.0, 6.0), "Splitting is needed: aggregated instances reach 1 req/s, 2e1pd serves 2 req/s within "
         "the SLO."),
    ],
)  # fmt: skip
def test_costs_are_compared_where_both_reach_what_is_wanted(
    split: tuple[float, float], whole: tuple[float, float], words: str
):
    assert said(LeastCost(2.0), split, whole) == words


def test_where_nothing_reaches_what_is_wanted_the_most_is_told():
    assert said(LeastCost(9.0), (2.0, 6.0), (1.0, 6.0)) == "Nothing reaches 9 req/s within the SLO: the most is 2."
