"""Whether splitting the stages pays, in a sentence."""

from triptych.planning.search.goals import Goal, LeastCost
from triptych.planning.search.search import Found, Outcome

TIE = 0.02  # two placements that differ by less are equally good: the search is no more exact than that


def verdict(outcome: Outcome, goal: Goal) -> str:
    """Of a search that found something."""
    split, whole = outcome.split(), outcome.aggregated()
    if not any(_serves(found, goal) for found in outcome.best):
        wanted = f"{goal.most:g} req/s" if isinstance(goal, LeastCost) else "any rate"
        return f"Nothing reaches {wanted} within the SLO: the most is {max(one.goodput for one in outcome.best):.3g}."
    if whole is None or not _serves(whole, goal):
        assert split is not None
        best = f"{whole.goodput:.3g} req/s" if whole is not None else "nothing"
        return f"Splitting is needed: aggregated instances reach {best}, {_told(split)}."
    if split is None or not _serves(split, goal):
        return f"Aggregated wins: only {_told(whole)}. Disaggregation is not needed."
    if isinstance(goal, LeastCost):
        return _by_cost(split, whole)
    return _by_goodput(split, whole)


def _serves(found: Found, goal: Goal) -> bool:
    return found.goodput >= goal.most if isinstance(goal, LeastCost) else found.goodput > 0


def _by_cost(split: Found, whole: Found) -> str:
    if whole.cost <= split.cost:
        more = f", {split.cost / whole.cost - 1:.0%} more" if split.cost > whole.cost else ""
        return (
            f"Aggregated wins: {whole.candidate} costs {_cost(whole)}, the best split placement, {split.candidate}, "
            f"{_cost(split)}{more}. Disaggregation is not needed."
        )
    return (
        f"Splitting pays: {split.candidate} costs {_cost(split)}, the best aggregated placement, {whole.candidate}, "
        f"{_cost(whole)}, {whole.cost / split.cost - 1:.0%} more."
    )


def _by_goodput(split: Found, whole: Found) -> str:
    same_cost = split.cost == whole.cost
    if abs(split.goodput - whole.goodput) <= TIE * max(split.goodput, whole.goodput) and same_cost:
        return f"No difference: {_told(split)}, and {_told(whole)}. Disaggregation is not needed."
    if whole.score > split.score or (whole.score == split.score and whole.cost <= split.cost):
        less = f"{1 - split.goodput / whole.goodput:.0%} less" if split.goodput < whole.goodput else "for more money"
        return (
            f"Aggregated wins: {_told(whole)}, the best split placement, {split.candidate}, {split.goodput:.3g} "
            f"({less}). Disaggregation is not needed."
        )
    times = split.goodput / whole.goodput
    return (
        f"Splitting pays: {_told(split)}, the best aggregated placement, {whole.candidate}, {whole.goodput:.3g}: "
        f"{times:.2f} times as much{'' if same_cost else f', at {split.cost / whole.cost:.2f} times the cost'}."
    )


def _told(found: Found) -> str:
    return f"{found.candidate} serves {found.goodput:.3g} req/s within the SLO"


def _cost(found: Found) -> str:
    return f"{found.cost:.4g} per hour"
