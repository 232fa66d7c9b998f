"""What separate processes cost: the built-in model as 1epd and as another placement, both idle, asked in turn.

python benchmarks/hop_cost.py --json benchmarks/results/FILE.json
"""

import argparse
import base64
import io
import json
import random
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from PIL import Image
from servers import ForeignLoad, triptych_server

from triptych.bench.environment import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--placement", default="1e1p1d")
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=60, help="for each placement")
    parser.add_argument("--threads", type=int, default=1, help="per instance, for both")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    threads = ("--threads", options.threads)
    with (
        triptych_server("--placement", "1epd", *threads) as (together, pid),
        triptych_server("--placement", options.placement, *threads) as (apart, other_pid),
        httpx.Client(timeout=60) as client,
    ):
        samples: dict[str, list[tuple[float, float]]] = {"1epd": [], options.placement: []}
        rng = random.Random(0)
        load = ForeignLoad([pid, other_pid])
        for number in range(options.requests + 5):
            body = _body(rng, options.pictures, options.output_tokens)
            for name, url in (("1epd", together), (options.placement, apart)):
                sample = _ask(client, url, body)
                if number >= 5:  # the first ones warm up
                    samples[name].append(sample)
        foreign = load.stop()
    figures = {
        name: {"ttft_ms": median(ttft for ttft, _ in pairs), "tpot_ms": median(tpot for _, tpot in pairs)}
        for name, pairs in samples.items()
    }
    base, split = figures["1epd"], figures[options.placement]
    result: dict[str, Any] = {
        "command": "python benchmarks/hop_cost.py " + " ".join(sys.argv[1:]),
        "environment": environment(),
        "foreign_cores": foreign,
        "figures": figures,
        "added_ttft_ms": split["ttft_ms"] - base["ttft_ms"],
        "tpot_ratio": split["tpot_ms"] / base["tpot_ms"],
        "samples_s": samples,
    }
    shown = {key: value for key, value in result.items() if key not in ("samples_s", "environment", "command")}
    print(json.dumps(shown, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1, default=str) + "\n")


def _body(rng: random.Random, pictures: int, output_tokens: int) -> dict[str, Any]:
    """Pictures that no cache knows."""
    parts = [{"type": "image_url", "image_url": {"url": _picture(rng)}} for _ in range(pictures)]
    question = {"type": "text", "text": f"What colour is the circle in picture {max(1, pictures)}?"}
    return {
        "model": "triptych-demo",
        "messages": [{"role": "user", "content": [*parts, question]}],
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _picture(rng: random.Random) -> str:
    file = io.BytesIO()
    Image.frombytes("RGB", (8, 8), rng.randbytes(192)).resize((224, 224)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _ask(client: httpx.Client, url: str, body: dict[str, Any]) -> tuple[float, float]:
    """TTFT and TPOT in milliseconds, from the first text to the end: tokens without text of their own count as well."""
    began = time.perf_counter()
    first = last = 0.0
    num_tokens = 0
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
            elif chunk["choices"] and (
                chunk["choices"][0]["delta"].get("content") or chunk["choices"][0]["finish_reason"]
            ):
                last = time.perf_counter()
                first = first or last
    return (first - began) * 1e3, (last - first) * 1e3 / max(1, num_tokens - 1)


main()
