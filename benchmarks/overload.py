"""What overload does: five times as many requests as can be answered, for a minute.

    python benchmarks/overload.py

One `1e1pd` server with random weights, text and pictures mixed, and objectives for time to first token and time per
token. First the capacity (a closed loop), then the goodput at Poisson rates around it, of which the best is the peak;
then five times the capacity. Goodput counts requests that met both objectives. Told are the goodput under overload
against the peak, how long refused requests waited for their 503, and what the memory of all processes did.
"""

import argparse
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil
from checkpoints import Checkpoint, Decoder, Tower
from measuring import add_result_options, fresh_seed, verdict, write_result
from servers import instances, triptych_server, wait_until_idle

from triptych.bench import BenchOptions, measure
from triptych.bench.options import Kind
from triptych.bench.report import Record, percentile

CHECKPOINT = Checkpoint("whole", Tower(256, 6, 4, 704), Decoder(hidden=512, layers=8, heads=8, kv_heads=4, ffn=1408))
KINDS = (
    Kind(name="text", prompt_tokens=64, output_tokens=16),
    Kind(name="picture", images=1, prompt_tokens=32, output_tokens=16),
)
SLO_TTFT_MS, SLO_TPOT_MS = 2000.0, 400.0
MAX_QUEUE_S = 0.6
AROUND = (0.8, 1.2, 1.6, 2.0, 2.5)  # rates, as parts of the capacity
OVERLOAD = 5.0
REFUSED_WITHIN_S = 0.1


def main() -> None:
    options = _options()
    with (
        tempfile.TemporaryDirectory() as folder,
        triptych_server(
            CHECKPOINT.write(Path(folder)),
            *("--load-format", "dummy", "--placement", "1e1pd", "--max-model-len", 4096, "--max-queue-s", MAX_QUEUE_S),
            *("--slo-ttft-ms", SLO_TTFT_MS, "--slo-tpot-ms", SLO_TPOT_MS, "--kv-cache-gib", 0.5),
        ) as (url, pid),
    ):
        load = Load(url, [pid, *(instance["pid"] for instance in instances(url))])
        load.run("warm-up", requests=8, concurrency=4)
        capacity = load.run("capacity", requests=options.requests, concurrency=12)["requests_per_s"]
        rates = [load.at_rate(capacity * part, options.seconds / 2) for part in AROUND]
        peak = max(row["goodput"] for row in rates)
        over = load.at_rate(capacity * OVERLOAD, options.seconds)
        answered = httpx.post(f"{url}/v1/completions", json={"prompt": "hello", "max_tokens": 4}, timeout=30)
    refused = over["refused_after_ms"]
    verdicts = [
        verdict("goodput at 5x / peak goodput", over["goodput"] / peak, 0.9, at_most=False),
        verdict("slowest refusal, s", refused["max"] / 1e3, REFUSED_WITHIN_S),
        verdict("answers that were neither 200 nor 503", over["others"], 0),
        verdict("memory after / before overload", over["memory_bytes"]["max"] / over["memory_bytes"]["first"], 1.5),
        verdict("status of a request after it", answered.status_code, 200),
    ]
    write_result("overload", options, capacity=capacity, rates=rates, overload=over, verdicts=verdicts)


class Load:
    """Runs of the load generator against one server, and what its processes need meanwhile."""

    def __init__(self, url: str, pids: list[int]) -> None:
        self._url, self._pids = url, pids

    def run(self, name: str, **load: Any) -> dict[str, Any]:
        wait_until_idle(self._pids)
        memory = MemoryWatch(self._pids)
        measurement = measure(
            BenchOptions(
                url=self._url,
                kinds=KINDS,
                ignore_eos=True,
                image_sizes=("336x336",),
                seed=fresh_seed(name),
                slo_ttft_ms=SLO_TTFT_MS,
                slo_tpot_ms=SLO_TPOT_MS,
                **load,
            )
        )
        summary = measurement.summary
        row = {
            "name": name,
            "requests_per_s": summary.requests_per_s,
            "goodput": summary.goodput_requests_per_s,
            "send_lag_ms_p99": summary.send_lag_ms_p99,
            "duration_s": summary.duration_s,
            "memory_bytes": memory.stop(),
            **_outcome(measurement.requests),
        }
        print(f"    {name:20s} goodput {row['goodput']:6.2f}/s  {row['statuses']}", flush=True)
        return row

    def at_rate(self, rate: float, seconds: float) -> dict[str, Any]:
        row = self.run(f"{rate:.2f} requests/s", rate=rate, requests=max(8, int(rate * seconds)))
        return {"rate": rate, **row}


class MemoryWatch:
    """The sum over all processes of what they alone have in memory, once a second."""

    def __init__(self, pids: list[int]) -> None:
        self._processes = [psutil.Process(pid) for pid in pids]
        self._samples = [self._now()]
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> dict[str, int]:
        self._stopped.set()
        self._thread.join()
        return {"first": self._samples[0], "last": self._samples[-1], "max": max(self._samples)}

    def _watch(self) -> None:
        while not self._stopped.wait(1.0):
            self._samples.append(self._now())

    def _now(self) -> int:
        return sum(process.memory_full_info().uss for process in self._processes)


def _outcome(records: list[Record]) -> dict[str, Any]:
    statuses = Counter(record.status for record in records)
    refused = sorted(1e3 * (r.failed_after_s or 0.0) for r in records if r.status == 503)
    shown = {"p50": percentile(refused, 50), "p99": percentile(refused, 99), "max": refused[-1]} if refused else {}
    others = sum(record.error is not None and record.status != 503 for record in records)
    return {"statuses": dict(statuses), "others": others, "refused_after_ms": shown}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of overload; half as long for each other rate")
    parser.add_argument("--requests", type=int, default=150, help="of the closed loop")
    add_result_options(parser)
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.requests = 6.0, 24
    return options


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"    took {time.monotonic() - started:.0f} s")
