"""A search, and what people and machines are told of it: rows of the best, curves over the rate, a file for `serve`."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from triptych.config import GIB
from triptych.core import Stage
from triptych.errors import ConfigError
from triptych.latency import Objectives, percentile
from triptych.planning.costs.profile import Profile
from triptych.planning.search.evaluation import Evaluator
from triptych.planning.search.goals import Goal, LeastCost
from triptych.planning.search.load import Load
from triptych.planning.search.machines import ProfiledMachines, Reach
from triptych.planning.search.search import Asking, Found, Outcome
from triptych.planning.search.space import Candidate, Family, Space
from triptych.planning.simulation.figures import Figures, meets
from triptych.planning.workloads.demand import Demand
from triptych.planning.workloads.workload import Slo

MOST_ROWS = 6
MOST_CURVES = 4
MOST_ALONE = 3  # candidates that are tried with the whole load on an idle server
NUM_RATES = 10
LOWEST_RATE, HIGHEST_RATE = 0.2, 1.6  # of the best goodput: where curves begin and end


@dataclass(frozen=True, slots=True)
class Question:
    """Everything that a plan depends on but the goal and the search."""

    where: str  # of the workload, for messages
    load: Load
    machines: ProfiledMachines
    space: Space
    evaluator: Evaluator

    @classmethod
    def of(
        cls,
        *,
        where: str,
        demands: Sequence[Demand],
        slo: Slo,
        profiles: Mapping[int, Profile],
        num_gpus: int,
        choices: Mapping[str, Any],
    ) -> "Question":
        """Rates are those at which the demands come, whatever was meant: a few hundred of them are always faster or
        slower. Raises ConfigError where they have no rate, and for a request that the model cannot take."""
        load = Load(demands, _rate(demands, where))
        machines = ProfiledMachines(profiles, Reach.of(demands))
        machines.require_context(where)
        space = Space(num_gpus=num_gpus, degrees=tuple(profiles), **choices)
        limits = [None if limit is None else float(limit) * 1e3 for limit in (slo.ttft, slo.tpot, slo.e2e)]
        return cls(where, load, machines, space, Evaluator(load, machines, Objectives(*limits), slo.attainment))


def _rate(demands: Sequence[Demand], where: str) -> float:
    span_s = demands[-1].at_s - demands[0].at_s
    if span_s <= 0:
        raise ConfigError(f"{where}: arrivals: requests that come all at once have no rate; a plan needs one")
    return (len(demands) - 1) / span_s


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate and how it does at its goodput."""

    candidate: Candidate
    goodput: float
    score: float
    figures: Figures


class Curve(msgspec.Struct, frozen=True, kw_only=True):
    """One candidate at several rates."""

    candidate: Candidate
    rates: list[float]
    figures: list[Figures]


@dataclass(frozen=True, slots=True)
class At:
    """A candidate at a rate; None: one request at a time."""

    candidate: Candidate
    rate: float | None
    short: bool = False


def _figures(evaluator: Evaluator, at: At) -> Figures:
    assert at.rate is not None
    return evaluator.figures(at.candidate, at.rate)


def _goodput(evaluator: Evaluator, candidate: Candidate) -> float:
    return evaluator.goodput(candidate)


# ---- what is told


def chosen(outcome: Outcome, goal: Goal) -> list[Found]:
    """One for each placement, best first, and the best aggregated one in any case."""
    serving = [found for found in outcome.best if found.goodput > 0]
    if isinstance(goal, LeastCost):
        serving = [found for found in serving if found.goodput >= goal.most] or serving
    distinct = list({(one.candidate.placement, one.candidate.degrees): one for one in reversed(serving)}.values())
    best = sorted(distinct, key=outcome.best.index)[:MOST_ROWS]
    whole = outcome.aggregated()
    return best if whole is None or whole in best or not whole.goodput else [*best[: MOST_ROWS - 1], whole]


def rows(found: Sequence[Found], goal: Goal, ask: Asking) -> list[Row]:
    """With figures at the goodput of each; a goal that asks for no more than some goodput did not look further."""
    goodputs = [one.goodput for one in found]
    if isinstance(goal, LeastCost):
        goodputs = ask(_goodput, [one.candidate for one in found])
    figures = ask(_figures, [At(one.candidate, rate) for one, rate in zip(found, goodputs, strict=True)])
    return [
        Row(candidate=one.candidate, goodput=goodput, score=one.score, figures=its)
        for one, goodput, its in zip(found, goodputs, figures, strict=True)
    ]


def curves(of: Sequence[Row], ask: Asking, advance: Callable[[], None] = lambda: None) -> list[Curve]:
    """The first ones, and the aggregated one, at the same rates."""
    shown = [*of[: MOST_CURVES - 1], *[row for row in of[MOST_CURVES - 1 :] if row.candidate.is_aggregated][:1]]
    rates = spread(max(row.goodput for row in of))
    found = []
    for row in shown:
        figures = ask(_figures, [At(row.candidate, rate) for rate in rates])
        found.append(Curve(candidate=row.candidate, rates=rates, figures=figures))
        advance()
    return found


