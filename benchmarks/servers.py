"""Starting servers for measurements, and watching what else the machine does meanwhile."""

import os
import re
import threading
import time
from contextlib import AbstractContextManager
from typing import Any

import httpx
import psutil

from triptych.bench.serving import server

TICK_S = 0.2


def triptych_server(*arguments: object) -> AbstractContextManager[tuple[str, int]]:
    """Base URL and process id of `triptych serve` with these arguments, on a port that the system chooses."""
    return server([str(argument) for argument in arguments])


def instances(url: str) -> list[dict[str, Any]]:
    """Of a Triptych server: id, pid and role of each."""
    return list(httpx.get(f"{url}/cluster").raise_for_status().json()["instances"])


def pin_roles(url: str, cores: dict[str, list[int]]) -> None:
    """Each instance of a role onto its core: the first onto the first of the list, and so on, round again."""
    for role, wanted in cores.items():
        of_role = [instance for instance in instances(url) if instance["role"] == role]
        for index, instance in enumerate(of_role):
            pin(instance["pid"], {wanted[index % len(wanted)]})


def pin(pid: int, cores: set[int]) -> None:
    """All threads of a process; those that it starts later inherit it."""
    for thread in psutil.Process(pid).threads():
        os.sched_setaffinity(thread.id, cores)


def counters(url: str, name: str) -> dict[str, float]:
    """Totals of a counter of a Triptych server over all instances, by its label `source`, or by the end of its name."""
    totals: dict[str, float] = {}
    for line in httpx.get(f"{url}/metrics").raise_for_status().text.splitlines():
        found = re.fullmatch(rf"{re.escape(name)}(?:_(\w+?))?_total(?:{{(.*)}})? (\S+)", line)
        if found is not None:
            source = re.search(r'source="([^"]*)"', found[2] or "")
            key = source[1] if source else found[1] or ""
            totals[key] = totals.get(key, 0.0) + float(found[3])
    return totals


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


def wait_until_idle(pids: list[int], limit_s: float = 30.0) -> None:
    """Until the servers have stopped spinning: vLLM's keep a core busy for a second after their last request."""
    deadline = time.perf_counter() + limit_s
    while time.perf_counter() < deadline:
        before = _total(pids)
        time.sleep(0.5)
        if _total(pids) - before < 0.1:
            return
    raise RuntimeError(f"servers that should idle are busy for {limit_s:g} s")


class CoreWatch:
    """Cores busy between start and `stop`: of the server that is measured, of others that should idle, of strangers.

    `paused_s` is the longest time for which nothing ran at all, as on a virtual machine that its host has stopped.
    """

    def __init__(self, pids: list[int], idle_pids: list[int]) -> None:
        self._pids, self._idle_pids = pids, idle_pids
        self._foreign = ForeignLoad([*pids, *idle_pids])
        self._began = (time.perf_counter(), _total(pids), _total(idle_pids))
        self._longest_tick_s = 0.0
        self._stopping = threading.Event()
        self._ticking = threading.Thread(target=self._tick, daemon=True)
        self._ticking.start()

    def stop(self) -> dict[str, float]:
        self._stopping.set()
        self._ticking.join()
        foreign = self._foreign.stop()
        at, server, idle = self._began
        elapsed = time.perf_counter() - at
        return {
            "server_cores": (_total(self._pids) - server) / elapsed,
            "idle_servers_cores": (_total(self._idle_pids) - idle) / elapsed,
            "foreign_cores": foreign,
            "paused_s": max(0.0, self._longest_tick_s - TICK_S),
        }

    def _tick(self) -> None:
        last = time.perf_counter()
        while not self._stopping.wait(TICK_S):
            now = time.perf_counter()
            self._longest_tick_s = max(self._longest_tick_s, now - last)
            last = now


def _total(pids: list[int]) -> float:
    return sum(map(cpu_seconds, pids))
