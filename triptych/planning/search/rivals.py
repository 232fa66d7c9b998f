"""Whether the best split and the best aggregated placement differ, or only the luck of a run: if the one that is behind
does as well as the first with most seeds, nothing tells them apart."""

from collections.abc import Sequence
from dataclasses import dataclass

from triptych.planning.search.confirmation import MARGIN, At, Runs
from triptych.planning.search.goals import Goal, LeastCost
from triptych.planning.search.plan import Row, reaches
from triptych.planning.search.search import Asking


@dataclass(frozen=True, slots=True)
class Rival:
    """Of the first row, of the other kind, for no more money."""

    row: Row
    rate: float  # with which it would be as good
    seeds: list[int]  # of the runs that keep it


def lucky_rival(rows: Sequence[Row], goal: Goal, seeds: Sequence[int], ask: Asking[Runs]) -> Rival | None:
    """None where it is behind with half of the seeds or more, or not behind. `rows` are in order."""
    row = _rival(rows, goal)
    if row is None:
        return None
    rate = goal.most if isinstance(goal, LeastCost) else goal.needed(rows[0].score, row.cost)
    if row.rate >= rate:
        return None
    keeps = ask(_keeps, [(At(row.candidate, rate), seed) for seed in seeds])
    lucky = [seed for seed, does in zip(seeds, keeps, strict=True) if does]
    return Rival(row, rate, lucky) if 2 * len(lucky) > len(seeds) else None


def _rival(rows: Sequence[Row], goal: Goal) -> Row | None:
    if not rows or not reaches(rows[0], goal):
        return None
    first = rows[0]
    others = (row for row in rows if row.candidate.is_aggregated != first.candidate.is_aggregated)
    return next((row for row in others if row.cost <= first.cost), None)


def _keeps(runs: Runs, asked: tuple[At, int]) -> bool:
    """By the same margin as the rows."""
    at, seed = asked
    return runs.attained(at.candidate, at.rate / (1 - MARGIN), seed) is not None
