"""Triptych beside another OpenAI-compatible server on the same cores and the same checkpoint, alternating.

    python benchmarks/against_peer.py CHECKPOINT --dtype float32 --peer-url http://127.0.0.1:8100 --peer-pid PID \
        --peer-name "vLLM 0.32.0 (CPU)" --json benchmarks/results/FILE.json

The peer runs already and serves the model under --peer-model; one Triptych server at a time runs beside it, and each is
idle while the other is measured. Every request has its own pictures and text. A row with more than 0.15 foreign cores
on either side says so.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from servers import ForeignLoad, triptych_server

from triptych.bench.environment import environment

# name: pictures, tokens of text, output tokens
SCENARIOS = {"text": (0, 128, 64), "1 picture": (1, 32, 64), "4 pictures": (4, 32, 32), "8 pictures": (8, 32, 32)}
FOREIGN_LIMIT = 0.15
STARTED_AT = datetime.now(UTC).isoformat()
FIGURES = ("ttft_ms", "tpot_ms")


def main() -> None:
    options = _options()
    rows: list[dict[str, Any]] = []
    for placement in options.placement:
        arguments = [options.checkpoint, "--dtype", options.dtype, "--placement", placement, *options.serve.split()]
        with triptych_server(*arguments, "--max-model-len", 8192) as (url, pid):
            for scenario in options.scenario:
                for concurrency in options.concurrency:
                    rows += _compare(options, placement, (url, pid), scenario, concurrency)
                    _write(options, rows)


def _compare(
    options: argparse.Namespace, placement: str, ours: tuple[str, int], scenario: str, concurrency: int
) -> list[dict[str, Any]]:
    """Both engines, `rounds` times in turn; one row for each engine with the figures of all rounds."""
    engines = {
        f"triptych {placement}": (*ours, None),
        options.peer_name: (options.peer_url, options.peer_pid, options.peer_model),
    }
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for number in range(options.rounds):
        for name, (url, _, model) in engines.items():
            load = ForeignLoad([ours[1], options.peer_pid])
            summary = _bench(
                options, url, model, scenario, concurrency, seed=fresh_seed(placement, scenario, concurrency, number)
            )
            rounds[name].append({"foreign_cores": load.stop(), **summary})
    rows = [_row(name, scenario, concurrency, summaries) for name, summaries in rounds.items()]
    for row in rows:
        print(_line(row), flush=True)
    ours_row, peer_row = rows
    ratios = {figure: ours_row[figure] / max(peer_row[figure], 1e-9) for figure in (*FIGURES, "requests_per_s")}
    print("    ratio: " + "  ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()), flush=True)
    ours_row["ratio_to_peer"] = ratios
    return rows


def _bench(
    options: argparse.Namespace, url: str, model: str | None, scenario: str, concurrency: int, seed: int
) -> dict[str, Any]:
    images, text_tokens, output_tokens = SCENARIOS[scenario]
    num_requests = max(options.requests, options.requests_per_client * concurrency)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "triptych.cli", "bench", "--url", url, "--json", file.name, "--ignore-eos"]
        command += ["--requests", num_requests, "--concurrency", concurrency, "--images", images, "--seed", seed]
        command += ["--prompt-tokens", text_tokens, "--output-tokens", output_tokens, "--warmup", 2]
        if model is not None:
            command += ["--model", model]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
        summary: dict[str, Any] = json.loads(Path(file.name).read_text())["summary"]
        return summary


def fresh_seed(*run: object) -> int:
    """Another one for every run on a live server, so that no cache ever helps; the same for both engines."""
    return zlib.crc32(f"{run} {STARTED_AT}".encode()) % 1_000_000


def _row(name: str, scenario: str, concurrency: int, summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds of each round's median."""

    def middle(values: list[float]) -> float:
        ordered = sorted(values)
        half = len(ordered) // 2
        return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2

    return {
        "engine": name,
        "scenario": scenario,
        "concurrency": concurrency,
        "num_requests": sum(summary["num_requests"] for summary in summaries),
        "ttft_ms": middle([summary["ttft_ms"]["p50"] for summary in summaries]),
        "tpot_ms": middle([summary["tpot_ms"]["p50"] for summary in summaries]),
        "requests_per_s": middle([summary["requests_per_s"] for summary in summaries]),
        "foreign_cores": max(summary["foreign_cores"] for summary in summaries),
        "rounds": summaries,
    }


def _line(row: dict[str, Any]) -> str:
    quiet = "" if row["foreign_cores"] <= FOREIGN_LIMIT else f"  NOT QUIET ({row['foreign_cores']:.2f} foreign cores)"
    return (
        f"{row['engine']:24s} {row['scenario']:11s} c{row['concurrency']:<3d} TTFT {row['ttft_ms']:8.1f} ms"
        f"  TPOT {row['tpot_ms']:7.2f} ms  {row['requests_per_s']:7.3f} req/s{quiet}"
    )


def _write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if options.json is not None:
        result = {
            "command": "python benchmarks/against_peer.py " + " ".join(sys.argv[1:]),
            "checkpoint": Path(options.checkpoint).name,
            "dtype": options.dtype,
            "environment": environment(),
            "rows": rows,
        }
        result["command"] = result["command"].replace(str(Path(options.checkpoint).parent) + "/", "")
        options.json.write_text(
            json.dumps(result, indent=1, default=lambda value: getattr(value, "__dict__", str(value))) + "\n"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--placement", nargs="+", default=["1epd"])
    parser.add_argument("--serve", default="", help="more arguments for triptych serve")
    parser.add_argument("--peer-url", required=True)
    parser.add_argument("--peer-pid", type=int, required=True)
    parser.add_argument("--peer-name", default="peer")
    parser.add_argument("--peer-model", default=None, help="what the peer calls the model")
    parser.add_argument("--scenario", nargs="+", default=["text", "1 picture", "4 pictures"], choices=SCENARIOS)
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=8, help="per round and engine, at least")
    parser.add_argument("--requests-per-client", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


main()
