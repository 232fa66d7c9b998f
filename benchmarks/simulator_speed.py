"""How fast the simulator is: 100,000 requests through placements of eight instances, on one core.

    python benchmarks/simulator_speed.py

A request is one 4K picture, 22 tokens of text and 100 of an answer, with the costs of the paper's system
(`planning/costs/reference.py`). Told is CPU time: one process computes, whatever else the machine does. Requests that
the simulated server refuses, because they would have to wait longer than five minutes, are counted: they cost less.
"""

import argparse
import time
from typing import Any

from measuring import add_result_options, verdict, write_result

from triptych.core import Placement
from triptych.planning.costs.reference import PAPER_COSTS, PICTURE_4K
from triptych.planning.simulation.simulator import Simulation
from triptych.planning.workloads.demand import Phase, poisson

CASES = (("5e2p1d", 2.8), ("8epd", 6.0), ("3e2p3d", 4.0))  # and requests per second, which they can do
TEXT_TOKENS, OUTPUT_TOKENS = 22, 100
TARGET_S = 60.0  # for so many requests:
REQUESTS = 100_000


def main() -> None:
    options = _options()
    rows = [simulate(placement, rate, options.requests) for placement, rate in CASES]
    scale = REQUESTS / options.requests
    verdicts = [
        verdict(f"{row['placement']}: CPU seconds for {REQUESTS} requests", row["cpu_s"] * scale, TARGET_S)
        for row in rows
    ]
    write_result("simulator-speed", options, requests=options.requests, rows=rows, verdicts=verdicts)


def simulate(placement: str, rate: float, num_requests: int) -> dict[str, Any]:
    demands = poisson([Phase(num_requests, OUTPUT_TOKENS, (PICTURE_4K,), TEXT_TOKENS)], rate, seed=0)
    simulation = Simulation(Placement.parse(placement), PAPER_COSTS)
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    records = simulation.run(demands)
    cpu_s, wall_s = time.process_time() - began_cpu_s, time.perf_counter() - began_s
    refused = sum(record.error is not None for record in records)
    print(
        f"{placement} at {rate:g} req/s: {cpu_s:.1f} s of CPU ({wall_s:.1f} s), {1e3 * cpu_s / num_requests:.3f} ms a "
        f"request, {simulation.clock.num_events} events, {refused} refused",
        flush=True,
    )
    return {
        "placement": placement,
        "rate": rate,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "simulated_s": simulation.clock.now,
        "events": simulation.clock.num_events,
        "refused": refused,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    add_result_options(parser, quick="2,000 requests")
    options = parser.parse_args()
    if options.quick:
        options.requests = 2000
    return options


if __name__ == "__main__":
    main()
