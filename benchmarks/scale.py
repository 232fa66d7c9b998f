"""Scale on paper: simulated kept rates from 8 to 1,024 instances, and what ends it: the one router, messages, links.

    python benchmarks/scale.py
    python benchmarks/scale.py --server benchmarks/results/scale-2026-11-23.json   # the server as measured then

Instances, requests and links are modelled: with what the paper's engine took on an A100 (`planning/costs/reference`),
and by the roofline of an H100 (`planning/costs/analytic`), which is many times as fast. The server is measured on this
machine (`router_costs.py`), and simulated as one process on one core. Stages, memory and the router are those of the
engine and the server. docs/scale.md says what came of it.
"""

import argparse
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from measuring import RESULTS, STARTED_AT, add_result_options, write_result
from router_costs import ServerCosts, measured

from triptych.config import AdmissionConfig
from triptych.core import Placement, Role
from triptych.latency import Objectives
from triptych.planning.costs.analytic import analytic_profile
from triptych.planning.costs.cost_model import Costs
from triptych.planning.costs.hardware import find_device
from triptych.planning.costs.profile import Profile
from triptych.planning.costs.reference import PAPER_COSTS
from triptych.planning.costs.sizes import Sizes
from triptych.planning.model.shape import ModelShape
from triptych.planning.model.shapes import find_shape
from triptych.planning.search.evaluation import MAX_QUEUE_S, Evaluator
from triptych.planning.search.load import Load
from triptych.planning.search.machines import FixedMachines, Machines, ProfiledMachines, Reach
from triptych.planning.search.space import Candidate
from triptych.planning.simulation.figures import meets
from triptych.planning.simulation.simulator import Options, Simulation
from triptych.planning.workloads.demand import Demand, Rows
from triptych.planning.workloads.kinds import Repeated
from triptych.planning.workloads.presets import load
from triptych.planning.workloads.workload import Workload

NUMBERS = (8, 16, 32, 64, 128, 256, 512, 1024)
STEP = 1.04  # between the rates that are tried
MOST_SEARCHED = 256  # instances
TARGET = 0.9
FULL_CELL = 0.95  # of the kept rate of each instance in the best cell
HEARTBEAT_S = Sizes().heartbeat_s
# Into one instance, one way. 80% of: NVLink 4 (H100 data sheet); a NIC of 400 Gb/s for each GPU (DGX H100 data sheet),
# one such NIC for eight, one of 100 Gb/s for eight.
LINKS = {"NVLink 450 GB/s": 360e9, "NIC 400G each": 40e9, "NIC 400G for 8": 5e9, "NIC 100G for 8": 1.25e9}
CELLS_OF_CACHES = 4
REPEATED = Repeated(share=0.9, distinct=2000, skew=0.5)
LOAD_OF_CACHES = 0.8  # of the kept rate of a cell


# The paper's picture took 0.68 s for 640 rows; smaller ones have fewer rows, and are taken to cost as much less.
PAPER_ROW_COSTS = replace(PAPER_COSTS, encode_unit=0.0, encode_row=PAPER_COSTS.encode_unit / 640)


class _Evaluator(Evaluator):
    """Of servers that bound what decodes by `--max-num-seqs` only."""

    def _options(self, candidate: Candidate) -> Options:
        return Options(admission=AdmissionConfig(max_queue_s=MAX_QUEUE_S))


@dataclass(frozen=True)
class OneUnit:
    """Rows of a model, all of a picture as one unit: the paper's code spreads only whole pictures."""

    shape: ModelShape

    def image(self, width: int, height: int) -> tuple[int, ...]:
        return (sum(self.shape.image(width, height)),)

    def video(self, frames: int, width: int, height: int) -> tuple[int, ...]:
        return (sum(self.shape.video(frames, width, height)),)

    def audio(self, seconds: float) -> tuple[int, ...]:
        return (sum(self.shape.audio(seconds)),)


