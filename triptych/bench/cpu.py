"""CPU time of processes and of the machine, from /proc: was anybody else working while we measured?"""

import os
import time
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")


def tree_cpu_s(root: int) -> float | None:
    """User and system seconds of a process and all its descendants; None where there is no /proc or no process."""
    children: dict[int, list[int]] = {}
    seconds: dict[int, float] = {}
    for entry in _PROC.glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        pid = int(entry.name)
        children.setdefault(int(fields[1]), []).append(pid)
        seconds[pid] = sum(map(int, fields[11:15])) / _TICKS_PER_S  # its own, and that of children it waited for
    if root not in seconds:
        return None
    tree = [root]
    for pid in tree:
        tree += children.get(pid, [])
    return sum(seconds[pid] for pid in tree)


def machine_cpu_s() -> float | None:
    """Seconds that all cores together were busy since the machine started."""
    try:
        ticks = [int(field) for field in (_PROC / "stat").read_text().partition("\n")[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _waiting, irq, soft_irq, steal = ticks
    return (user + nice + system + irq + soft_irq + steal) / _TICKS_PER_S


class CpuMeter:
    """CPU time since it was made: of this process, of the server's tree, and of everybody else."""

    def __init__(self, server_pid: int | None) -> None:
        self._server_pid = server_pid
        self._start = self._now()

    def read(self) -> tuple[float, float | None, float | None]:
        """(client, server, others) in seconds; None for what is not known."""
        client, server, machine = (
            None if later is None or earlier is None else later - earlier
            for later, earlier in zip(self._now(), self._start, strict=True)
        )
        assert client is not None
        others = None if machine is None or server is None else max(0.0, machine - server - client)
        return client, server, others

    def _now(self) -> tuple[float | None, ...]:
        server = None if self._server_pid is None else tree_cpu_s(self._server_pid)
        return time.process_time(), server, machine_cpu_s()
