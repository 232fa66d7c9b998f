"""What happened to the cluster, for whoever operates it: losses, restarts, switches, decisions."""

import time
from collections import deque
from collections.abc import Iterator
from itertools import chain

import msgspec

from triptych.core import InstanceId

KEPT = 50  # of each sort: what happens every second pushes nothing out that happens once a week


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """`what` is one word of: started, lost, restarted, stopped, switched, switch_failed, or a decision's own."""

    what: str
    instance: InstanceId | None = None
    text: str = ""
    numbers: dict[str, float] = {}
    at: float = msgspec.field(default_factory=time.time)  # seconds since 1970


class EventLog:
    """The newest events of each sort, in the order in which they happened."""

    def __init__(self) -> None:
        self._num_added = 0
        self._sorts: dict[str, deque[tuple[int, Event]]] = {}

    def add(self, event: Event) -> None:
        self._num_added += 1
        self._sorts.setdefault(event.what, deque(maxlen=KEPT)).append((self._num_added, event))

    def __iter__(self) -> Iterator[Event]:
        return (event for _, event in sorted(chain.from_iterable(self._sorts.values()), key=lambda entry: entry[0]))
