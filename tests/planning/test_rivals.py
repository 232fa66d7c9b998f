"""One seed does not decide what is better: whoever is behind is tried at the rate of the first with each of them."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.planning.plans import make_question, make_row
from triptych.planning.search.confirmation import MARGIN, At, Runs
from triptych.planning.search.goals import HighestRate, LeastCost
from triptych.planning.search.plan import Row, ordered
from triptych.planning.search.rivals import lucky_rival
from triptych.planning.search.search import processes


class Lucky:
    """Runs that keep the SLO at any rate with some seeds. Remembers what is asked."""

    def __init__(self, *seeds: int) -> None:
        self.seeds = seeds
        self.asked: list[tuple[At, int]] = []

    def __call__(self, ask: Callable[..., Any], about: Iterable[Any], /) -> list[Any]:
        self.asked = list(about)
        return [seed in self.seeds for _, seed in self.asked]


SEEDS = (0, 1, 2)
SPLIT, WHOLE = make_row("2e1pd", 4.0), make_row("3epd", 3.0)


@pytest.mark.parametrize("rows", [[SPLIT, WHOLE], [make_row("3epd", 4.0), make_row("2e1pd", 3.0)]])
def test_the_best_of_the_other_kind_is_tried_at_the_rate_of_the_first(rows: list[Row]):
    ask = Lucky(0, 1)
    found = lucky_rival(rows, HighestRate(), SEEDS, ask)
    assert found is not None
    assert (found.row, found.rate, found.seeds) == (rows[1], 4.0, [0, 1])
    assert ask.asked == [(At(rows[1].candidate, 4.0), seed) for seed in SEEDS]
    assert lucky_rival(rows, HighestRate(), SEEDS, Lucky(1)) is None


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [SPLIT],
        [SPLIT, make_row("2ep1d", 3.0)],
        [SPLIT, make_row("3epd", 3.0, cost=7.0)],  # dearer, and worse
        ordered([SPLIT, make_row("3epd", 3.95)], HighestRate()),  # as good in every run
    ],
)
def test_nobody_is_tried_who_is_of_the_same_kind_dearer_or_not_behind(rows: list[Row]):
    ask = Lucky(*SEEDS)
    assert lucky_rival(rows, HighestRate(), SEEDS, ask) is None
    assert not ask.asked


def test_for_a_cost_it_is_whoever_costs_no_more_and_misses_the_rate():
    goal = LeastCost(2.0)
    first, behind = make_row("1e1pd", 2.1, 4.0, goal=goal), make_row("2epd", 1.9, 4.0, goal=goal)
    dearer = make_row("3epd", 3.0, 6.0, goal=goal)
    found = lucky_rival(ordered([first, behind, dearer], goal), goal, SEEDS, Lucky(1, 2))
    assert found is not None
    assert (found.row, found.rate, found.seeds) == (behind, 2.0, [1, 2])
    assert lucky_rival(ordered([first, dearer], goal), goal, SEEDS, Lucky(1, 2)) is None
    assert lucky_rival([behind], goal, SEEDS, Lucky(1, 2)) is None


def test_seeds_are_those_of_the_runs_of_the_rows():
    runs: Runs = make_question(num_gpus=3, num_confirming=20).runs
    kept = {seed: rate for seed in SEEDS for rate in (1.0, 2.0, 3.0) if runs.attained(WHOLE.candidate, rate, seed)}
    rate = sorted(kept.values())[-2]  # with most seeds
    first = make_row("2e1pd", (1 - MARGIN) * rate)
    with processes(runs, 1) as ask:
        found = lucky_rival([first, make_row("3epd", 0.5)], HighestRate(), SEEDS, ask)
    assert found is not None
    assert found.seeds == [seed for seed in SEEDS if kept.get(seed, 0.0) >= rate]
