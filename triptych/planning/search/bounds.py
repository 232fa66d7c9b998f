"""How much a candidate could serve at the very best: what no simulation can exceed, in microseconds instead of seconds.

Work that can be divided at will, in batches that are always full: no set of stages can be done faster than by all
instances that serve any of them. Requests may be late by what their objectives allow, and the dearest may miss them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from triptych.core import STAGE_SETS, Stage
from triptych.latency import Objectives
from triptych.planning.costs.cost_model import Costs
from triptych.planning.search.load import Load
from triptych.planning.search.space import Candidate
from triptych.planning.workloads.demand import Demand


@dataclass(frozen=True, slots=True)
class Work:
    """Of one request, in seconds of one instance, at the least."""

    encode_s: float
    prefill_s: float
    decode_s: float

    def of(self, stages: frozenset[Stage]) -> float:
        parts = {Stage.ENCODE: self.encode_s, Stage.PREFILL: self.prefill_s, Stage.DECODE: self.decode_s}
        return sum(parts[stage] for stage in stages)


def least_work(
    candidate: Candidate, costs: Costs, demands: Sequence[Demand], objectives: Objectives, target: float
) -> dict[frozenset[Stage], float]:
    """Seconds of one instance's work in each set of stages, for the cheapest requests, as many as must meet their
    objectives. The same for all placements that are set alike."""
    works = [work(demand, candidate, costs, objectives) for demand in demands]
    num_met = math.ceil(target * len(demands) - 1e-9)
    return {stages: math.fsum(sorted(one.of(stages) for one in works)[:num_met]) for stages in STAGE_SETS}


def highest_rate(
    candidate: Candidate, least: Mapping[frozenset[Stage], float], load: Load, objectives: Objectives
) -> float:
    """A rate above which too few of the requests of `load` can meet the objectives; `least` is their work."""
    best = math.inf
    for stages, work_s in least.items():
        number = sum(not stages.isdisjoint(role.stages) for role in candidate.placement.roles)
        busy_s = work_s / number - _slack_s(stages, objectives, load.longest)
        if busy_s > 0:
            best = min(best, load.rate * load.span_s / busy_s)
    return best


def balanced_rate(candidate: Candidate, least: Mapping[frozenset[Stage], float], load: Load) -> float:
    """What the candidate would serve if each instance gave the same time to every stage that it serves: no bound, but a
    guess where to begin."""
    rates = [math.inf]
    for stage in Stage:
        work_s = least[frozenset({stage})]
        shares = sum(1 / len(role.stages) for role in candidate.placement.roles if stage in role.stages)
        if work_s > 0:
            rates.append(load.rate * load.span_s * shares / work_s)
    return min(rates)


def work(demand: Demand, candidate: Candidate, costs: Costs, objectives: Objectives) -> Work:
    """Media that caches may know are taken to cost nothing."""
    new = [item for item in demand.media if item.name is None]
    units = [rows for item in new for rows in item.rows]
    encode_s = len(units) * costs.encode_unit + sum(units) * costs.encode_row
    encode_s += sum(rows**2 for rows in units) * costs.encode_pair
    encode_s += costs.encode_step * sum(min(1.0, rows / candidate.max_encode_tokens) for rows in units)
    encode_s += len(new) * costs.encode_item + costs.pixels_s(new)
    tokens = demand.prompt_tokens if not demand.prefix else 1
    prefill_s = costs.prefill_sequence + tokens * costs.prefill_token + 0.5 * tokens**2 * costs.prefill_pair
    step_s = max(0.0, costs.prefill_step - costs.decode_step) if rides(candidate) else costs.prefill_step
    prefill_s += step_s * tokens / candidate.max_num_batched_tokens
    return Work(encode_s, prefill_s, _decode_s(demand, candidate, costs, objectives))


def rides(candidate: Candidate) -> bool:
    """Whether a prompt may ride along with a decode step: one forward does both."""
    return any(Stage.PREFILL in role.stages and Stage.DECODE in role.stages for role in candidate.placement.roles)


def _decode_s(demand: Demand, candidate: Candidate, costs: Costs, objectives: Objectives) -> float:
    """Of steps as full as the batch, and as the time per token, allow."""
    num_steps = demand.output_tokens - 1
    if num_steps < 1:
        return 0.0
    batch = float(candidate.max_num_seqs)
    if objectives.tpot_ms is not None and costs.decode_sequence > 0:
        fits = (objectives.tpot_ms / 1e3 - costs.decode_step) / costs.decode_sequence
        batch = min(batch, max(1.0, fits))
    context = num_steps * demand.prompt_tokens + num_steps * (num_steps - 1) / 2
    return num_steps * costs.decode_fixed_s(batch) / batch + context * costs.decode_context


def _slack_s(stages: frozenset[Stage], objectives: Objectives, longest: int) -> float:
    """How long after the last arrival work of these stages may still be done in time."""
    ends_ms = objectives.e2e_ms if objectives.e2e_ms is not None else math.inf
    first_ms = objectives.ttft_ms if objectives.ttft_ms is not None else ends_ms
    if Stage.DECODE not in stages:
        return min(first_ms, ends_ms) / 1e3
    pace_ms = objectives.tpot_ms if objectives.tpot_ms is not None else math.inf
    return min(first_ms + pace_ms * max(0, longest - 1), ends_ms) / 1e3