def spread(goodput: float) -> list[float]:
    """Rates below and above a goodput."""
    step = (HIGHEST_RATE - LOWEST_RATE) / (NUM_RATES - 1)
    return [goodput * (LOWEST_RATE + step * number) for number in range(NUM_RATES)]


# ---- what cannot be


class Alone(msgspec.Struct, frozen=True):
    """How a candidate does while it is almost idle: nothing serves these requests better."""

    attainment: float
    ttft_ms: float  # that as many requests keep as must keep the SLO
    tpot_ms: float


def require_possible(question: Question, ask: Asking) -> None:
    """Raises ConfigError for an SLO that even an idle server cannot keep."""
    evaluator = question.evaluator
    heads = list(_fastest(question.space, evaluator))
    first = ask(_alone, [At(one, None, short=True) for one in heads])
    ranked = sorted(range(len(heads)), key=lambda number: (-first[number].attainment, first[number].ttft_ms))
    found = ask(_alone, [At(heads[number], None) for number in ranked[:MOST_ALONE]])
    if not found or any(one.attainment >= evaluator.target for one in found):
        return
    objectives, share = evaluator.objectives, f"{evaluator.target:.0%}"
    for name, limit_ms in (("ttft", objectives.ttft_ms), ("tpot", objectives.tpot_ms)):
        least_ms = min(getattr(one, f"{name}_ms") for one in found)
        if limit_ms is not None and least_ms > limit_ms:
            raise ConfigError(
                f"{question.where}: slo.{name}: {limit_ms:g} ms cannot be kept within {question.space.num_gpus} GPUs: "
                f"on an idle server {share} of these requests need {least_ms:.4g} ms; at least that is valid"
            )
    raise ConfigError(f"{question.where}: slo: no idle server keeps all of it for {share} of these requests")


def _alone(evaluator: Evaluator, at: At) -> Alone:
    records = evaluator.run(at.candidate, at.rate, short=at.short).records
    good = [record for record in records if record.error is None]
    num_met = sum(meets(record, evaluator.objectives) for record in good)
    percent = 100 * evaluator.target
    return Alone(
        num_met / len(records),
        1e3 * percentile(sorted(record.ttft_s for record in good), percent),
        1e3 * percentile(sorted(record.tpot_s or 0.0 for record in good), percent),
    )


def _fastest(space: Space, evaluator: Evaluator) -> Iterable[Candidate]:
    """Of each family that fits, the one with most encoders and GPUs: nothing serves a lone request sooner."""

    def speed(candidate: Candidate) -> tuple[object, ...]:
        return candidate.degrees, candidate.num_serving(Stage.ENCODE), candidate.num_gpus

    best: dict[Family, Candidate] = {}
    for candidate in sorted(space.bases(), key=speed, reverse=True):
        if candidate.family not in best and evaluator.misfit(candidate) is None:
            best[candidate.family] = candidate
    return best.values()


# ---- a file for `triptych serve --config`


def serve_config(row: Row, question: Question, model: str) -> dict[str, Any]:
    """The flags of `triptych serve` for a candidate, by their names with underscores."""
    candidate, machines, objectives = row.candidate, question.machines, question.evaluator.objectives
    profile = machines.profiles[1]
    config: dict[str, Any] = {
        "model": model,
        "placement": str(candidate.placement),
        "device": "cpu" if profile.made.device == "cpu" else "cuda",
        "max_num_seqs": candidate.max_num_seqs,
        "max_num_batched_tokens": candidate.max_num_batched_tokens,
        "max_encode_tokens": candidate.max_encode_tokens,
        "irp": candidate.parallel_encode,
        "streamed_prefill": candidate.streamed_prefill,
        "schedule": candidate.schedule,
        "embedding_cache_gib": math.ceil(100 * machines.embedding_bytes() / GIB) / 100,
    }
    contexts = [machines.context_len(role, candidate) for role in candidate.family if role.has_language_model]
    if min(contexts) < profile.memory.context_len:
        config["max_model_len"] = min(contexts)
    limits = {"slo_ttft_ms": objectives.ttft_ms, "slo_tpot_ms": objectives.tpot_ms}
    return config | {name: limit for name, limit in limits.items() if limit is not None}


def config_text(config: dict[str, Any], comments: Sequence[str]) -> str:
    """YAML: JSON's scalars are YAML's."""
    lines = [f"# {comment}" for comment in comments]
    return "\n".join([*lines, *(f"{key}: {json.dumps(value)}" for key, value in config.items())]) + "\n"


def as_json(outcome: Outcome, best: Sequence[Row], verdict: str, texts: dict[str, str]) -> str:
    """For machines. Numbers that are not known are null."""
    found = {
        "verdict": verdict,
        "best": [
            {
                "placement": str(row.candidate.placement),
                "gpus": row.candidate.num_gpus,
                "settings": msgspec.structs.asdict(row.candidate) | {"placement": str(row.candidate.placement)},
                "goodput": row.goodput,
                "figures": row.figures,
            }
            for row in best
        ],
        "files": texts,
        "rejected": outcome.rejected,
        "simulated": {"skipped": outcome.num_skipped, "short": outcome.num_short, "full": outcome.num_full},
    }
    return json.dumps(msgspec.to_builtins(found), indent=2)
