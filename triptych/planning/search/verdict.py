"""Whether splitting the stages pays, in a sentence, and how sure that is."""

from collections.abc import Sequence

from triptych.planning.search.goals import Goal, LeastCost
from triptych.planning.search.plan import TIE, Question, Row, reaches
from triptych.planning.search.rivals import Rival

NOT_NEEDED = "Disaggregation is not needed."
PAYS, NEEDED, WINS = "Splitting pays", "Splitting is needed", "Aggregated wins"
UNSURE = {  # what is said instead where a single short run says so
    PAYS: "Splitting seems to pay",
    NEEDED: "Splitting seems to be needed",
    WINS: "Aggregated seems to win",
}


def verdict(
    rows: Sequence[Row],
    goal: Goal,
    question: Question,
    num_placements: int,
    note: str | None = None,
    rival: Rival | None = None,
) -> str:
    """Of rows that are in order. `note`: what limits all of them, and is then all that matters. `rival`: who does as
    well as the first by luck."""
    looked = f"of the {num_placements} placements looked at" if num_placements > 1 else "of the one placement looked at"
    only = f" With one {question.unit} there is only the aggregated placement." if question.space.num_gpus == 1 else ""
    if not rows:
        return f"{f'{note} ' if note else ''}No rate is kept, {looked}.{only}"
    best = rows[0]
    if note is not None:
        return f"{note} {_told(best)}.{only}"
    if not reaches(best, goal):
        most = max(rows, key=lambda row: row.rate)
        return (
            f"Nothing keeps the SLO at {goal.most:g} req/s, {looked}: the most is {most.rate:.3g}, by {most.candidate}."
        )
    if only:
        return f"{_told(best)}.{only}"
    if rival is not None:
        every = len(question.runs.seeds) > 1
        return (
            f"No difference is shown, {looked}: {_told(best)}{' in every run' if every else ''}, "
            f"{_keeps_up(rival, question)}"
        )
    head, sentence = _compared([row for row in rows if reaches(row, goal)], rows, goal, question)
    if len(question.runs.seeds) == 1 and _is_short(best, question):
        head = UNSURE.get(head, head)
    return f"{head}, {looked}: {sentence}"


def _compared(serving: Sequence[Row], rows: Sequence[Row], goal: Goal, question: Question) -> tuple[str, str]:
    split = next((row for row in serving if not row.candidate.is_aggregated), None)
    whole = next((row for row in serving if row.candidate.is_aggregated), None)
    if whole is None:
        assert split is not None
        failing = next((row for row in rows if row.candidate.is_aggregated), None)
        most = "no aggregated one does" if failing is None else f"{failing.candidate} only at {failing.rate:.3g}"
        return NEEDED, f"{_told(split)}, {most}."
    if split is None:
        return WINS, f"{_told(whole)}, no split one does. {NOT_NEEDED}"
    compare = _by_cost if isinstance(goal, LeastCost) else _by_rate
    return compare(split, whole, split_is_first=serving[0] is split, question=question)


def _by_rate(split: Row, whole: Row, *, split_is_first: bool, question: Question) -> tuple[str, str]:
    if split_is_first:
        end = f"{split.rate / whole.rate:.2f} times as much{_instead(split, whole, question)}."
        told = f"{_told(split)}, the best aggregated one, {whole.candidate}, at {whole.rate:.3g}: {end}"
        return PAYS, told
    told = f"{_told(whole)}, the best split one, {split.candidate}, at {split.rate:.3g}"
    if abs(split.rate - whole.rate) <= TIE * max(split.rate, whole.rate):
        return "No difference", f"{told}{_instead(split, whole, question)}. {NOT_NEEDED}"
    less = f" ({1 - split.rate / whole.rate:.0%} less)" if split.rate < whole.rate else ""
    return WINS, f"{told}{less}{_instead(split, whole, question)}. {NOT_NEEDED}"


def _by_cost(split: Row, whole: Row, *, split_is_first: bool, question: Question) -> tuple[str, str]:
    first, other, name = (split, whole, "aggregated") if split_is_first else (whole, split, "split")
    more = f", {other.cost / first.cost - 1:.0%} more" if other.cost > first.cost else ""
    told = f"{_told(first)} {_cost(first, question)}"
    told += f", the best {name} one, {other.candidate}, {_cost(other, question)}"
    return (PAYS, f"{told}{more}.") if split_is_first else (WINS, f"{told}{more}. {NOT_NEEDED}")


def _keeps_up(rival: Rival, question: Question) -> str:
    row, number = rival.row, len(rival.seeds)
    name, end = ("aggregated", "") if row.candidate.is_aggregated else ("split", f" {NOT_NEEDED}")
    told = f"the best {name} one for no more money, {row.candidate}, at {row.rate:.3g}"
    if number == len(question.runs.seeds):  # its own rate was found to so much only
        return f"{told}, and at {rival.rate:.3g} too when tried there.{end}"
    seeds = f"seed{'s' * (number > 1)} {', '.join(map(str, rival.seeds))}"
    return f"{told}, but with the {seeds} at {rival.rate:.3g} too.{end}"


def _told(row: Row) -> str:
    return f"{row.candidate} keeps the SLO at {row.rate:.3g} req/s"


def _instead(one: Row, other: Row, question: Question) -> str:
    """In money, or in what there is where that has no price."""
    if one.cost == other.cost:
        return ""
    if one.figures.dollars_per_hour is not None:
        return f", for {one.cost:.4g} instead of {other.cost:.4g} USD/h"
    numbers = f"{one.candidate.num_gpus} instead of {other.candidate.num_gpus}"
    return f", with {numbers} {question.unit}s"


def _cost(row: Row, question: Question) -> str:
    if row.figures.dollars_per_hour is not None:
        return f"for {row.cost:.4g} USD/h"
    return f"with {row.candidate.num_gpus} {question.unit}{'s' if row.candidate.num_gpus > 1 else ''}"


# ---- how sure that is


def certainties(rows: Sequence[Row], question: Question, rival: Rival | None = None) -> list[str]:
    """Of the first row and of the one with which the verdict compares it: `rival`, or the best one of the other
    kind."""
    first = rows[0]
    number, usual = first.figures.num_requests, question.usual_requests
    luck = "the verdict may hang on luck"
    if not question.is_confirmed:
        end = f", and {luck}" if _is_short(first, question) else ""
        return [
            f"Not confirmed: rates are those that one run of {number:,} requests kept; longer ones may keep less{end}."
        ]
    others = [row for row in rows if row.candidate.is_aggregated != first.candidate.is_aggregated]
    others = others if rival is None else [rival.row]
    told = [_certainty(row, question) for row in (first, *others[:1])]
    if _is_short(first, question):
        told.append(f"Few requests: runs of {number:,} confirm this, {usual:,} are usual here: {luck}.")
    return told


def _is_short(row: Row, question: Question) -> bool:
    return row.figures.num_requests < question.usual_requests


def _certainty(row: Row, question: Question) -> str:
    number, seeds = row.figures.num_requests, question.runs.seeds
    shares = ", ".join(f"{share:.1%}" for share in row.attained)
    runs = f"a run of {number:,} requests"
    if len(seeds) > 1:
        runs = f"runs of {number:,} requests with the seeds {', '.join(map(str, seeds))}"
    return f"How sure: {row.candidate} at {row.rate:.3g} req/s: {shares} of the requests met the SLO, in {runs}."
