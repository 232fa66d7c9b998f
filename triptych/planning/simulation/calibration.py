"""Costs that agree with a live server: what its processes took of the cores for loads that are simulated as well.

Steps that are measured one after the other find warm caches and wait for nobody. Among other processes they take more,
and pulls, reports and the server itself are seen only there.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from triptych.core import Placement, Role
from triptych.planning.costs.cost_model import Costs
from triptych.planning.costs.fit import Fit, Sample, fit
from triptych.planning.costs.profile import Residual
from triptych.planning.costs.sizes import Sizes
from triptych.planning.simulation.instance import Work
from triptych.planning.simulation.simulator import Simulation
from triptych.planning.workloads.demand import Demand

ENCODE = ("encode_step", "encode_item", "encode_pixel", "encode_unit", "encode_row")
PREFILL = ("prefill_step", "prefill_token", "prefill_pair")
DECODE = ("decode_step", "decode_sequence", "decode_context")
STAGES = {"encode": ENCODE, "prefill": PREFILL, "decode": DECODE}
BESIDE = ("turn", "wake", "pull")
SERVER = ("request", "prompt_token", "item", "media_byte", "step", "token", "report")
CLIENT = ("request", "token")
ROUNDS = 3  # slower steps are fewer and larger ones: after three rounds the batches are those of the live server
CAPACITY_REQUESTS = 200


@dataclass(frozen=True, slots=True)
class LiveRun:
    """Requests that a live server got, and the CPU seconds of its processes while it served them."""

    placement: Placement
    sizes: Mapping[Role, Sizes]
    demands: Sequence[Demand]
    instances_s: Sequence[float]  # in the order of the placement; empty: the run tells of the server only
    server_s: float
    client_s: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """`costs` with which the simulated processes take what the live ones took; how well they do, by process."""

    costs: Costs
    stages: Mapping[str, float]  # how many times what was measured without a server a stage takes
    residuals: Mapping[str, Residual]


def calibrate(costs: Costs, runs: Sequence[LiveRun], *, steps: bool = True) -> Calibration:
    """`steps`: whether instances compute with one thread of the CPU, so that their CPU time is that of their steps."""
    scales = dict.fromkeys(STAGES, 1.0)
    residuals: dict[str, Residual] = {}
    for _ in range(ROUNDS):
        simulations = [_simulated(costs, run) for run in runs]
        found = {"instances": fit(_of_instances(simulations, runs), (*STAGES, *BESIDE))} if steps else {}
        found["server"] = fit(_of_server(simulations, runs), SERVER)
        found["client"] = fit(_of_client(runs), CLIENT)
        residuals = {name: one.residual for name, one in found.items()}
        if steps:
            # 0: no run had that stage, or what it takes could not be told from the rest.
            factors = {stage: found["instances"].costs[stage] or 1.0 for stage in STAGES}
            scales = {stage: scale * factors[stage] for stage, scale in scales.items()}
            costs = _scaled(costs, factors, found["instances"])
        costs = replace(costs, **_named("server", found["server"]), **_named("client", found["client"]))
    return Calibration(costs, scales, residuals)


def capacity(costs: Costs, sizes: Mapping[Role, Sizes], placement: Placement, demand: Demand) -> float:
    """Requests a second, if there are always some: many at once, so that the first and the last weigh little."""
    demands = [replace(demand, at_s=0.0)] * CAPACITY_REQUESTS
    records = Simulation(placement, costs, sizes).run(demands)
    return len(records) / max(record.finished_s or 0.0 for record in records)


def _simulated(costs: Costs, run: LiveRun) -> Simulation:
    simulation = Simulation(run.placement, costs, run.sizes)
    simulation.run(run.demands)
    return simulation


def _of_instances(simulations: Iterable[Simulation], runs: Iterable[LiveRun]) -> list[Sample]:
    """Those that had anything to do."""
    samples = []
    for simulation, run in zip(simulations, runs, strict=True):
        told = zip(simulation.instances.values(), run.instances_s, strict=True) if run.instances_s else ()
        for instance, seconds in told:
            amounts = _amounts(instance.work)
            if any(amounts[stage] for stage in STAGES) and seconds > 0:
                samples.append(Sample(amounts, seconds))
    return samples


def _amounts(work: Work) -> dict[str, float]:
    return {
        "encode": work.encode_s,
        "prefill": work.prefill_s,
        "decode": work.decode_s,
        "turn": float(work.turns),
        "wake": float(work.wakes),
        "pull": float(work.pulls),
    }


def _of_server(simulations: Iterable[Simulation], runs: Iterable[LiveRun]) -> list[Sample]:
    samples = []
    for simulation, run in zip(simulations, runs, strict=True):
        heard, items = simulation.frontend.heard, [item for demand in run.demands for item in demand.media]
        amounts = {
            "request": len(run.demands),
            "prompt_token": sum(demand.prompt_tokens for demand in run.demands),
            "item": len(items),
            "media_byte": sum(item.nbytes for item in items),
            "step": heard.steps,
            "token": heard.tokens,
            "report": heard.reports,
        }
        samples.append(Sample({name: float(amount) for name, amount in amounts.items()}, run.server_s))
    return samples


def _of_client(runs: Iterable[LiveRun]) -> list[Sample]:
    return [
        Sample(
            {
                "request": float(len(run.demands)),
                "token": float(sum(demand.output_tokens for demand in run.demands)),
            },
            run.client_s,
        )
        for run in runs
    ]


def _scaled(costs: Costs, factors: Mapping[str, float], found: Fit) -> Costs:
    fields: dict[str, Any] = {name: found.costs[name] for name in BESIDE}
    for stage, names in STAGES.items():
        fields |= {name: getattr(costs, name) * factors[stage] for name in names}
    return replace(costs, **fields)


def _named(process: str, found: Fit) -> dict[str, Any]:
    return {f"{process}_{name}": cost for name, cost in found.costs.items()}
