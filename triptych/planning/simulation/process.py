"""A process on simulated time that does one thing after the other: the server, a load generator."""

from collections import deque
from collections.abc import Callable
from typing import Any

from triptych.planning.simulation.host import Host


class Process:
    """Things to do that cost CPU time, first come, first served. What costs nothing is done at once."""

    def __init__(self, host: Host | None, weight: float = 1.0) -> None:
        """Without a host nothing costs time."""
        self.takes_time = host is not None
        self._host = host
        self._weight = weight
        self._waiting: deque[tuple[float, Callable[..., None], tuple[Any, ...]]] = deque()
        self._busy = False

    def run(self, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
        if self._host is None or (seconds == 0 and not self._busy):
            action(*arguments)
            return
        self._waiting.append((seconds, action, arguments))
        if not self._busy:
            self._next()

    def _next(self) -> None:
        self._busy = bool(self._waiting)
        if self._busy:
            assert self._host is not None
            self._host.run(self._waiting[0][0], self._weight, self._done)

    def _done(self) -> None:
        _, action, arguments = self._waiting.popleft()
        action(*arguments)
        self._next()
