"""Costs that agree with a live server: what its processes took of the cores for loads that are simulated as well.

Steps that are measured one after the other find warm caches and wait for nobody. Among other processes they take more,
and what instances do beside steps, and the server itself, are seen only there.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from triptych.core import Placement, Role, Stage
from triptych.planning.costs.cost_model import STAGES, Costs
from triptych.planning.costs.fit import Fit, Sample, fit
from triptych.planning.costs.profile import Residual
from triptych.planning.costs.sizes import Sizes
from triptych.planning.simulation.instance import Work
from triptych.planning.simulation.simulator import Simulation
from triptych.planning.workloads.demand import Demand

SERVER = ("request", "prompt_token", "item", "media_byte", "step", "token", "report")
# What steps cost scales by these parts: reading a source minds other processes less than what comes after it.
PARTS = {
    "encode": tuple(name for name in STAGES["encode"] if name != "encode_pixel"),
    "pixels": ("encode_pixel",),
    "prefill": STAGES["prefill"],
    "decode": STAGES["decode"],
}
CLIENT = ("request", "token")
ROUNDS = 6  # after so many the simulated instances rest as often as the live ones
CAPACITY_REQUESTS = 200
MOST_APART = 2.0  # times as much as another part of the same steps: what is further apart is a fit's invention


@dataclass(frozen=True, slots=True)
class Pair:
    """What a simulated instance did in a run, and the live one: their counters, and how long requests came."""

    work: Work
    simulated: Mapping[str, float]
    live: Mapping[str, float]
    seconds: float

    def more(self, name: str) -> float:
        """Of the live one."""
        return self.live.get(name, 0.0) - self.simulated.get(name, 0.0)


@dataclass(frozen=True, slots=True)
class LiveRun:
    """Requests that a live server got, and what it did for them: CPU seconds, and the counters of its instances."""

    placement: Placement
    sizes: Mapping[Role, Sizes]
    demands: Sequence[Demand]
    # In the order of the placement: encode_steps, encode_tokens, encode_cpu_s, ..., other_cpu_s; empty: the run tells
    # of the server only.
    instances: Sequence[Mapping[str, float]]
    server_s: float
    client_s: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """`costs` with which simulated instances take what live ones took, and how well they do, by what was done."""

    costs: Costs
    scales: Mapping[str, float]  # how many times what was measured without a server each of PARTS takes
    residuals: Mapping[str, Residual]


def calibrate(costs: Costs, runs: Sequence[LiveRun], *, steps: bool = True) -> Calibration:
    """`costs`: as they were measured without a server. `steps`: whether instances compute with one thread of the CPU,
    so that their CPU time is that of their steps."""
    scales, residuals = dict.fromkeys(PARTS, 1.0), dict[str, Residual]()
    for _ in range(ROUNDS):
        simulations = [_simulated(costs, run) for run in runs]
        fits = {"server": fit(_of_server(simulations, runs), SERVER), "client": fit(_of_client(runs), CLIENT)}
        pairs = _pairs(simulations, runs) if steps else []
        if pairs:
            fits |= {"steps": _fit_of_steps(pairs, costs, scales), "turns": fit(_of_turns(pairs), ("turn", "second"))}
            # 0: no run had that stage, or it cannot be told from the rests before it.
            factors = {part: fits["steps"].costs[part] or 1.0 for part in PARTS}
            scales = {part: scale * factors[part] for part, scale in scales.items()}
            costs = replace(_scaled(costs, factors), wake=fits["steps"].costs["wake"], turn=fits["turns"].costs["turn"])
        costs = replace(costs, **_named("server", fits["server"]), **_named("client", fits["client"]))
        residuals = {name: one.residual for name, one in fits.items()}
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


def _pairs(simulations: Iterable[Simulation], runs: Iterable[LiveRun]) -> list[Pair]:
    return [
        Pair(instance.work, instance.pace.counters, live, run.demands[-1].at_s)
        for simulation, run in zip(simulations, runs, strict=True)
        if run.instances
        for instance, live in zip(simulation.instances.values(), run.instances, strict=True)
    ]


def _fit_of_steps(pairs: Sequence[Pair], costs: Costs, scales: Mapping[str, float]) -> Fit:
    """One scale for both parts of encoding where they cannot be told apart: pictures of one size, or encoders whose
    work grows with the pixels. `scales`: of the costs with which this work was simulated."""
    samples = _of_steps(pairs, costs)
    found = fit(samples, (*PARTS, "wake"))
    apart = [scales[part] * found.costs[part] for part in ("encode", "pixels")]
    if max(apart) > MOST_APART * min(apart):
        samples = [replace(sample, amounts=_together(sample.amounts)) for sample in samples]
        found = fit(samples, (*STAGES, "wake"))
        found = replace(found, costs={**found.costs, "pixels": found.costs["encode"]})
    return found


def _together(amounts: Mapping[str, float]) -> dict[str, float]:
    others = {name: amount for name, amount in amounts.items() if name != "pixels"}
    return others | ({"encode": amounts["encode"] + amounts["pixels"]} if "pixels" in amounts else {})


def _of_steps(pairs: Sequence[Pair], costs: Costs) -> list[Sample]:
    """What an instance took for the steps of each stage. Those that decode and prefill count as prefill.

    Simulated work counts as if it had been done in the live one's steps. Where steps are slower they are fewer and
    larger, so that all that a load takes hardly tells what one step does: an error of it would be many times that of
    the scale."""
    each_s = costs.decode_sequence + costs.decode_few
    samples = []
    for pair in pairs:
        work = pair.work
        encode_s = work.steps_s[Stage.ENCODE] - work.pixels_s + pair.more("encode_steps") * costs.encode_step
        prefill_s = work.steps_s[Stage.PREFILL] - work.riding_s + pair.more("prefill_steps") * costs.prefill_step
        riding_s = work.riding_s + pair.more("prefill_tokens") * costs.decode_sequence
        decode_s = work.steps_s[Stage.DECODE] + pair.more("decode_steps") * costs.decode_step
        seconds = {
            Stage.ENCODE: {"encode": encode_s, "pixels": work.pixels_s},
            Stage.PREFILL: {"prefill": prefill_s, "decode": riding_s},
            Stage.DECODE: {"decode": decode_s + pair.more("decode_tokens") * each_s},
        }
        for stage, of_parts in seconds.items():
            live_s = pair.live.get(f"{stage.name.lower()}_cpu_s", 0.0)
            amounts = {part: max(0.0, of_one) for part, of_one in of_parts.items()}
            if any(amounts.values()) and live_s > 0:
                samples.append(Sample({**amounts, "wake": float(work.wakes[stage])}, live_s))
    return samples


def _of_turns(pairs: Sequence[Pair]) -> list[Sample]:
    """Beside turns, which hang on what arrives, there are heartbeats, which come whatever happens, and are no cost of a
    load."""
    return [
        Sample({"turn": float(pair.work.turns), "second": pair.seconds}, pair.live["other_cpu_s"])
        for pair in pairs
        if pair.live["other_cpu_s"] > 0
    ]


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


def _scaled(costs: Costs, factors: Mapping[str, float]) -> Costs:
    fields = {name: getattr(costs, name) * factors[part] for part, names in PARTS.items() for name in names}
    return replace(costs, **fields)


def _named(process: str, found: Fit) -> dict[str, Any]:
    return {f"{process}_{name}": cost for name, cost in found.costs.items()}
