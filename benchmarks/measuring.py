"""What the measurements of this folder share: rounds in turn, medians over them, tables, and where results go."""

import argparse
import asyncio
import json
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from servers import CoreWatch, wait_until_idle

from triptych.bench import BenchOptions, measure
from triptych.bench.client import Client
from triptych.bench.environment import environment
from triptych.bench.report import Record, percentile

RESULTS = Path(__file__).resolve().parent / "results"
FOREIGN_LIMIT = 0.15  # cores busy with something else, from which on a row says so
PAUSE_LIMIT_S = 1.0
MOST_ATTEMPTS = 4
STARTED_AT = datetime.now(UTC)

Round = dict[str, Any]  # a Summary as a dict, with "load" (see CoreWatch) and "requests"


@dataclass(frozen=True)
class Engine:
    """A server that runs, and the processes that it is made of."""

    name: str
    url: str
    pids: list[int]


def alternate(engines: Sequence[Engine], num_rounds: int, case: str, **load: Any) -> dict[str, list[Round]]:
    """Every engine in turn, in the other order every other time, with equal requests that no cache has seen."""
    rounds: dict[str, list[Round]] = {engine.name: [] for engine in engines}
    for number in range(num_rounds):
        for engine in engines if number % 2 == 0 else reversed(engines):
            rounds[engine.name].append(one_round(engine, engines, seed=fresh_seed(case, number), **load))
    return rounds


def one_round(engine: Engine, everybody: Sequence[Engine], *, seed: int, **load: Any) -> Round:
    """One run of the load generator against one engine while the others idle; again if the machine stood still."""
    for attempt in range(MOST_ATTEMPTS):
        options = BenchOptions(url=engine.url, ignore_eos=True, seed=seed + attempt, **load)
        wait_until_idle([pid for other in everybody for pid in other.pids])
        watch = CoreWatch(engine.pids, [pid for other in everybody if other is not engine for pid in other.pids])
        measurement = measure(options)
        cores = watch.stop()
        if cores["paused_s"] < PAUSE_LIMIT_S:
            break
        print(f"    {engine.name}: the machine stood still for {cores['paused_s']:.1f} s", flush=True)
    summary: Round = msgspec.to_builtins(measurement.summary)
    if summary["num_failed"]:
        print(f"    {engine.name}: {summary['num_failed']} requests failed: {summary['errors']}", flush=True)
    return {"load": cores, "attempts": attempt + 1, **summary, "requests": msgspec.to_builtins(measurement.requests)}


def ask(url: str, bodies: Sequence[dict[str, Any]], kind: str) -> list[Record]:
    """Chat requests one at a time."""

    async def ask_all() -> list[Record]:
        client, began, records = Client(url, None, 600.0), time.perf_counter(), []
        for index, body in enumerate(bodies):
            fields = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **body}
            answer = await client.send(client.request("POST", "/v1/chat/completions", msgspec.json.encode(fields)))
            records.append(Record.of(index, 0.0, began, answer, kind))
        client.close()
        return records

    records = asyncio.run(ask_all())
    for record in records:
        if record.error is not None:
            raise RuntimeError(f"{kind}: {record.error}")
    return records


def fresh_seed(*run: object) -> int:
    """Another one for every run on a live server, so that no cache ever helps; the same for every engine."""
    return zlib.crc32(f"{run} {STARTED_AT.isoformat()}".encode()) % 1_000_000


def middle(rounds: Sequence[Round], *path: str) -> float:
    """The median over the rounds of one figure: `middle(rounds, "ttft_ms", "p50")`. NaN where a round has none."""
    values = []
    for found in rounds:
        value: Any = found
        for key in path:
            value = None if value is None else value[key]
        values.append(float("nan") if value is None else float(value))
    return median(values)


def disturbance(rounds: Sequence[Round]) -> str:
    """What is wrong with a row, or nothing."""
    foreign = max(found["load"]["foreign_cores"] for found in rounds)
    idle = max(found["load"]["idle_servers_cores"] for found in rounds)
    failed = sum(found["num_failed"] for found in rounds)
    notes = [f"NOT QUIET ({foreign:.2f} foreign cores)"] if foreign > FOREIGN_LIMIT else []
    notes += [f"IDLE SERVERS USED {idle:.2f} cores"] if idle > FOREIGN_LIMIT else []
    paused = max(found["load"]["paused_s"] for found in rounds)
    notes += [f"STOOD STILL FOR {paused:.1f} s"] if paused > PAUSE_LIMIT_S else []
    notes += [f"{failed} FAILED"] if failed else []
    return "  ".join(notes)


def pooled(rounds: Sequence[Round], figure: str, percent: float, kind: str | None = None) -> float:
    """A percentile in milliseconds over all requests of all rounds, or those of one kind. `figure`: of a record."""
    values: list[float] = []
    for record in (record for found in rounds for record in found["requests"]):
        if record["error"] is None and kind in (None, record["kind"]):
            value = record[figure]
            values += value if isinstance(value, list) else [] if value is None else [value]
    return 1e3 * percentile(sorted(values), percent) if values else float("nan")


def verdict(name: str, value: float, target: float, *, at_most: bool = True) -> dict[str, Any]:
    """Prints one figure beside what it must reach, and returns both."""
    reached = value <= target if at_most else value >= target
    sign = "<=" if at_most else ">="
    print(f"    {name:58s} {value:7.3f}   target {sign} {target:g}   {'reached' if reached else 'MISSED'}", flush=True)
    return {"figure": name, "value": value, "target": f"{sign} {target:g}", "reached": reached}


def add_common_options(parser: argparse.ArgumentParser, *, rounds: int, requests: int) -> None:
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--requests", type=int, default=requests, help="of each engine in each round")
    parser.add_argument("--serve", default="", help="more arguments for every triptych serve")
    add_result_options(parser)


def add_result_options(
    parser: argparse.ArgumentParser, quick: str = "the smallest run that goes through everything"
) -> None:
    """What `write_result` asks for."""
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, help="benchmarks/results/NAME-DATE.json if left out; none with --quick")


def write_result(name: str, options: argparse.Namespace, **result: Any) -> None:
    """Raw results with date, commit and machine."""
    path: Path | None = options.json
    if path is None:
        if options.quick:
            return
        path = RESULTS / f"{name}-{STARTED_AT.date()}.json"
    arguments = [argument.rpartition("/")[2] if argument.startswith("/") else argument for argument in sys.argv[1:]]
    content = {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments]),
        "started_at": STARTED_AT.isoformat(timespec="seconds"),
        "environment": environment(),
        **result,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_compact(content), indent=1, default=str) + "\n")
    print(f"written to {path.name}")


def _compact(content: Any) -> Any:
    """Without the times of single tokens, which are most of the bytes, and with six digits of a number."""
    if isinstance(content, dict):
        return {key: _compact(value) for key, value in content.items() if key != "itl_s"}
    if isinstance(content, list | tuple):
        return [_compact(value) for value in content]
    return float(f"{content:.6g}") if isinstance(content, float) else content