@dataclass(frozen=True, eq=False)
class Case:
    """A model on a kind of GPU. `unit`: encode, prefill, decode instances of every eight."""

    name: str
    rows_of: Rows
    profile: Profile | None  # None: the paper's costs
    unit: tuple[int, int, int]
    objectives: Objectives
    guess: float  # req/s of eight instances
    batch: float  # sequences of a decode step, about, where the decode instances are busy
    numbers: tuple[int, ...]
    seconds: float  # of arrivals in one run

    def candidate(self, number: int) -> Candidate:
        encode, prefill, decode = self.counts(number)
        return Candidate(placement=Placement.parse(f"{encode}e{prefill}p{decode}d"), max_num_seqs=128)

    def counts(self, number: int) -> tuple[int, int, int]:
        encode, prefill, decode = (count * number // sum(self.unit) for count in self.unit)
        return encode, prefill, decode

    def machines(self, demands: Sequence[Demand]) -> Machines:
        if self.profile is None:
            return FixedMachines(PAPER_ROW_COSTS, Sizes())
        return ProfiledMachines({1: self.profile}, Reach.of(list(demands)))

    def demands(self, rate: float, *, times: float = 1.0, workload: Workload | None = None) -> list[Demand]:
        """Text and pictures of the preset `mixed`, without its videos."""
        number = round(rate * self.seconds * times)
        chosen = (workload or text_and_pictures()).at_rate(rate)
        return msgspec.structs.replace(chosen, num_requests=number).demands(self.rows_of)

    def attains(self, number: int, rate: float, changes: dict[str, float], times: float) -> bool:
        demands = self.demands(rate, times=times / 2 if number > MOST_SEARCHED else times)
        machines = Served(self.machines(demands), changes)
        evaluator = _Evaluator(Load(demands, rate), machines, self.objectives, TARGET)
        return evaluator.attains(self.candidate(number), rate)

    def kept_rate(self, number: int, guess: float, changes: dict[str, float], times: float = 1.0) -> float:
        """The highest rate of those tried, a step apart, at which enough requests meet the objectives. Of many
        instances nothing above the guess is tried, and half as long: that takes long."""
        attained = self.attains(number, guess, changes, times)
        if attained and number > MOST_SEARCHED:
            return guess
        factor = STEP if attained else 1 / STEP
        while self.attains(number, guess * factor, changes, times) == attained:
            guess *= factor
        return guess if attained else guess * factor


@dataclass(frozen=True)
class Served:
    """Machines with a server process that costs time, or other links."""

    machines: Machines
    changes: dict[str, Any]

    def costs(self, candidate: Candidate) -> Costs:
        return replace(self.machines.costs(candidate), **self.changes)

    def sizes(self, candidate: Candidate) -> dict[Role, Sizes]:
        return self.machines.sizes(candidate)

    def dollars_per_hour(self, candidate: Candidate) -> float | None:
        return self.machines.dollars_per_hour(candidate)


def text_and_pictures() -> Workload:
    mixed = load("mixed")
    kinds = {name: mixed.kinds[name] for name in ("chat", "pictures")}
    return msgspec.structs.replace(mixed, name="text and pictures", kinds=kinds)


def cases(*, quick: bool) -> tuple[Case, Case]:
    minicpm, qwen = find_shape("minicpm-v-2.6"), find_shape("qwen2.5-vl-7b")
    paper = Case(
        "MiniCPM-V 2.6 on A100, paper's engine",
        OneUnit(minicpm),
        None,
        (1, 1, 6),
        Objectives(ttft_ms=3900, tpot_ms=60),
        2.6,
        8.0,
        NUMBERS[:2] if quick else NUMBERS,
        20.0,
    )
    profile = analytic_profile(qwen, find_device("H100"))
    h100 = Case(
        "Qwen2.5-VL-7B on H100, roofline",
        qwen,
        profile,
        (3, 3, 2),
        Objectives(ttft_ms=2000, tpot_ms=50),
        52.0,
        40.0,
        NUMBERS[:2] if quick else NUMBERS[:3],
        5.0 if quick else 20.0,
    )
    return paper, h100


def main() -> None:
    options = _options()
    router = measured(quick=options.quick) if options.server is None else _as_measured(options.server)
    both = cases(quick=options.quick)
    found: dict[str, Any] = {}
    with ProcessPoolExecutor(2) as pool:
        lines = {
            case: [pool.submit(_line, case, changes, router) for changes in ({}, router.of_simulation())]
            for case in both
        }
        for case, (alone, routed) in lines.items():
            found[case.name] = _case(case, router, alone.result(), routed.result())
    slow, fast = both
    rows = found[fast.name]["goodput"]
    found[fast.name]["longer"] = _longer(fast, router, rows[0])
    found[fast.name]["links"] = _links(fast, rows[0])
    found[fast.name]["caches"] = _caches(fast, router, found[fast.name])
    if not options.quick:
        _draw([(case, found[case.name]) for case in both])
    messages = [_messages(slow, number, router) for number in NUMBERS]
    write_result("scale", options, server=asdict(router), cases=found, messages=messages)


def _case(case: Case, router: ServerCosts, alone: Sequence[float], routed: Sequence[float]) -> dict[str, Any]:
    mean = _mean_request(case)
    least_s = _router_s(case, router, mean)
    _print_router(case, router, mean, least_s)
    rows = [
        {"instances": number, "alone": of_alone, "routed": of_routed}
        for number, of_alone, of_routed in zip(case.numbers, alone, routed, strict=True)
    ]
    cell = _add_cells(rows)
    _print_rows(case, rows, cell)
    return {"request": mean, "router_s": least_s, "unit": case.unit, "goodput": rows, "cell": cell} | _told(case)


def _add_cells(rows: Sequence[dict[str, float]]) -> int:
    """The largest cell whose instances are as good as in the best one, to `FULL_CELL`; and what so many of them do."""
    best = max(row["routed"] / row["instances"] for row in rows)
    cell = [row for row in rows if row["routed"] / row["instances"] >= FULL_CELL * best][-1]
    for row in rows:
        row["cells"] = cell["routed"] * row["instances"] / cell["instances"]
    return int(cell["instances"])


def _told(case: Case) -> dict[str, Any]:
    costs = asdict(PAPER_ROW_COSTS) if case.profile is None else asdict(case.profile.costs())
    return {"seconds": case.seconds, "objectives": msgspec.to_builtins(case.objectives), "costs": costs}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_result_options(parser)
    parser.add_argument("--server", type=Path, help="result of an earlier run, whose measured server is simulated")
    return parser.parse_args()


def _as_measured(result: Path) -> ServerCosts:
    return msgspec.convert(json.loads(result.read_text())["server"], ServerCosts, str_keys=True)


# ---- what a request is, and what it costs the server


def _mean_request(case: Case) -> dict[str, float]:
    demands = case.demands(20_000 / case.seconds)
    totals = {
        "prompt_tokens": sum(demand.prompt_tokens for demand in demands),
        "rows": sum(demand.media_rows for demand in demands),
        "output_tokens": sum(demand.output_tokens for demand in demands),
        "media_bytes": sum(item.nbytes for demand in demands for item in demand.media),
    }
    return {name: total / len(demands) for name, total in totals.items()}


def _router_s(case: Case, router: ServerCosts, mean: dict[str, float]) -> float:
    """Of one request where the instances are busy, beside what it costs to have many instances."""
    token_s = router.token + router.step / case.batch
    return router.request + mean["output_tokens"] * token_s + mean["media_bytes"] * router.media_byte


def _print_router(case: Case, router: ServerCosts, mean: dict[str, float], router_s: float) -> None:
    print(f"\n{case.name}. A request has", ", ".join(f"{value:,.0f} {name}" for name, value in mean.items()))
    print(
        f"Of the server process: {1e3 * router.request:.2f} ms a request, {1e6 * router.step:.0f} us a step, "
        f"{1e6 * router.token:.1f} us a token, "
        f"{1e9 * router.media_byte:.1f} ns a byte of media, {1e6 * router.peer:.2f} us a request and instance, "
        f"{1e6 * router.report:.0f} us a report"
    )
    rate = 1 / router_s
    print(f"A request takes it {1e3 * router_s:.1f} ms: {rate:.0f} req/s, {rate * mean['output_tokens']:,.0f} tokens/s")


# ---- kept rates


def _line(case: Case, changes: dict[str, float], router: ServerCosts) -> list[float]:
    """Kept rates; the search for each begins where the last one leads, or at what the router can do."""
    found: list[float] = []
    guess, least_s = case.guess * case.numbers[0] / sum(case.unit), _router_s(case, router, _mean_request(case))
    for number in case.numbers:
        began = time.process_time()
        most = 0.95 / (least_s + number * router.peer) if changes else inf
        found.append(case.kept_rate(number, min(guess, most), changes))
        grows = len(found) < 2 or found[-1] > 1.3 * found[-2]
        guess = (2 if grows else 1) * found[-1]
        print(
            f"    {case.name:38s} {'one router' if changes else 'alone':10s} {number:5d} instances "
            f"{found[-1]:8.1f} req/s, {time.process_time() - began:5.0f} s of CPU time",
            flush=True,
        )
    return found


def _print_rows(case: Case, rows: Sequence[dict[str, float]], cell: int) -> None:
    cells = f"cells of {cell}"
    print(f"{'instances':>9} {'placement':>14} {'alone':>8} {'each':>6} {'one router':>10} {cells:>12}")
    for row in rows:
        number = int(row["instances"])
        placement = "".join(f"{count}{role}" for count, role in zip(case.counts(number), "epd", strict=True))
        print(
            f"{number:9d} {placement:>14} {row['alone']:8.1f} {row['alone'] / number:6.2f} {row['routed']:10.1f} "
            f"{row['cells']:12.1f}",
            flush=True,
        )


def _longer(case: Case, router: ServerCosts, row: dict[str, float]) -> dict[str, float]:
    """Runs of four times the length: how much of a kept rate is a queue that had no time to grow."""
    number = int(row["instances"])
    alone = case.kept_rate(number, row["alone"] / STEP, {}, 4.0)
    routed = case.kept_rate(number, row["routed"] / STEP, router.of_simulation(), 4.0)
    print(f"In runs of {4 * case.seconds:g} s {number} instances: {alone:.1f} req/s alone, {routed:.1f} routed")
    return {"instances": number, "alone": alone, "routed": routed}


# ---- messages


def _messages(case: Case, number: int, router: ServerCosts) -> dict[str, float]:
    """A second, of reports alone: one a heartbeat of each instance, and of each D one for every P."""
    _, prefills, decodes = case.counts(number)
    each = 1 / HEARTBEAT_S
    found = {
        "instances": number,
        "to_server": number * each,
        "server_share": number * each * router.report,
        "between_instances": prefills * decodes * each,
        "prefill_share": decodes * each * router.receive,
        "decode_share": prefills * each * router.send,
        "table_bytes": router.table_bytes.get(number, 0) * number,
    }
    print(
        f"{number:5d} instances: {found['to_server']:6,.0f} reports/s to the server ({found['server_share']:.1%}), "
        f"{found['between_instances']:9,.0f}/s from D to P ({found['prefill_share']:.2%} of each P, "
        f"{found['decode_share']:.2%} of each D), a new table {found['table_bytes'] / 1e6:.1f} MB",
        flush=True,
    )
    return found


# ---- links


def _links(case: Case, row: dict[str, float]) -> dict[str, Any]:
    """Bytes a second at the kept rate of so many instances, and the kept rate with slower links."""
    assert case.profile is not None
    number, rate, memory, mean = int(row["instances"]), row["alone"], case.profile.memory, _mean_request(case)
    encode, prefill, decode = case.counts(number)
    found: dict[str, Any] = {
        "media_into_e": rate * mean["media_bytes"] / encode,
        "embeddings_into_p": rate * mean["rows"] * memory.embedding_row / prefill,
        "kv_into_d": rate * mean["prompt_tokens"] * memory.kv_token / decode,
    }
    print("\nGB/s into each instance:", ", ".join(f"{name} {value / 1e9:.3f}" for name, value in found.items()))
    found["goodput"] = {}
    for name, speed in LINKS.items():
        found["goodput"][name] = case.kept_rate(number, rate, {"bytes_per_second": speed})
        print(f"    {name:16s} {speed / 1e9:6.2f} GB/s: {found['goodput'][name]:6.1f} req/s", flush=True)
    return found


# ---- caches of several cells


def _caches(case: Case, router: ServerCosts, found: dict[str, Any]) -> dict[str, Any]:
    """The same requests, given to cells by chance or by the name of their first picture."""
    cell = found["cell"]
    rate = next(row["routed"] for row in found["goodput"] if row["instances"] == cell)
    usual = text_and_pictures()
    pictures = msgspec.structs.replace(usual.kinds["pictures"], repeated=REPEATED)
    workload = msgspec.structs.replace(usual, kinds=usual.kinds | {"pictures": pictures})
    demands = case.demands(rate * CELLS_OF_CACHES * LOAD_OF_CACHES, times=4.0, workload=workload)
    by_chance = np.random.default_rng(0).integers(CELLS_OF_CACHES, size=len(demands)).tolist()
    by_name = [
        chance if not demand.media or demand.media[0].name is None else _hashed(demand.media[0].name)
        for demand, chance in zip(demands, by_chance, strict=True)
    ]
    print(f"\n{CELLS_OF_CACHES} cells of {cell} that see {REPEATED.distinct} pictures again and again:")
    return {
        name: _of_cells(case, router, cell, demands, homes, name)
        for name, homes in (("by chance", by_chance), ("by media", by_name))
    }


def _hashed(name: int) -> int:
    return name * 2_654_435_761 % 2**32 * CELLS_OF_CACHES >> 32


def _of_cells(
    case: Case, router: ServerCosts, cell: int, demands: Sequence[Demand], homes: Sequence[int], name: str
) -> dict[str, float]:
    candidate, encode_s, num_met, parts = case.candidate(cell), 0.0, 0, []
    machines = Served(case.machines(demands), router.of_simulation())
    for number in range(CELLS_OF_CACHES):
        own = [demand for demand, home in zip(demands, homes, strict=True) if home == number]
        simulation = Simulation(candidate.placement, machines.costs(candidate), machines.sizes(candidate))
        num_met += sum(meets(record, case.objectives) for record in simulation.run(own))
        encode_s += simulation.busy_s[Role.E]
        parts.append(len(own))
    found = {
        "encode_s": encode_s / len(demands),
        "attainment": num_met / len(demands),
        "largest": max(parts) * CELLS_OF_CACHES / len(demands),
    }
    print(
        f"    {name:10s} {1e3 * found['encode_s']:.1f} ms of an encoder a request, {found['attainment']:.1%} in "
        f"the SLO, the largest cell gets {found['largest']:.2f} times its share",
        flush=True,
    )
    return found


def _draw(found: Sequence[tuple[Case, dict[str, Any]]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (case, result) in zip(figure.subplots(1, 2), found, strict=True):
        rows, cell = result["goodput"], result["cell"]
        lines = {"alone": "instances alone", "cells": f"cells of {cell}, a router each", "routed": "one router"}
        for (name, label), style in zip(lines.items(), ("s--", "^:", "o-"), strict=True):
            shown = [row for row in rows if name != "cells" or row["instances"] >= cell]
            axes.plot([row["instances"] for row in shown], [row[name] for row in shown], style, label=label)
        axes.set(xscale="log", yscale="log", xlabel="instances", ylabel="kept rate (req/s)")
        axes.set_title(f"Simulated: {case.name}", fontsize=10)
        axes.set_xticks([row["instances"] for row in rows], [str(row["instances"]) for row in rows])
        axes.minorticks_off()
        axes.legend(frameon=False)
    figure.savefig(RESULTS / f"scale-{STARTED_AT.date()}.png")


if __name__ == "__main__":
    main()
