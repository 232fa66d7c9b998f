"""Simulated time: events in the order of their times, equal times in the order in which they were made."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any


@dataclass(slots=True, eq=False)
class Event:
    action: Callable[..., None] | None  # None: cancelled
    arguments: tuple[Any, ...]

    def cancel(self) -> None:
        self.action, self.arguments = None, ()


class Clock:
    """Seconds since the beginning of the simulation; only `run` moves them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._heap: list[tuple[float, int, Event]] = []
        self._order = itertools.count()

    def at(self, time_s: float, action: Callable[..., None], *arguments: Any) -> Event:
        assert time_s >= self.now, f"an event at {time_s} s, it is {self.now} s already"
        event = Event(action, arguments)
        heappush(self._heap, (time_s, next(self._order), event))
        return event

    def after(self, seconds: float, action: Callable[..., None], *arguments: Any) -> Event:
        assert seconds >= 0, f"an event {-seconds} s ago"
        event = Event(action, arguments)
        heappush(self._heap, (self.now + seconds, next(self._order), event))
        return event

    @property
    def is_quiet(self) -> bool:
        """Whether nothing else happens at this moment: what an action would do after no time it can do at its end."""
        return not self._heap or self._heap[0][0] > self.now

    def run(self, until: Callable[[], bool]) -> None:
        """Until it says so, asked after each event, or until nothing is left to happen."""
        heap = self._heap
        while heap:
            time_s, _, event = heappop(heap)
            if event.action is None:
                continue
            self.now = time_s
            self.num_events += 1
            event.action(*event.arguments)
            if until():
                return
