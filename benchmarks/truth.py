"""Is the simulator right? The live engine and the simulator with a measured profile, on equal requests at equal times.

    python benchmarks/truth.py                       # measures a profile before each round
    python benchmarks/truth.py --profile profile.json
    python benchmarks/truth.py --quick               # two workloads, a loose bound

The built-in model, one thread per instance, so that up to five processes share the cores: server, load generator and
instances. Arrivals are Poisson, and independent of answers; answers have a fixed length. A load is a share of what the
simulator says that the placement can do. Every round has a profile and requests of its own; workloads take turns, and
what counts is the median over the rounds of simulated over live: over the quiet ones, where there are any. What
strangers took of the cores during a run is measured, and the simulated machine has so much less: that they were there
is not the simulator's to foresee.

Nor is it that a virtual machine computes at one speed now and at another a minute later. So the steps of an engine that
is alone are timed before and after the profile is measured, and before and after every run. A run in which they took
another time is not steady, and counts only where fewer than three are.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from measuring import (
    FOREIGN_LIMIT,
    Engine,
    Round,
    add_common_options,
    disturbance,
    fresh_seed,
    one_round,
    verdict,
    write_result,
)
from servers import ForeignLoad, triptych_server

from triptych.bench.workload import picture
from triptych.config import GIB, InstanceConfig, MemoryConfig, ModelConfig, SchedulingConfig
from triptych.core import InstanceId, Placement, Role
from triptych.demo import checkpoint_path
from triptych.engine.fitting import Fitter
from triptych.engine.heap import keep_large_blocks
from triptych.engine.rig import Rig
from triptych.planning import files
from triptych.planning.costs.profile import Profile
from triptych.planning.simulation.calibration import capacity
from triptych.planning.simulation.frontend import Record
from triptych.planning.simulation.simulator import Simulation
from triptych.planning.workloads.demand import Demand, Item

MEDIAN_LIMIT, WORST_LIMIT = 0.15, 0.30
QUICK_LIMIT = 1.0
ROWS = 16  # of any picture of the sizes here, with the built-in model
LEAD_TOKENS = 8  # of its chat template, before the first picture
FIGURES = ("ttft", "tpot", "throughput")
FEWEST, MOST = 16, 400  # requests of one run
LOOK_S = 1.0
NOT_STEADY = "NOT STEADY"
LEAST_CORES = 0.1
PLAYS = {"encode": 12, "prefill": 16, "decode": 4}  # of requests by which steps are timed
ENOUGH_STEADY = 3  # runs: the median of fewer is luck
STEADY = 0.15  # by how much steps may take another time than when the profile was measured


@dataclass(frozen=True)
class Case:
    placement: str
    images: int
    side: int  # pixels
    text_tokens: int
    output_tokens: int
    load: float  # share of what the placement can do

    @property
    def name(self) -> str:
        pictures = f"{self.images} x {self.side}px" if self.images else "text"
        return f"{self.placement} {pictures} {self.text_tokens}+{self.output_tokens} at {self.load:.0%}"


CASES = [
    Case("1epd", 0, 0, 64, 32, 0.1),
    Case("1epd", 2, 448, 32, 16, 0.6),
    Case("1epd", 8, 224, 32, 32, 0.4),
    Case("1e1pd", 1, 896, 32, 32, 0.1),
    Case("1e1pd", 4, 448, 32, 32, 0.6),
    Case("1e1pd", 1, 1344, 32, 16, 0.8),
    Case("1ep1d", 0, 0, 512, 48, 0.6),
    Case("1ep1d", 2, 448, 32, 48, 0.5),
    Case("1e1p1d", 0, 0, 128, 64, 0.5),
    Case("1e1p1d", 2, 672, 32, 16, 0.1),
    Case("1e1p1d", 4, 448, 32, 32, 0.7),
    Case("2epd", 1, 448, 32, 32, 0.1),
    Case("2epd", 2, 448, 64, 32, 0.8),
    Case("2e1pd", 8, 448, 32, 16, 0.1),
    Case("2e1pd", 4, 672, 32, 32, 0.6),
]
QUICK_CASES = [Case("1epd", 0, 0, 64, 32, 0.3), Case("1e1pd", 2, 448, 32, 16, 0.3)]


class Speed:
    """How long steps take in an engine that is alone, in CPU seconds."""

    def __init__(self) -> None:
        keep_large_blocks()
        torch.set_num_threads(1)
        self._folder = tempfile.TemporaryDirectory(prefix="triptych-")  # its sockets are there as long as it is
        folder = self._folder.name
        config = InstanceConfig(
            id=InstanceId("alone"),
            role=Role.EPD,
            epoch="1",
            server_pid=os.getpid(),
            inbox=f"ipc://{folder}/inbox",
            frontend=f"ipc://{folder}/frontend",
            threads=1,
            transfer="shm",
            model=ModelConfig(path=str(checkpoint_path()), name="built-in"),
            memory=MemoryConfig(kv_cache_bytes=GIB // 16),
            scheduling=SchedulingConfig(),
        )
        with torch.inference_mode():
            self._rig = Rig(config, Fitter(config), time.process_time)
        self.steps_s()  # the first ones are slow
        self._usual_s: Mapping[str, float] = {}

    def begin(self, *looks: Mapping[str, float]) -> None:
        """The mean of these is the measure."""
        self._usual_s = {stage: fmean(look[stage] for look in looks) for stage in looks[0]}

    def ratios(self) -> dict[str, float]:
        """Of times now to those that are the measure, by stage."""
        return {stage: now_s / self._usual_s[stage] for stage, now_s in self.steps_s().items()}

    def steps_s(self) -> dict[str, float]:
        rig = self._rig
        requests = {
            "encode": lambda: rig.pictures(448, 448, 1),
            "prefill": lambda: rig.text(120, 1),
            "decode": lambda: rig.text(64, 120),
        }
        with torch.inference_mode():
            turns = {
                stage: [turn for _ in range(plays) for turn in rig.play([requests[stage]()])]
                for stage, plays in PLAYS.items()
            }
        return {
            "encode": median(turn.encode_s for turn in turns["encode"] if turn.works),
            "prefill": median(turn.language_s for turn in turns["prefill"] if turn.chunks),
            "decode": median(turn.language_s for turn in turns["decode"] if turn.chunks and turn.chunks[0][2]),
        }


def main() -> None:
    options = _options()
    cases = [case for case in (QUICK_CASES if options.quick else CASES) if options.only in case.name]
    if not cases:
        sys.exit(f"--only: no workload has {options.only!r} in its name")
    speed, profiles = Speed(), list[Profile]()
    runs: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    for number in range(1 if options.quick else options.rounds):
        if options.profile is None or number == 0:
            before = speed.steps_s()
            profiles.append(_profile(options))
            speed.begin(before, speed.steps_s())
        for placement in dict.fromkeys(case.placement for case in cases):
            with triptych_server("--placement", placement, "--threads", 1, *options.serve.split()) as (url, pid):
                engine = Engine("live", url, [pid])
                for case in cases:
                    if case.placement == placement:
                        wait_until_quiet(options.wait, [pid])
                        runs[case].append(_compare(case, profiles[-1], engine, number, options.seconds, speed))
    rows = [_row(case, found) for case, found in runs.items()]
    limits = (QUICK_LIMIT, QUICK_LIMIT) if options.quick else (MEDIAN_LIMIT, WORST_LIMIT)
    print()
    verdicts = []
    for figure in FIGURES:
        of_one = [abs(row["simulated_over_live"][figure] - 1) for row in rows]
        verdicts.append(verdict(f"{figure}: median relative error over workloads", median(of_one), limits[0]))
        verdicts.append(verdict(f"{figure}: worst relative error", max(of_one), limits[1]))
    write_result("truth", options, profiles=[_plain(profile) for profile in profiles], rows=rows, verdicts=verdicts)
    sys.exit(0 if all(one["reached"] for one in verdicts) else 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_options(parser, rounds=5, requests=0)
    parser.add_argument("--profile", type=Path, help="file that triptych profile wrote; measured anew if left out")
    parser.add_argument("--only", default="", help="workloads whose name has this in it")
    parser.add_argument("--seconds", type=float, default=8.0, help="of arrivals in one run")
    parser.add_argument(
        "--wait", type=float, default=20.0, help="seconds that a run waits for a quiet machine, at most"
    )
    return parser.parse_args()


def _profile(options: argparse.Namespace) -> Profile:
    if options.profile is not None:
        return Profile.load(options.profile)
    wait_until_quiet(options.wait, [])
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "triptych.cli", "profile", "--threads", "1", "--output", "profile.json"]
        subprocess.run([*command, "--quick"] if options.quick else command, check=True, cwd=folder)
        return Profile.load(Path(folder, "profile.json"))


def wait_until_quiet(limit_s: float, pids: list[int]) -> None:
    """Until nobody but these processes works, or so long; rows say what disturbed them."""
    deadline = time.perf_counter() + limit_s
    while time.perf_counter() < deadline:
        load = ForeignLoad(pids)
        time.sleep(LOOK_S)
        if load.stop() < FOREIGN_LIMIT:
            return


# ---- one workload, live and simulated


def _compare(case: Case, profile: Profile, engine: Engine, number: int, seconds: float, speed: Speed) -> dict[str, Any]:
    placement = Placement.parse(case.placement)
    rate = case.load * capacity(profile.costs(), profile.as_served(placement), placement, _demand(case))
    requests = round(min(MOST, max(FEWEST, rate * seconds)))
    before = speed.ratios()
    live = one_round(
        engine,
        [engine],
        seed=fresh_seed(case.name, number),
        requests=requests,
        rate=rate,
        images=case.images,
        image_sizes=(f"{case.side or 224}x{case.side or 224}",),
        prompt_tokens=case.text_tokens,
        output_tokens=case.output_tokens,
        warmup=3,
    )
    if live["num_failed"]:
        raise RuntimeError(f"{case.name}: {live['errors']}")
    after = speed.ratios()
    slow = {stage: fmean((before[stage], after[stage])) for stage in before}
    found = {
        "rate": rate,
        "requests": requests,
        "live": _live(live),
        "simulated": _simulated(_simulate(case, profile, _demands(case, live), live["load"]["foreign_cores"])),
        "step_times": [before, after],  # times those when the profile was measured
    }
    unsteady = max(abs(ratio - 1) for ratio in (*before.values(), *after.values())) > STEADY
    note = disturbance([live]) or (NOT_STEADY if unsteady else "")
    told = " ".join(f"{ratio:.2f}" for ratio in slow.values())
    print(f"{case.name:36s} {rate:6.2f} req/s  {_line(found)}  {told} {note}", flush=True)
    return {**found, "load": live["load"], "note": note}


def _demands(case: Case, live: Round) -> list[Demand]:
    """The requests that the live engine got: when, and of which size."""
    return [
        replace(
            _demand(case),
            at_s=record["scheduled_s"],
            text_tokens=record["prompt_tokens"] - ROWS * case.images,
            output_tokens=record["completion_tokens"],
        )
        for record in live["requests"]
    ]


def _demand(case: Case) -> Demand:
    nbytes = len(picture((0, 0, 0), case.side, case.side, "jpeg")) if case.images else 0
    item = Item((ROWS,), case.side * case.side, nbytes)
    media = (item,) * case.images
    return Demand(0.0, media, case.text_tokens, case.output_tokens, lead_tokens=LEAD_TOKENS)


def _simulate(case: Case, profile: Profile, demands: Sequence[Demand], foreign_cores: float) -> list[Record]:
    placement, costs = Placement.parse(case.placement), profile.costs()
    costs = replace(costs, cores=max(LEAST_CORES, costs.cores - foreign_cores))
    return Simulation(placement, costs, profile.as_served(placement)).run(demands)


def _live(found: Round) -> dict[str, float]:
    """Answers end with their last token, also where that one has no text of its own."""
    requests = found["requests"]
    ends = [record["sent_s"] + record["e2e_s"] for record in requests]
    return {
        "ttft": fmean(record["ttft_s"] for record in requests),
        "tpot": fmean((one["e2e_s"] - one["ttft_s"]) / (one["completion_tokens"] - 1) for one in requests),
        "throughput": len(requests) / max(ends),
    }


def _simulated(records: Sequence[Record]) -> dict[str, float]:
    return {
        "ttft": fmean(record.ttft_s for record in records),
        "tpot": fmean(record.tpot_s or 0.0 for record in records),
        "throughput": len(records) / max(record.finished_s or 0.0 for record in records),
    }


# ---- what comes of it


def _row(case: Case, all_runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    quiet = [run for run in all_runs if run["note"] in ("", NOT_STEADY)] or all_runs
    steady = [run for run in quiet if not run["note"]]
    steady = steady if len(steady) >= ENOUGH_STEADY else quiet
    ratios = {figure: median(run["simulated"][figure] / run["live"][figure] for run in steady) for figure in FIGURES}
    found = {
        "workload": case.name,
        "live": {figure: median(run["live"][figure] for run in steady) for figure in FIGURES},
        "simulated_over_live": ratios,
        "steady_runs": sum(not run["note"] for run in all_runs),
        "runs": list(all_runs),
    }
    told = " ".join(f"{figure} {ratio - 1:+.0%}" for figure, ratio in ratios.items())
    print(f"{case.name:36s} median over rounds: {told}", flush=True)
    return found


def _line(found: dict[str, Any]) -> str:
    live, simulated = found["live"], found["simulated"]
    parts = []
    for figure, unit, scale in (("ttft", "ms", 1e3), ("tpot", "ms", 1e3), ("throughput", "req/s", 1.0)):
        real, predicted = live[figure] * scale, simulated[figure] * scale
        parts.append(f"{figure} {real:7.2f} -> {predicted:7.2f} {unit} ({predicted / real - 1:+4.0%})")
    return "  ".join(parts)


def _plain(profile: Profile) -> Any:
    return json.loads(files.dumped(profile))


if __name__ == "__main__":
    main()
