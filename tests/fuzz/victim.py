"""The server that is tormented: how it is started, how it is doing, and whether it still answers as it did at first."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.flows.servers import cluster, wait_until_idle
from tests.fuzz.bodies import MODEL, media_part
from tests.fuzz.files import whole_files
from tests.fuzz.size import randomness

# Of any process since its first good answers. What allocators keep of the largest request of each thread, and libraries
# of each new length of a prompt, levels off far below: a leak in 10,000 requests does not.
MAX_GROWTH_BYTES = 320 << 20
MB = 1 << 20


@dataclass
class Health:
    """Of one process."""

    memory_bytes: int  # that nobody shares with it
    num_files: int
    num_threads: int


@dataclass
class Victim:
    """A server, its processes, and its answers from the time when nobody had done it any harm."""

    url: str
    server: psutil.Process
    log: Path
    good: list[dict[str, Any]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    before: dict[int, Health] = field(default_factory=dict)
    statuses: dict[int, int] = field(default_factory=dict)
    slowest: tuple[float, str] = (0.0, "")

    def settle(self) -> None:
        """What is done once per kind of work is done now, and does not count as growth."""
        rng = randomness("good", 0)
        parts = [[media_part(kind, file, rng)] for kind in ("image", "video", "audio") for file in _first_of(kind)]
        self.good = [_question([{"type": "text", "text": "What is it?"}, *more]) for more in [[], *parts]]
        self.answers = [self.ask(question) for question in self.good]
        for _ in range(3):
            self.check_answers()
        wait_until_idle(self.url, timeout_s=10)
        self.before = self.health()

    def ask(self, question: dict[str, Any]) -> str:
        response = httpx.post(f"{self.url}/v1/chat/completions", json=question, timeout=60)
        assert response.status_code == 200, f"a good request got {response.status_code}: {response.text}"
        return str(response.json()["choices"][0]["message"]["content"])

    def check_answers(self) -> None:
        """The same ones as in the beginning."""
        for question, answer in zip(self.good, self.answers, strict=True):
            assert self.ask(question) == answer

    def health(self) -> dict[int, Health]:
        pids = [self.server.pid, *(instance["pid"] for instance in cluster(self.url)["instances"])]
        found = {}
        for pid in pids:
            process = psutil.Process(pid)
            memory = process.memory_full_info().uss
            found[pid] = Health(memory, process.num_fds(), process.num_threads())
        return found

    def check_unharmed(self) -> None:
        """The processes of the beginning, idle, as large as they were, with no more open files, nothing in the log."""
        self.check_answers()
        wait_until_idle(self.url, timeout_s=10)
        deadline = time.monotonic() + 10
        while (leaks := self._leaks()) and time.monotonic() < deadline:  # connections take a moment to end
            time.sleep(0.1)
        assert not leaks, "\n".join(leaks)
        told = self.log.read_text(errors="replace")
        self.log.write_bytes(b"")
        place = told.find("Traceback")
        assert place < 0, f"{told.count('Traceback')} tracebacks, the first: {told[max(0, place - 500) :][:8000]}"

    def note(self, status: int, seconds: float, what: str) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self.slowest = max(self.slowest, (seconds, what))

    def report(self) -> str:
        after = self.health()
        lines = [
            f"statuses {dict(sorted(self.statuses.items()))}",
            f"slowest {self.slowest[0]:.2f} s: {self.slowest[1]}",
        ]
        for pid, was in self.before.items():
            now = after[pid]
            lines.append(
                f"process {pid}: {was.memory_bytes / MB:.0f} -> {now.memory_bytes / MB:.0f} MiB, "
                f"{was.num_files} -> {now.num_files} files, {was.num_threads} -> {now.num_threads} threads"
            )
        return "\n".join(lines)

    def _leaks(self) -> list[str]:
        after = self.health()
        if after.keys() != self.before.keys():
            return [f"processes {sorted(self.before)} became {sorted(after)}"]
        leaks = []
        for pid, was in self.before.items():
            now = after[pid]
            if now.num_files > was.num_files + 2:
                leaks.append(f"{pid}: {was.num_files} open files became {now.num_files}: {_files(pid)}")
            if now.memory_bytes > was.memory_bytes + MAX_GROWTH_BYTES:
                leaks.append(f"{pid}: {was.memory_bytes // MB} MiB became {now.memory_bytes // MB}")
        return leaks


@contextmanager
def victim(folder: Path, placement: str, log: Path) -> Iterator[Victim]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.served", str(folder), placement],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
        )
    assert process.stdin is not None and process.stdout is not None
    try:
        url = process.stdout.readline().decode().strip()
        assert url, log.read_text()
        one = Victim(url, psutil.Process(process.pid), log)
        one.settle()
        yield one
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def _first_of(kind: str) -> Iterator[bytes]:
    yield next(iter(whole_files(kind).values()))


def _question(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": 6,
        "temperature": 0,
        "ignore_eos": True,
    }


def _files(pid: int) -> list[str]:
    return sorted(os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))[:80]
