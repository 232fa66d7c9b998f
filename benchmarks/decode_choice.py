"""Who decodes: every P gives to the least loaded of all D that it knows of, or of its share of them.

    python benchmarks/decode_choice.py

What a P knows of a D is up to a heartbeat old, and all P know the same: so all give to the same D until it says so.
Simulated with the first case of `scale.py` at rates in proportion to the number of instances. The second way is
`routing.pick_decode`; this script puts the first one in its place.
"""

import argparse
from collections.abc import Callable
from typing import Any

from measuring import add_result_options, write_result
from scale import Case, cases

from triptych.config import AdmissionConfig
from triptych.core import InstanceId, Stage
from triptych.latency import milliseconds
from triptych.messages import Peer
from triptych.planning.search.evaluation import MAX_QUEUE_S
from triptych.planning.simulation.figures import meets
from triptych.planning.simulation.simulator import Options, Simulation
from triptych.routing import Loads, RoutingTable, pick, pick_decode
from triptych.stages import prefill

Picker = Callable[[RoutingTable, Loads, InstanceId, str], Peer]
RATE_OF_EACH = 0.44  # req/s of an instance
RUNS = {32: 1.0, 128: 1.0, 512: 0.4}  # by the number of instances, how long requests arrive: of the seconds of the case


def main() -> None:
    options = _options()
    case, _ = cases(quick=False)
    print(f"{'instances':>9} {'req/s':>6}  {'choice':12s} {'in SLO':>7} {'TPOT p50':>9} {'p90':>9}")
    rows = [
        _row(case, number, times, name, picker)
        for number, times in list(RUNS.items())[: 1 if options.quick else None]
        for name, picker in _pickers().items()
    ]
    write_result("decode-choice", options, rate_of_each=RATE_OF_EACH, rows=rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_result_options(parser)
    return parser.parse_args()


def _pickers() -> dict[str, Picker]:
    return {"of all": _of_all, "of its share": pick_decode}


def _of_all(table: RoutingTable, loads: Loads, prefill: InstanceId, request_id: str) -> Peer:
    """Where no instance both prefills and decodes."""
    return pick(table, Stage.DECODE, loads, prefer=prefill)


def _row(case: Case, number: int, times: float, name: str, picker: Picker) -> dict[str, Any]:
    rate = RATE_OF_EACH * number
    demands, candidate = case.demands(rate, times=times), case.candidate(number)
    machines = case.machines(demands)
    simulation = Simulation(
        candidate.placement,
        machines.costs(candidate),
        machines.sizes(candidate),
        Options(admission=AdmissionConfig(max_queue_s=MAX_QUEUE_S)),
    )
    vars(prefill)["pick_decode"] = picker
    try:
        records = simulation.run(demands)
    finally:
        vars(prefill)["pick_decode"] = pick_decode
    share = sum(meets(record, case.objectives) for record in records) / len(records)
    tpot_ms = milliseconds(record.tpot_s for record in records)
    assert tpot_ms is not None
    print(f"{number:9d} {rate:6.0f}  {name:12s} {share:7.1%} {tpot_ms.p50:6.0f} ms {tpot_ms.p90:6.0f} ms", flush=True)
    return {"instances": number, "rate": rate, "choice": name, "in_slo": share, "tpot_p50_ms": tpot_ms.p50} | {
        "tpot_p90_ms": tpot_ms.p90
    }


if __name__ == "__main__":
    main()
