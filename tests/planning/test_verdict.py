"""Whether splitting pays is said in plain words, of what was looked at, and by how much."""

from dataclasses import replace

import pytest

from tests.planning.plans import make_question, make_row
from triptych.planning.search.goals import Goal, HighestRate, LeastCost
from triptych.planning.search.plan import Question, ordered
from triptych.planning.search.rivals import Rival
from triptych.planning.search.verdict import certainties, verdict


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


ONE_GPU = "With one GPU there is only the aggregated placement."


def test_on_one_gpu_it_is_said_that_there_is_no_choice():
    question = make_question(num_gpus=1)
    row, note = make_row("1epd", 2.0), "There is little room for load."
    assert verdict([row], HighestRate(), question, 1) == f"1epd keeps the SLO at 2 req/s. {ONE_GPU}"
    assert verdict([row], HighestRate(), question, 1, note) == f"{note} 1epd keeps the SLO at 2 req/s. {ONE_GPU}"
    assert verdict([], HighestRate(), question, 1) == f"No rate is kept, of the one placement looked at. {ONE_GPU}"


def test_no_difference_is_shown_where_one_that_is_behind_keeps_up_with_any_seed(question: Question):
    goal = HighestRate()
    split, whole = make_row("2e1pd", 4.0), make_row("3epd", 3.0)
    assert verdict([split, whole], goal, question, 12, rival=Rival(whole, 4.0, [1])) == (
        "No difference is shown, of the 12 placements looked at: 2e1pd keeps the SLO at 4 req/s in every run, the best "
        "aggregated one for no more money, 3epd, at 3, but with the seed 1 at 4 too."
    )
    assert verdict([split, whole], goal, question, 12, rival=Rival(whole, 4.0, [0, 1, 2])).endswith(
        "3epd, at 3, and at 4 too when tried there."
    )
    split, whole = make_row("2e1pd", 3.0), make_row("3epd", 4.0)
    assert verdict([whole, split], goal, question, 12, rival=Rival(split, 4.0, [0, 2])).endswith(
        "the best split one for no more money, 2e1pd, at 3, but with the seeds 0, 2 at 4 too. Disaggregation is not "
        "needed."
    )


def test_a_single_short_run_is_not_said_to_prove_anything():
    split, whole = make_row("2e1pd", 4.0), make_row("3epd", 3.0)
    for rows, words in (([split, whole], "Splitting seems to pay, of"), ([split], "Splitting seems to be needed, of")):
        assert verdict(rows, HighestRate(), make_question(num_confirming=0), 12).startswith(words)


def test_where_the_slo_leaves_no_room_that_is_what_is_said(question: Question):
    note = "Even alone on an idle 1epd only 90.0% of these requests keep the SLO."
    assert verdict([], HighestRate(), question, 3, note) == f"{note} No rate is kept, of the 3 placements looked at."
    words = verdict([make_row("1epd", 0.00285)], HighestRate(), question, 3, note)
    assert words == f"{note} 1epd keeps the SLO at 0.00285 req/s."


def test_it_is_told_how_sure_the_first_rate_is_and_that_of_the_best_of_the_other_kind(question: Question):
    rows = [make_row("2e1pd", 4.0), make_row("2ep1d", 3.5), make_row("3epd", 3.0)]
    runs = "92.0%, 90.0%, 95.0% of the requests met the SLO, in runs of 40 requests with the seeds 0, 1, 2."
    sure = [f"How sure: 2e1pd at 4 req/s: {runs}", f"How sure: 3epd at 3 req/s: {runs}"]
    assert certainties(rows, replace(question, usual_requests=40)) == sure
    assert certainties(rows[:2], replace(question, usual_requests=40)) == sure[:1]
    dearer, rival = make_row("4epd", 3.5, cost=8.0), Rival(rows[2], 4.0, [0, 1])
    assert certainties([rows[0], dearer, rows[2]], replace(question, usual_requests=40), rival) == sure


def test_runs_that_are_shorter_than_usual_are_said_to_be_a_matter_of_luck(question: Question):
    rows = [make_row("3epd", 4.0)]
    assert certainties(rows, question)[-1] == (
        "Few requests: runs of 40 confirm this, 2,000 are usual here: the verdict may hang on luck."
    )
    (unconfirmed,) = certainties(rows, make_question(num_confirming=0))
    assert unconfirmed == (
        "Not confirmed: rates are those that one run of 40 requests kept; longer ones may keep less, and the verdict "
        "may hang on luck."
    )
