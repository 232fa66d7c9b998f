"""Whether splitting pays is said in plain words, of what was looked at, and by how much."""

import pytest

from tests.planning.plans import make_question, make_row
from triptych.planning.search.goals import Goal, HighestRate, LeastCost
from triptych.planning.search.plan import Question, ordered
from triptych.planning.search.verdict import certainty, verdict


@pytest.fixture(scope="module")
def question() -> Question:
    return make_question()


def said(
    question: Question,
    goal: Goal,
    split: tuple[float, float],
    whole: tuple[float, float],
    *,
    price: float | None = 6.0,
) -> str:
    """Of a rate and a cost of each."""
    rows = [
        make_row(placement, *each, goal=goal, price=price)
        for placement, each in (("2e1pd", split), ("3epd", whole))
        if each[0] > 0
    ]
    return verdict(ordered(rows, goal), goal, question, 12)


@pytest.mark.parametrize(
    ("split", "whole", "words"),
    [
        ((4.0, 6.0), (2.0, 6.0), "Splitting pays, of the 12 placements looked at: 2e1pd keeps the SLO at 4 req/s, the "
         "best aggregated one, 3epd, at 2: 2.00 times as much."),
        ((3.0, 6.0), (4.0, 6.0), "Aggregated wins, of the 12 placements looked at: 3epd keeps the SLO at 4 req/s, the "
         "best split one, 2e1pd, at 3 (25% less). Disaggregation is not needed."),
        ((4.02, 6.0), (4.0, 6.0), "No difference, of the 12 placements looked at: 3epd keeps the SLO at 4 req/s, the "
         "best split one, 2e1pd, at 4.02. Disaggregation is not needed."),
        ((4.02, 6.0), (4.0, 4.0), "No difference, of the 12 placements looked at: 3epd keeps the SLO at 4 req/s, the "
         "best split one, 2e1pd, at 4.02, for 6 instead of 4 USD/h. Disaggregation is not needed."),
        ((4.0, 6.0), (0.0, 6.0), "Splitting is needed, of the 12 placements looked at: 2e1pd keeps the SLO at 4 req/s, "
         "no aggregated one does."),
        ((0.0, 6.0), (4.0, 6.0), "Aggregated wins, of the 12 placements looked at: 3epd keeps the SLO at 4 req/s, no "
         "split one does. Disaggregation is not needed."),
        ((4.0, 9.0), (2.0, 6.0), "Splitting pays, of the 12 placements looked at: 2e1pd keeps the SLO at 4 req/s, the "
         "best aggregated one, 3epd, at 2: 2.00 times as much, for 9 instead of 6 USD/h."),
    ],
)  # fmt: skip
def test_rates_are_compared(question: Question, split: tuple[float, float], whole: tuple[float, float], words: str):
    assert said(question, HighestRate(), split, whole) == words


@pytest.mark.parametrize(
    ("split", "whole", "words"),
    [
        ((2.0, 4.0), (2.0, 6.0), "Splitting pays, of the 12 placements looked at: 2e1pd keeps the SLO at 2 req/s for "
         "4 USD/h, the best aggregated one, 3epd, for 6 USD/h, 50% more."),
        ((2.0, 9.0), (2.0, 6.0), "Aggregated wins, of the 12 placements looked at: 3epd keeps the SLO at 2 req/s for "
         "6 USD/h, the best split one, 2e1pd, for 9 USD/h, 50% more. Disaggregation is not needed."),
        ((2.5, 6.0), (2.0, 6.0), "Aggregated wins, of the 12 placements looked at: 3epd keeps the SLO at 2 req/s for "
         "6 USD/h, the best split one, 2e1pd, for 6 USD/h. Disaggregation is not needed."),
        ((2.0, 6.0), (1.0, 6.0), "Splitting is needed, of the 12 placements looked at: 2e1pd keeps the SLO at 2 req/s, "
         "3epd only at 1."),
        ((1.0, 6.0), (0.5, 6.0), "Nothing keeps the SLO at 2 req/s, of the 12 placements looked at: the most is 1, by "
         "2e1pd."),
    ],
)  # fmt: skip
def test_costs_are_compared_where_both_reach_what_is_wanted(
    question: Question, split: tuple[float, float], whole: tuple[float, float], words: str
):
    assert said(question, LeastCost(2.0), split, whole) == words


def test_where_nothing_has_a_price_nothing_costs(question: Question):
    words = said(question, HighestRate(), (4.0, 3.0), (2.0, 2.0), price=None)
    assert "with 3 instead of 3 GPUs" in words and "cost" not in words and "USD" not in words


def test_on_one_gpu_there_is_nothing_to_split():
    words = verdict([make_row("1epd", 2.0)], HighestRate(), make_question(num_gpus=1), 1)
    assert words == "1epd keeps the SLO at 2 req/s. There is nothing to split on one GPU."


def test_where_the_slo_leaves_no_room_that_is_what_is_said(question: Question):
    note = "Even alone on an idle 1epd only 90.0% of these requests keep the SLO."
    assert verdict([], HighestRate(), question, 3, note) == f"{note} No rate is kept, of the 3 placements looked at."
    words = verdict([make_row("1epd", 0.00285)], HighestRate(), question, 3, note)
    assert words == f"{note} 1epd keeps the SLO at 0.00285 req/s."


def test_it_is_told_how_sure_a_rate_is(question: Question):
    row = make_row("3epd", 4.0)
    assert certainty(row, question) == (
        "How sure: at 4 req/s 92.0%, 90.0%, 95.0% of the requests met the SLO, in runs of 40 requests with the seeds "
        "0, 1, 2."
    )
    assert "Not confirmed" in certainty(row, make_question(num_confirming=0))
