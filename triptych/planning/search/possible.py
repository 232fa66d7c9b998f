"""What no placement can do: an SLO that is missed, or all but missed, by requests that meet no others."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from triptych.core import Stage
from triptych.errors import ConfigError
from triptych.latency import percentile
from triptych.planning.quantities import percent
from triptych.planning.search.confirmation import At, Runs
from triptych.planning.search.evaluation import Evaluator
from triptych.planning.search.load import Load
from triptych.planning.search.machines import ProfiledMachines, Reach
from triptych.planning.search.plan import Question, Row
from triptych.planning.search.search import Asking, Found
from triptych.planning.search.space import Candidate, Family, Space
from triptych.planning.simulation.figures import meets

MOST_ALONE = 3  # candidates that are tried with the whole load on an idle server
MOST_REQUESTS_ALONE = 500
LOW = 0.2  # of what work alone would allow: rates below it are told with what limits them
MARGIN = 0.5  # of the requests that may miss the SLO: where so many miss it alone, there is little room for load


class Alone(msgspec.Struct, frozen=True):
    """How a candidate does while it is almost idle: nothing serves these requests better."""

    attainment: float
    ttft_ms: float  # that a share of the requests keeps; infinite where none is answered
    tpot_ms: float


@dataclass(frozen=True, slots=True)
class _Lone:
    """A candidate that gets one request at a time."""

    candidate: Candidate
    share: float  # of the requests, for which limits are told
    short: bool = False


def require_possible(question: Question, ask: Asking[Evaluator]) -> None:
    """Raises ConfigError for an SLO that even an idle server cannot keep."""
    evaluator = question.evaluator
    heads = list(_fastest(question.space, evaluator))
    first = ask(_alone, [_Lone(one, evaluator.target, short=True) for one in heads])
    ranked = sorted(range(len(heads)), key=lambda number: (-first[number].attainment, first[number].ttft_ms))
    found = ask(_alone, [_Lone(heads[number], evaluator.target) for number in ranked[:MOST_ALONE]])
    if not found or any(one.attainment >= evaluator.target for one in found):
        return
    objectives, share = evaluator.objectives, percent(evaluator.target)
    for name, limit_ms in (("ttft", objectives.ttft_ms), ("tpot", objectives.tpot_ms)):
        least_ms = min(getattr(one, f"{name}_ms") for one in found)
        if limit_ms is not None and limit_ms < least_ms < math.inf:
            raise ConfigError(
                f"{question.where}: slo.{name}: {limit_ms:g} ms cannot be kept within {question.size}: "
                f"on an idle server {share} of these requests need {least_ms:.4g} ms; at least that is valid"
            )
    raise ConfigError(f"{question.where}: slo: no idle server keeps all of it for {share} of these requests")


def limit_note(question: Question, found: Sequence[Found], best: Sequence[Row], ask: Asking[Runs]) -> str | None:
    """What is said where the best rate is so low because hardly enough requests keep the SLO even alone. `found` is
    what `best` was confirmed of."""
    evaluator = question.evaluator
    if best:
        top = At(best[0].candidate, best[0].rate)
    else:
        top = At(found[0].candidate if found else next(iter(_fastest(question.space, evaluator))), 0.0)
    if top.rate > LOW * evaluator.guess(top.candidate):
        return None
    more = (1 + evaluator.target) / 2
    (alone,) = ask(_alone_in_runs, [_Lone(top.candidate, more)])
    if alone.attainment >= 1 - MARGIN * (1 - evaluator.target):
        return None
    note = (
        f"Even alone on an idle {top.candidate} only {alone.attainment:.1%} of these requests keep the SLO, and "
        f"{percent(evaluator.target)} must: there is little room for load."
    )
    if math.isinf(alone.ttft_ms):
        return note
    limits = f"a TTFT of {alone.ttft_ms:.0f} ms and a TPOT of {alone.tpot_ms:.3g} ms"
    return f"{note} {percent(more)} of them would keep {limits}."


def _alone(evaluator: Evaluator, one: _Lone) -> Alone:
    records = evaluator.run(one.candidate, None, short=one.short).records
    good = [record for record in records if record.error is None]
    if not good:
        return Alone(0.0, math.inf, math.inf)
    num_met = sum(meets(record, evaluator.objectives) for record in good)
    return Alone(
        num_met / len(records),
        1e3 * percentile(sorted(record.ttft_s for record in good), 100 * one.share),
        1e3 * percentile(sorted(record.tpot_s or 0.0 for record in good), 100 * one.share),
    )


def _alone_in_runs(runs: Runs, one: _Lone) -> Alone:
    """Of the first requests of each run; the rate does not matter."""
    number = MOST_REQUESTS_ALONE // len(runs.seeds)
    demands = [demand for seed in runs.seeds for demand in runs.demands(1.0, seed)[:number]]
    machines = ProfiledMachines(runs.profiles, Reach.of(demands))
    return _alone(Evaluator(Load(demands, 1.0), machines, runs.objectives, runs.target), one)


def _fastest(space: Space, evaluator: Evaluator) -> Iterable[Candidate]:
    """Of each family that fits, the one with most encoders and GPUs: nothing serves a lone request sooner."""

    def speed(candidate: Candidate) -> tuple[object, ...]:
        return candidate.degrees, candidate.num_serving(Stage.ENCODE), candidate.num_gpus

    best: dict[Family, Candidate] = {}
    for candidate in sorted(space.bases(), key=speed, reverse=True):
        if candidate.family not in best and evaluator.misfit(candidate) is None:
            best[candidate.family] = candidate
    return best.values()
