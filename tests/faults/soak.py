"""A long run of mixed requests with clients that leave, instances that are killed and roles that are switched.

Everything follows from a seed, and what is done is written down after every block of requests, so that a run that was
cut off goes on where it stopped.
"""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import msgspec
import psutil

from tests.faults.asking import Answer, ask, departed, difference, make_client
from tests.faults.batches import anything
from tests.flows.servers import cluster, wait_until_idle

CLIENTS = 8
RECOVERY_S = 30.0
WARM_UP_REQUESTS = 20  # of another seed: a process that never served is smaller

# What oneDNN prepares for a number of rows it keeps, for 1,024 numbers: half a GiB that fills for thousands of requests
# and would hide what grows without end.
ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}


@dataclass(frozen=True)
class Plan:
    requests: int = 2000
    block: int = 50  # requests between two looks at memory
    kill_every: int = 100
    switch_every: int = 200
    seed: int = 0
    placement: str = "2e2p2d"


class Sample(msgspec.Struct, frozen=True):
    """Memory when nothing runs, in bytes: what each process has for itself alone, the fair share of all together."""

    requests: int
    run: int  # how often the whole was started anew
    server: int
    instances: dict[str, int]  # "i0 pid" -> bytes
    together: int


class Progress(msgspec.Struct):
    done: int = 0
    runs: int = 0
    answered: int = 0
    left: int = 0
    lost: list[str] = []
    wrong: list[str] = []
    kills: list[str] = []
    switches: list[str] = []
    memory: list[Sample] = []
    seconds: float = 0.0

    @property
    def growth(self) -> dict[str, float]:
        """Of memory over the second half, by the samples of its first and its last quarter: of the server process, and
        of all processes together. Instances are killed and change their roles: none of them is compared with itself."""
        half = [each for each in self.memory if each.run == self.runs]
        half = half[len(half) // 2 :]
        quarter = max(1, len(half) // 4)
        first, last = half[:quarter], half[-quarter:]
        grown = {}
        for name in ("server", "together"):
            before = sum(getattr(each, name) for each in first) / len(first)
            grown[name] = sum(getattr(each, name) for each in last) / len(last) / before - 1
        return grown


class Soak:
    """One run of a plan against a server of its own; `right_url` is a server that nothing happens to."""

    def __init__(self, plan: Plan, url: str, right_url: str, server_pid: int, progress: Progress) -> None:
        self._plan = plan
        self._url = url
        self._right_url = right_url
        self._server = psutil.Process(server_pid)
        self._progress = progress
        self._disturbing: list[asyncio.Task[None]] = []

    async def run_block(self) -> None:
        """The next requests, `CLIENTS` at a time; then nothing runs, and everything is looked at."""
        began, first = time.monotonic(), self._progress.done
        indices = iter(range(first, min(first + self._plan.block, self._plan.requests)))
        async with make_client(self._url) as client, make_client(self._right_url) as right:
            await asyncio.gather(*(self._client(client, right, indices) for _ in range(CLIENTS)))
        await asyncio.gather(*self._disturbing)
        self._disturbing.clear()
        await asyncio.to_thread(self.wait_until_whole)
        self._progress.seconds += time.monotonic() - began
        self._progress.memory.append(self._memory())

    async def warm_up(self) -> None:
        async with make_client(self._url) as client:
            await asyncio.gather(*(ask(client, anything(-1, index)) for index in range(WARM_UP_REQUESTS)))
        await asyncio.to_thread(self.wait_until_whole)

    def wait_until_whole(self) -> None:
        deadline = time.monotonic() + RECOVERY_S
        while not all(each["state"] == "active" for each in cluster(self._url)["instances"]):
            assert time.monotonic() < deadline, f"not whole after {RECOVERY_S:g} s: {cluster(self._url)}"
            time.sleep(0.05)
        wait_until_idle(self._url, timeout_s=10)

    async def _client(self, client: httpx.AsyncClient, right: httpx.AsyncClient, indices: Iterator[int]) -> None:
        for index in indices:
            self._disturb(index)
            wanted = anything(self._plan.seed, index)
            answer, wanted_one = await ask(client, wanted), await ask(right, replace(wanted, leaves_after=None))
            self._judge(index, wanted.leaves_after is not None, answer, wanted_one)
            self._progress.done += 1

    def _judge(self, index: int, may_leave: bool, answer: Answer, right: Answer) -> None:
        progress = self._progress
        complete = answer.usage is not None
        progress.answered += complete
        progress.left += not complete and may_leave
        if found := difference(answer, right) if complete or not may_leave else departed(answer, right):
            lost = answer.wrong is not None
            (progress.lost if lost else progress.wrong).append(f"request {index}: {found}")

    def _disturb(self, index: int) -> None:
        """Half-way between two looks: what dies or changes has work."""
        plan = self._plan
        if index % plan.kill_every == plan.kill_every // 2:
            self._disturbing.append(asyncio.create_task(self._kill(index)))
        if index % plan.switch_every == plan.switch_every // 2:
            self._disturbing.append(asyncio.create_task(self._switch(index)))

    async def _kill(self, index: int) -> None:
        rng = random.Random(f"{self._plan.seed} kill {index}")
        victim = rng.choice((await asyncio.to_thread(cluster, self._url))["instances"])
        os.kill(victim["pid"], signal.SIGKILL)
        self._progress.kills.append(f"request {index}: {victim['id']} ({victim['role']})")

    async def _switch(self, index: int) -> None:
        """Of one of the instances of a role that has most to the role that has fewest."""
        instances = (await asyncio.to_thread(cluster, self._url))["instances"]
        rng = random.Random(f"{self._plan.seed} switch {index}")
        roles = {role: [each for each in instances if each["role"] == role] for role in ("e", "p", "d")}
        most = rng.choice([role for role, there in roles.items() if len(there) > 1])
        fewest = min((role for role in roles if role != most), key=lambda role: (len(roles[role]), rng.random()))
        chosen = rng.choice(roles[most])
        async with httpx.AsyncClient(base_url=self._url, timeout=120) as client:
            response = await client.post(f"/cluster/instances/{chosen['id']}/role", json={"role": fewest})
        said = f"request {index}: {chosen['id']} {most} -> {fewest}: {response.status_code} {response.text[:300]}"
        self._progress.switches.append(said)

    def _memory(self) -> Sample:
        instances, together = {}, 0
        names = {each["pid"]: each["id"] for each in cluster(self._url)["instances"]}
        for process in (self._server, *self._server.children(recursive=True)):
            used = process.memory_full_info()
            together += used.pss
            if process.pid in names:
                instances[f"{names[process.pid]} {process.pid}"] = used.uss
        own = self._server.memory_full_info().uss
        return Sample(self._progress.done, self._progress.runs, own, instances, together)


def run(plan: Plan, folder: Path, state: Path, tell: Callable[[Progress], None] = lambda progress: None) -> Progress:
    """To the end of the plan, from where `state` says that an earlier run of it stopped."""
    progress = msgspec.json.decode(state.read_bytes(), type=Progress) if state.exists() else Progress()
    progress.runs += 1
    server, other = start(folder, plan.placement), start(folder, "1epd")  # both load at the same time
    with ready(server) as url, ready(other) as right_url:
        soak = Soak(plan, url, right_url, server.pid, progress)
        asyncio.run(soak.warm_up())
        while progress.done < plan.requests:
            asyncio.run(soak.run_block())
            state.write_bytes(msgspec.json.encode(progress))
            tell(progress)
    return progress


@contextmanager
def served(folder: Path, placement: str, *more: object) -> Iterator[tuple[str, int]]:
    """The address and the process of `triptych serve`. It ends well when the block is left."""
    process = start(folder, placement, *more)
    with ready(process) as url:
        yield url, process.pid


def start(folder: Path, placement: str, *more: object) -> subprocess.Popen[str]:
    arguments = ["--placement", placement, "--port", 0, "--kv-cache-gib", 0.05, "--embedding-cache-gib", 0.02]
    arguments += ["--max-model-len", 2048, "--threads", 1, "--log-level", "warning", "--dtype", "float32", *more]
    command = [sys.executable, "-m", "triptych.cli", "serve", str(folder), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT)


@contextmanager
def ready(process: subprocess.Popen[str]) -> Iterator[str]:
    """Its address."""
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("Triptych ready on "), f"said {line!r}"
        yield line.split()[-1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, f"ended with {process.returncode}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
