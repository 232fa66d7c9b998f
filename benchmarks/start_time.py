"""Seconds from the command to /health 200, with the built-in model: python benchmarks/start_time.py --json FILE"""

import argparse
import json
import sys
import time
from pathlib import Path

import httpx
from servers import triptych_server

from triptych.bench.environment import environment

PLACEMENTS = ("1epd", "1e1pd", "1e1p1d", "2e2p2d")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {placement: [] for placement in PLACEMENTS}
    for _ in range(options.rounds):
        for placement in PLACEMENTS:
            began = time.perf_counter()
            with triptych_server("--placement", placement) as (url, _):
                httpx.get(f"{url}/health").raise_for_status()
                seconds[placement].append(time.perf_counter() - began)
    for placement, values in seconds.items():
        print(f"{placement:8s} " + "  ".join(f"{value:5.1f} s" for value in values))
    if options.json is not None:
        result = {"command": " ".join(["python", *sys.argv]), "environment": environment(), "seconds": seconds}
        options.json.write_text(json.dumps(result, indent=1, default=str) + "\n")


main()
