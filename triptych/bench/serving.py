"""What serving costs beside the model: CPU seconds of the server process and of the load generator, from a real server
that is started for this, by least squares over runs that differ in requests, tokens and bytes."""

import asyncio
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from urllib.request import urlopen

from triptych.bench.client import Client
from triptych.bench.options import BenchOptions
from triptych.bench.run import measure
from triptych.bench.workload import picture
from triptych.errors import InstanceError
from triptych.planning.costs.fit import Fit, Sample, fit

STOP_S = 30.0
PINGS = 200
NAMES = ("request", "step", "token", "media_byte")
CLIENT_NAMES = ("request", "token", "media_byte")


@dataclass(frozen=True, slots=True)
class Load:
    """One run of the load generator."""

    requests: int
    output_tokens: int
    images: int = 0
    side: int = 224  # pixels
    concurrency: int = 2


FULL = (
    Load(300, 1),
    Load(20, 64, concurrency=1),
    Load(60, 64),
    Load(120, 64, concurrency=8),
    Load(80, 1, 1),
    Load(24, 1, 1, 1344),
    Load(16, 1, 4, 896),
)
QUICK = (
    Load(100, 1),
    Load(10, 64, concurrency=1),
    Load(60, 64, concurrency=8),
    Load(30, 1, 1),
    Load(10, 1, 1, 1344),
)


@dataclass(frozen=True, slots=True)
class ServingCosts:
    """CPU seconds of a `request`, a `step` that sampled, a `token` and a `media_byte`, of the server and of the load
    generator (to which steps are nothing)."""

    server: Fit
    client: Fit
    arrival_s: float  # of waiting: from the client to the server and back, without the work of either


def serving_costs(arguments: Sequence[str], loads: Sequence[Load], done: Callable[[str], None]) -> ServingCosts:
    """`arguments` of `triptych serve`. Raises InstanceError if the server does not start or refuses a request."""
    with server(arguments) as (url, pid):
        arrival_s = _waiting_s(url, pid)
        done("server started")
        server_samples, client_samples = [], []
        for load in loads:
            of_server, of_client = _run(url, pid, load)
            server_samples.append(of_server)
            client_samples.append(of_client)
            done("requests")
    return ServingCosts(fit(server_samples, NAMES), fit(client_samples, CLIENT_NAMES), arrival_s)


@contextmanager
def server(arguments: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Base URL and process id of `triptych serve` on a port that the system chooses."""
    command = [sys.executable, "-m", "triptych.cli", "serve", *arguments, "--port", "0", "--log-level", "warning"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            raise InstanceError(f"the server to be measured did not start: {line.strip() or 'it said nothing'}")
        yield found.group(), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_S)


def cpu_s(pid: int) -> float:
    """Of all threads of a process, without its children, to the nanosecond: its CPU clock, as Linux numbers it."""
    return time.clock_gettime((~pid << 3) | 2)


def _run(url: str, pid: int, load: Load) -> tuple[Sample, Sample]:
    options = BenchOptions(
        url=url,
        requests=load.requests,
        concurrency=load.concurrency,
        images=load.images,
        image_sizes=(f"{load.side}x{load.side}",),
        output_tokens=load.output_tokens,
        ignore_eos=True,
        seed=secrets.randbits(30),
    )
    began_s, steps_before = cpu_s(pid), _num_steps(url)
    measurement = measure(options)
    server_s, num_steps = cpu_s(pid) - began_s, _num_steps(url) - steps_before
    summary = measurement.summary
    if summary.num_failed:
        raise InstanceError(f"the server to be measured refused requests: {summary.errors}")
    media_bytes = load.images * len(picture((0, 0, 0), load.side, load.side, "jpeg"))
    num_seen = load.requests + options.warmup * min(1.0, 8 / load.output_tokens)  # by the server
    of_one = {
        "request": 1.0,
        "step": num_steps / num_seen,
        "token": float(load.output_tokens),
        "media_byte": float(media_bytes),
    }
    return Sample(of_one, server_s / num_seen), Sample(of_one, summary.cpu_s.client / load.requests)


def _num_steps(url: str) -> float:
    """Of all instances, each of which sends one message with what it sampled."""
    with urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("triptych:steps_total"))


def _waiting_s(url: str, pid: int) -> float:
    """Of a request that costs almost nothing: how long nobody works on it."""

    async def ask() -> list[float]:
        client, waits = Client(url, None, 60.0), []
        request = client.request("GET", "/v1/models")
        for _ in range(PINGS):
            await asyncio.sleep(0.001)
            before_s, began = cpu_s(pid) + time.process_time(), time.perf_counter()
            await client.send(request)
            elapsed = time.perf_counter() - began
            waits.append(max(0.0, elapsed - (cpu_s(pid) + time.process_time() - before_s)))
        client.close()
        return waits

    return median(asyncio.run(ask())[PINGS // 4 :])
