"""Starting servers for measurements, and watching what else the machine does meanwhile."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


@contextmanager
def triptych_server(*arguments: object) -> Iterator[tuple[str, int]]:
    """Base URL and process id of `triptych serve` with these arguments, on a port that the system chooses."""
    command = [
        sys.executable,
        "-m",
        "triptych.cli",
        "serve",
        *map(str, arguments),
        "--port",
        "0",
        "--log-level",
        "warning",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            raise RuntimeError(f"the server did not start: {line!r}")
        yield found.group(), process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and everything below it."""
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    total = 0.0
    for process in family:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


class ForeignLoad:
    """How many cores were busy with something other than the given process trees, between start and `stop`."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._began = (time.perf_counter(), self._busy(), self._own())

    def stop(self) -> float:
        began, busy, own = self._began
        elapsed = time.perf_counter() - began
        return max(0.0, (self._busy() - busy) - (self._own() - own)) / elapsed

    def _busy(self) -> float:
        times = psutil.cpu_times()
        return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice

    def _own(self) -> float:
        """The servers, and this process with the clients that it has run and waited for."""
        return sum(cpu_seconds(pid) for pid in self._pids) + sum(os.times()[:4])
