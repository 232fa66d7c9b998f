"""Role switching on the shifting load of the paper (Table 6), on simulated time, against every static placement.

    python benchmarks/shifting_load.py

100 requests of one 4K picture, 3 a second; the first 10 ask for 50 tokens, the others for 500; 8 instances that start
as 5E1P2D. Once with the paper's costs, once scaled to the built-in model: `planning/costs/reference.py` has both
and the source of each number. Stages, memory and routing are those of the engine, only forwards and links are a model.

Adaptive is compared with three static placements: the paper's start, which is the one that can serve the first phase at
the highest rate; the one that serves the first phase fastest; and the one that would have been best for the whole trace
in hindsight.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from measuring import add_result_options, verdict, write_result

from triptych.core import Placement, Role
from triptych.planning.costs.cost_model import Costs
from triptych.planning.costs.reference import (
    BUILT_IN_COSTS,
    BUILT_IN_PICTURE,
    PAPER_COSTS,
    PICTURE_4K,
    built_in_shifting_load,
    paper_shifting_load,
)
from triptych.planning.costs.sizes import Sizes
from triptych.planning.simulation.adaptation import Adaptation
from triptych.planning.simulation.frontend import Record
from triptych.planning.simulation.simulator import Simulation
from triptych.planning.workloads.demand import Demand, Phase, poisson

START = "5e1p2d"
NUM_INSTANCES = 8
PLACEMENTS = [
    f"{e}e{p}p{NUM_INSTANCES - e - p}d" for e in range(1, NUM_INSTANCES - 1) for p in range(1, NUM_INSTANCES - e)
]
PAPER = {"static": {"latency_s": 61.10, "ttft_s": 1.33, "tpot_s": 0.12}}
PAPER["adaptive"] = {"latency_s": 28.01, "ttft_s": 1.42, "tpot_s": 0.05}
TARGET = 1.5


@dataclass(frozen=True)
class Case:
    name: str
    costs: Costs
    sizes: Sizes
    load: Callable[[int], list[Demand]]
    first_phase: Phase  # long enough to tell placements apart
    rate: float
    num_seeds: int


CASES = [
    Case("paper", PAPER_COSTS, Sizes(), paper_shifting_load, Phase(200, 50, (PICTURE_4K,)), 3.0, 5),
    Case(
        "built-in",
        BUILT_IN_COSTS,
        Sizes(max_num_seqs=64),
        built_in_shifting_load,
        Phase(600, 50, (BUILT_IN_PICTURE,)),
        58.0,
        1,
    ),
]


def main() -> None:
    options = _options()
    results: dict[str, Any] = {}
    verdicts: list[dict[str, Any]] = []
    for case in CASES:
        seeds = range(1 if options.quick else case.num_seeds)
        print(f"{case.name}: means over {len(seeds)} arrival traces", flush=True)
        results[case.name] = result = _compare(case, seeds)
        adaptive = result["adaptive"][START]
        speedup = result["static"][START]["latency_s"] / adaptive["latency_s"]
        verdicts.append(verdict(f"{case.name}: static {START} / adaptive from it", speedup, TARGET, at_most=False))
        switches = result["steady"]["switches"]
        verdicts.append(verdict(f"{case.name}: switches while the first phase lasts", switches, 0))
    write_result("shifting-load", options, paper=PAPER, cases=results, verdicts=verdicts)


def _compare(case: Case, seeds: Sequence[int]) -> dict[str, Any]:
    first = {placement: _steady(case, placement, seeds) for placement in PLACEMENTS}
    static = {placement: _mean(case, placement, seeds) for placement in PLACEMENTS}
    rates = {placement: _highest_rate(case, placement) for placement in PLACEMENTS}
    quickest = min(PLACEMENTS, key=lambda placement: first[placement]["latency_s"])
    hindsight = min(PLACEMENTS, key=lambda placement: static[placement]["latency_s"])
    starts = dict.fromkeys([START, quickest, hindsight])
    adaptive = {placement: _mean(case, placement, seeds, adaptive=True) for placement in starts}
    for placement in sorted(PLACEMENTS, key=lambda placement: static[placement]["latency_s"]):
        notes = [
            "the paper's start" if placement == START else "",
            "highest rate in the first phase" if rates[placement] == max(rates.values()) else "",
            "fastest in the first phase" if placement == quickest else "",
            "best in hindsight" if placement == hindsight else "",
        ]
        _show(f"static {placement}", static[placement], ", ".join(filter(None, notes)))
    for placement, row in adaptive.items():
        _show(f"adaptive from {placement}", row, f"{row['switches']:.1f} switches, ends as {row['ends']}")
    for placement in (quickest, hindsight):
        ratio = static[placement]["latency_s"] / adaptive[placement]["latency_s"]
        print(f"    static {placement} / adaptive from it: {ratio:.2f}")
    best = static[hindsight]["latency_s"] / adaptive[START]["latency_s"]
    print(f"    static {hindsight}, which knows the whole trace / adaptive from {START}: {best:.2f}")
    steady = _steady(case, START, seeds, adaptive=True)
    return {
        "seeds": len(seeds),
        "static": static,
        "first_phase_alone": first,
        "highest_rate_in_first_phase": rates,
        "fastest_in_first_phase": quickest,
        "best_in_hindsight": hindsight,
        "adaptive": adaptive,
        "steady": steady,
    }


def _highest_rate(case: Case, placement: str) -> float:
    """Requests of the first phase per second that the scarcest stage can do, with full decode batches."""
    costs, phase, roles = case.costs, case.first_phase, Placement.parse(placement).roles
    rows = sum(sum(item.rows) for item in phase.media)
    step_s = costs.decode_sequence + costs.decode_step / case.sizes.max_num_seqs
    request_s = {
        Role.E: costs.encode_unit * sum(len(item.rows) for item in phase.media) + costs.encode_row * rows,
        Role.P: costs.prefill_step + costs.prefill_token * (rows + phase.text_tokens),
        Role.D: step_s * (phase.output_tokens - 1),
    }
    return min(roles.count(role) / seconds for role, seconds in request_s.items())


def _mean(case: Case, placement: str, seeds: Iterable[int], *, adaptive: bool = False) -> dict[str, Any]:
    return _play(case, placement, [case.load(seed) for seed in seeds], adaptive=adaptive)


def _steady(case: Case, placement: str, seeds: Iterable[int], *, adaptive: bool = False) -> dict[str, Any]:
    loads = [poisson([case.first_phase], case.rate, seed) for seed in seeds]
    return _play(case, placement, loads, adaptive=adaptive)


def _play(case: Case, placement: str, loads: list[list[Demand]], *, adaptive: bool) -> dict[str, Any]:
    """Means over the loads of the means over their requests."""
    runs: list[list[Record]] = []
    ends: Counter[str] = Counter()
    lines: list[str] = []
    began = time.perf_counter()
    for load in loads:
        simulation = Simulation(Placement.parse(placement), case.costs, case.sizes)
        adaptation = Adaptation(simulation) if adaptive else None
        runs.append(simulation.run(load))
        if adaptation is not None:
            ends[str(simulation.placement())] += 1
            lines += [f"{decision.at_s:.0f} s: {decision.line()}" for decision in adaptation.switches]
    row: dict[str, Any] = {
        "latency_s": fmean(fmean(record.latency_s for record in run) for run in runs),
        "ttft_s": fmean(fmean(record.ttft_s for record in run) for run in runs),
        "tpot_s": fmean(fmean(record.tpot_s or 0.0 for record in run) for run in runs),
        "simulated_per_second": sum(map(len, loads)) / (time.perf_counter() - began),
    }
    if adaptive:
        row |= {"switches": len(lines) / len(loads), "ends": dict(ends), "decisions": lines}
    return row


def _show(name: str, row: dict[str, Any], note: str) -> None:
    times = f"latency {row['latency_s']:7.2f} s   TTFT {row['ttft_s']:6.3f} s   TPOT {row['tpot_s']:6.4f} s"
    print(f"    {name:24s} {times}   {note}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_result_options(parser, quick="one arrival trace of each")
    return parser.parse_args()


if __name__ == "__main__":
    main()
