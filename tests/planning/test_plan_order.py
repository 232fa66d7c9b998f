"""Which of the candidates of a search are confirmed, and in which order they are told."""

from tests.planning.places import make_candidate
from tests.planning.plans import make_row
from triptych.planning.search.export import can_export
from triptych.planning.search.goals import Goal, HighestRate, LeastCost
from triptych.planning.search.plan import Row, chosen, ordered, reaches, searched
from triptych.planning.search.search import Found, Outcome


def make_outcome(goal: Goal, **found: tuple[float, float]) -> Outcome:
    """Goodput and cost by placement; the name may end in an underscore and a schedule."""
    candidates = []
    for name, each in found.items():
        placement, _, schedule = name[1:].partition("_")
        candidates.append((make_candidate(placement, schedule=schedule or "fcfs"), *each))
    best = [Found(*each, goal.score(min(each[1], goal.most), each[2])) for each in candidates]
    return Outcome(sorted(best, key=lambda one: -one.score), {}, 0, 0, len(best))


def placements(rows: list[Row] | list[Found]) -> list[str]:
    return [str(row.candidate) for row in rows]


def test_each_placement_is_chosen_once_with_its_best_setting():
    outcome = make_outcome(HighestRate(), _2ep1d=(3.0, 6.0), _2ep1d_sjf=(4.0, 6.0), _1e1pd=(2.0, 4.0))
    found = chosen(outcome, HighestRate())
    assert placements(found) == ["2ep1d", "1e1pd"]
    assert found[0].candidate.schedule == "sjf"


def test_a_placement_stands_where_its_best_setting_does():
    outcome = make_outcome(HighestRate(), _2ep1d_sjf=(4.0, 6.0), _1e1pd=(3.5, 4.0), _2ep1d=(3.0, 6.0))
    assert placements(chosen(outcome, HighestRate())) == ["2ep1d", "1e1pd"]


def test_the_best_aggregated_one_and_the_best_that_can_be_exported_are_chosen_however_far_behind():
    others = {f"_{n}ep1ed": (5.0 + n, 6.0) for n in range(1, 9)}
    outcome = make_outcome(HighestRate(), **others, _3epd=(1.0, 6.0), _2ep1d=(0.5, 6.0))
    assert placements(chosen(outcome, HighestRate()))[-1] == "3epd"
    assert placements(chosen(outcome, HighestRate(), can_export))[-1] == "3epd"
    better = make_outcome(HighestRate(), **others, _3epd=(1.0, 6.0), _2ep1d=(4.0, 6.0))
    assert placements(chosen(better, HighestRate(), can_export))[-2:] == ["3epd", "2ep1d"]
    without = make_outcome(HighestRate(), **others, _2ep1d=(0.5, 6.0))
    assert placements(chosen(without, HighestRate(), can_export))[-1] == "2ep1d"


def test_for_the_least_cost_the_cheapest_are_chosen_and_dearer_ones_in_case_these_do_not_last():
    goal = LeastCost(2.0)
    cheap = {f"_{n}ep1d": (2.0 + n / 10, 4.0) for n in range(1, 6)}
    outcome = make_outcome(searched(goal), **cheap, _3epd=(2.4, 6.0), _1e1pd=(1.0, 2.0))
    assert placements(chosen(outcome, goal)) == ["5ep1d", "4ep1d", "3ep1d", "3epd"]
    assert searched(goal).most > goal.most and searched(HighestRate()) == HighestRate()


def test_where_only_others_reach_the_rate_it_is_told_how_far_the_aggregated_and_the_exported_come():
    outcome = make_outcome(searched(LeastCost(2.0)), _2ep1ed=(2.5, 6.0), _2ep1d=(1.5, 6.0), _3epd=(1.0, 6.0))
    assert placements(chosen(outcome, LeastCost(2.0), can_export)) == ["2ep1ed", "3epd", "2ep1d"]


def test_of_those_that_are_as_good_the_cheapest_comes_first_and_the_aggregated_before_others():
    goal = HighestRate()
    rows = [make_row("2ep1d", 4.0), make_row("3epd", 3.95), make_row("1e1pd", 3.0)]
    assert placements(ordered(rows, goal)) == ["3epd", "2ep1d", "1e1pd"]
    cheaper = [make_row("2ep1d", 4.0, 6.0), make_row("3epd", 3.95, 6.0), make_row("1e1pd", 3.9, 4.0)]
    assert placements(ordered(cheaper, goal)) == ["1e1pd", "2ep1d", "3epd"]
    clear = [make_row("2ep1d", 4.0), make_row("3epd", 3.8)]
    assert placements(ordered(clear, goal)) == ["2ep1d", "3epd"]


def test_the_least_cost_comes_first_among_those_that_reach_what_is_wanted():
    goal = LeastCost(2.0)
    rows = [make_row(*each, goal=goal) for each in (("2ep1d", 2.5, 6.0), ("3epd", 2.1, 6.0), ("1e1pd", 1.9, 4.0))]
    assert placements(ordered(rows, goal)) == ["3epd", "2ep1d", "1e1pd"]
    assert [reaches(row, goal) for row in ordered(rows, goal)] == [True, True, False]
    assert ordered([], goal) == []
