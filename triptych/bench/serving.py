"""What a real server does with loads that are known: its answers, and the CPU seconds that they take."""

import asyncio
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from urllib.request import ProxyHandler, build_opener

import msgspec

from triptych.bench.client import Client
from triptych.bench.options import BenchOptions
from triptych.bench.report import Record
from triptych.bench.run import measure
from triptych.errors import InstanceError

STOP_S = 30.0
SETTLE_S = 0.6  # two heartbeats: an idle instance checks its books with the first, and has told all with the second
PINGS = 200
API_KEY_VARIABLE = "TRIPTYCH_API_KEY"
_OPENER = build_opener(ProxyHandler({}))  # whatever proxies others are to use


@dataclass(frozen=True, slots=True)
class Ask:
    """One kind of request."""

    words: int
    output_tokens: int
    images: int = 0
    side: int = 224  # pixels


@dataclass(frozen=True, slots=True)
class Served:
    """What became of one load, and the CPU seconds that it took. `instances`: what the counters of each rose by, in the
    order of the placement: encode_steps, encode_tokens, encode_cpu_s, ..., other_cpu_s."""

    requests: Sequence[Record]
    instances: Sequence[Mapping[str, float]]
    server_s: float
    client_s: float


class LiveServer:
    """A `triptych serve` that runs, and its processes."""

    def __init__(self, url: str, pid: int) -> None:
        self._url = url
        self.pid = pid

    def serve(self, ask: Ask, *, rate: float, requests: int) -> Served:
        """Poisson arrivals of equal requests, so many a second. Raises InstanceError if one is refused."""
        options = BenchOptions(
            url=self._url,
            requests=requests,
            rate=rate,
            images=ask.images,
            image_sizes=(f"{ask.side}x{ask.side}",),
            text_words=ask.words,
            output_tokens=ask.output_tokens,
            ignore_eos=True,
            seed=secrets.randbits(30),
            warmup=0,
        )
        before, before_s = self._instances(), list[float]()
        measurement = measure(options, begins=lambda: before_s.append(cpu_s(self.pid)))
        server_s = cpu_s(self.pid) - before_s[0]
        if measurement.summary.num_failed:
            raise InstanceError(f"the server to be measured refused requests: {measurement.summary.errors}")
        counted = [
            {name: count - began.get(name, 0.0) for name, count in ended.items()}
            for began, ended in zip(before, self._instances(), strict=True)
        ]
        return Served(measurement.requests, counted, server_s, measurement.summary.cpu_s.client)

    def waiting_s(self) -> float:
        """Of a request that costs almost nothing: how long nobody works on it."""

        async def ask() -> list[float]:
            client, waits = Client(self._url, None, 60.0), []
            request = client.request("GET", "/v1/models")
            for _ in range(PINGS):
                await asyncio.sleep(0.001)
                before_s, began = cpu_s(self.pid) + time.process_time(), time.perf_counter()
                await client.send(request)
                elapsed = time.perf_counter() - began
                waits.append(max(0.0, elapsed - (cpu_s(self.pid) + time.process_time() - before_s)))
            client.close()
            return waits

        return median(asyncio.run(ask())[PINGS // 4 :])

    def _instances(self) -> list[dict[str, float]]:
        """The counters of each, until now."""
        time.sleep(SETTLE_S)
        with _OPENER.open(f"{self._url}/cluster") as answer:
            instances = msgspec.json.decode(answer.read())["instances"]
        silent = [instance["id"] for instance in instances if not instance["counters"]]
        if silent:
            raise InstanceError(f"instances of the server to be measured have said nothing: {', '.join(silent)}")
        return [instance["counters"] for instance in instances]


@contextmanager
def server(arguments: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Base URL and process id of `triptych serve` on a port that the system chooses. Raises InstanceError if it does
    not start."""
    command = [sys.executable, "-m", "triptych.cli", "serve", *arguments, "--port", "0", "--log-level", "warning"]
    environment = {name: value for name, value in os.environ.items() if name != API_KEY_VARIABLE}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            raise InstanceError(f"the server to be measured did not start: {line.strip() or 'it said nothing'}")
        yield found.group(), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def cpu_s(pid: int) -> float:
    """Of all threads of a process, without its children, to the nanosecond: its CPU clock, as Linux numbers it. Raises
    InstanceError if there is no such process any more."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        raise InstanceError(f"process {pid} of the server to be measured has ended") from None
