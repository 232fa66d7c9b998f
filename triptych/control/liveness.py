"""Tells who hangs, from what instances say about themselves and about each other. Pure: time is a count of ticks.

The owner calls `tick` every `TICK_S`. On a machine so busy that the owner is late, ticks are late as well: so nobody is
accused because everybody is slow.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from triptych.core import InstanceId

TICK_S = 0.25
SILENT_TICKS = 6  # without `Alive`: 1.5 s
LOADING_SILENT_TICKS = 60  # 15 s: while a library starts a device, no other thread of the process may run
STUCK_S = 120.0  # of one turn of an engine: no step takes that long
STRIKE_TICKS = 120  # 30 s, after which a complaint counts no more
STRIKES = 2  # complaints in which somebody is named before somebody is accused


@dataclass(slots=True)
class _Strike:
    """A complaint in which somebody was named."""

    tick: int
    other: InstanceId  # who was named with it
    is_settled: bool = False  # that one is gone, and took the blame


@dataclass(slots=True)
class _Watched:
    most_silent_ticks: int
    num_silent_ticks: int = 0
    turning_s: float = 0.0
    strikes: deque[_Strike] = field(default_factory=deque)


class Liveness:
    """Watches the instances that it was given. Whoever is accused should be forgotten, and watched again when a new
    incarnation serves: nothing that was known about the old one counts against it."""

    def __init__(self) -> None:
        self._watched: dict[InstanceId, _Watched] = {}
        self._tick = 0

    def watch(self, instance: InstanceId, *, loads: bool = False) -> None:
        """`loads`: it does not serve yet, and may be silent for longer."""
        self._watched[instance] = _Watched(LOADING_SILENT_TICKS if loads else SILENT_TICKS)

    def forget(self, instance: InstanceId) -> None:
        """It is gone. Complaints about it and somebody else count against that one no more, unless there is one about
        the two again: who cannot reach one incarnation after the other may be the broken one."""
        self._watched.pop(instance, None)
        for watched in self._watched.values():
            for strike in watched.strikes:
                strike.is_settled |= strike.other == instance

    def is_watched(self, instance: InstanceId) -> bool:
        return instance in self._watched

    def alive(self, instance: InstanceId, turning_s: float) -> None:
        watched = self._watched.get(instance)
        if watched is not None:
            watched.num_silent_ticks = 0
            watched.turning_s = turning_s

    def tick(self, may_take_long: Collection[InstanceId] = ()) -> dict[InstanceId, str]:
        """Who hangs, and how it shows. `may_take_long`: whose turns have no bound, because they load weights."""
        self._tick += 1
        accused: dict[InstanceId, str] = {}
        for instance, watched in self._watched.items():
            watched.num_silent_ticks += 1
            if watched.num_silent_ticks >= watched.most_silent_ticks:
                accused[instance] = f"no sign of life for {watched.num_silent_ticks * TICK_S:g} s"
            elif watched.turning_s > STUCK_S and instance not in may_take_long:
                accused[instance] = f"its engine has been in one step for {watched.turning_s:.0f} s"
        return accused

    def unreachable(self, reader: InstanceId, holder: InstanceId) -> InstanceId | None:
        """A complaint: a pull by `reader` from `holder` failed. It names both, since either may be the broken one.

        Returns whom to blame, once one of them has been named twice: the one that was named more often, and of two
        that were named equally often the holder.
        """
        named = ((holder, reader), (reader, holder))
        counts = {instance: self._strike(instance, other) for instance, other in named if instance in self._watched}
        if not counts or max(counts.values()) < STRIKES:
            return None
        return max(counts, key=lambda instance: counts[instance])  # of equals the first, which is the holder

    def _strike(self, instance: InstanceId, other: InstanceId) -> int:
        """How many count against it now."""
        strikes = self._watched[instance].strikes
        strikes.append(_Strike(self._tick, other))
        while strikes[0].tick <= self._tick - STRIKE_TICKS:
            strikes.popleft()
        return sum(not strike.is_settled or strike.other == other for strike in strikes)
