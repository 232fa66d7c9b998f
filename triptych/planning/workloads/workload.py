"""Workloads: files that say who asks for what and when, and what they become: demands on simulated time.

A workload is a mix of kinds of requests with a process of arrivals, or a trace, or the times of a trace with kinds of
its own. The same seed gives the same demands; at another rate a number of requests are the same, only faster.
"""

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Annotated, Self

import msgspec
import numpy as np
from msgspec import Meta, structs

from triptych.errors import ConfigError
from triptych.latency import Objectives
from triptych.planning.quantities import PerSecond, PositiveSeconds
from triptych.planning.workloads.arrivals import AllAtOnce, Arrivals, Floats, first_times, times_within
from triptych.planning.workloads.demand import Demand, Rows
from triptych.planning.workloads.distributions import Integers, Number, Positive, pick
from triptych.planning.workloads.kinds import Kind, requests
from triptych.planning.workloads.traces import Trace

MOST_REQUESTS = 10_000_000
NumRequests = Annotated[int, Meta(ge=1, le=MOST_REQUESTS)]


class Slo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a request must keep to count, and the share of all requests that must. None: no bound."""

    ttft: PositiveSeconds | None = None
    tpot: PositiveSeconds | None = None
    e2e: PositiveSeconds | None = None
    attainment: Annotated[float, Meta(gt=0, le=1)] = 0.9

    def __post_init__(self) -> None:
        if self.ttft is None and self.tpot is None and self.e2e is None:
            raise ValueError("nothing is bounded; at least one of ttft, tpot and e2e is needed")
        if self.ttft is not None and self.e2e is not None and self.e2e < self.ttft:
            raise ValueError(f"e2e: {self.e2e} is less than ttft, {self.ttft}; at least that is needed")

    @property
    def objectives(self) -> Objectives:
        limits = {"ttft_ms": self.ttft, "tpot_ms": self.tpot, "e2e_ms": self.e2e}
        return Objectives(**{name: None if limit is None else float(limit) * 1e3 for name, limit in limits.items()})


class Period(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of a workload that changes: one begins when the one before it ends."""

    num_requests: NumRequests | None = None
    duration: PositiveSeconds | None = None
    rate_factor: Positive = 1.0  # so many times the rate of the workload
    mix: dict[str, Number] | None = None  # weights of kinds; None: their own

    def __post_init__(self) -> None:
        if (self.num_requests is None) == (self.duration is None):
            raise ValueError("a phase lasts either num_requests or duration; one of them is needed")


class Workload(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A workload file. One of `num_requests`, `duration` and `phases` says how long it lasts; a trace needs none."""

    name: str
    arrivals: Arrivals | None = None
    kinds: dict[str, Kind] = {}
    num_requests: NumRequests | None = None
    duration: PositiveSeconds | None = None
    phases: list[Period] = []
    trace: Trace | None = None
    seed: Annotated[int, Meta(ge=0)] = 0
    slo: Slo | None = None

    def __post_init__(self) -> None:
        if self.trace is None:
            _check_made(self)
        elif self.arrivals is not None or self.phases:
            raise ValueError("trace: has its own arrivals and knows no phases; leave out arrivals and phases")
        for index, mix in enumerate([period.mix for period in self.phases] or [None] if self.kinds else []):
            _check_mix(self.kinds, mix, "kinds" if mix is None else f"phases[{index}].mix")

    @property
    def rate(self) -> float | None:
        """Requests a second where `rate_factor` is 1; None: all at once, or as a trace was recorded."""
        if self.trace is not None:
            return self.trace.rate
        return None if isinstance(self.arrivals, AllAtOnce | None) else float(self.arrivals.rate)

    def at_rate(self, rate: float, where: str | None = None) -> Self:
        """The same requests, faster or slower. `where` it was read, for messages.

        Raises ConfigError where they cannot come at this rate.
        """
        try:
            if self.trace is not None:
                return structs.replace(self, trace=structs.replace(self.trace, rate=PerSecond(rate)))
            if isinstance(self.arrivals, AllAtOnce | None):
                raise ValueError("arrivals: requests that come all at once have no rate")
            return structs.replace(self, arrivals=structs.replace(self.arrivals, rate=PerSecond(rate)))
        except ValueError as error:
            raise ConfigError(f"{where or self.name}: at {rate:g} req/s: {error}") from None

    def with_requests(self, number: int) -> Self:
        """With as many; phases say themselves how many come."""
        if self.phases:
            return self
        return structs.replace(self, num_requests=number, duration=None if self.trace is None else self.duration)

    def demands(self, rows_of: Rows, where: str | None = None) -> list[Demand]:
        """In the order of their times, at least one. `where` it was read, for messages.

        Raises ConfigError where none comes, where the model cannot take what a kind asks for, or where a trace cannot
        be read.
        """
        where = where or self.name
        if self.trace is None:
            return self._filled(*self._timed(where), rows_of, where)
        duration_s = None if self.duration is None else float(self.duration)
        recorded = self.trace.demands(rows_of, duration_s=duration_s, max_requests=self.num_requests, seed=self.seed)
        if not self.kinds:
            return recorded
        times = np.array([demand.at_s for demand in recorded])
        return self._filled(times, self._drawn(None, len(times), self._rng(1)), rows_of, where)

    def periods(self) -> list[Period]:
        return self.phases or [Period(num_requests=self.num_requests, duration=self.duration)]

    def _timed(self, where: str) -> tuple[Floats, Integers]:
        """When requests come, and the number of the kind of each."""
        when, which, begins_s = self._rng(0), self._rng(1), 0.0
        times: list[Floats] = []
        kinds: list[Integers] = []
        for period in self.periods():
            found, lasts_s = self._within(period, when, where)
            times.append(begins_s + found)
            kinds.append(self._drawn(period.mix, len(found), which))
            begins_s += lasts_s
        if not sum(map(len, times)):
            raise ConfigError(f"{where}: no request comes within {begins_s:g} s; a longer duration is needed")
        return np.concatenate(times), np.concatenate(kinds)

    def _within(self, period: Period, rng: np.random.Generator, where: str) -> tuple[Floats, float]:
        """Times since the period began, and how long it lasts."""
        assert self.arrivals is not None
        if period.duration is not None:
            return times_within(self.arrivals, rng, period.duration, period.rate_factor), float(period.duration)
        with np.errstate(all="ignore"):  # what overflows is refused
            found = first_times(self.arrivals, rng, period.num_requests or 0, period.rate_factor)
        if not np.isfinite(found).all():
            raise ConfigError(f"{where}: the requests would never come; a higher rate is needed")
        return found, float(found[-1])

    def _drawn(self, mix: dict[str, float] | None, number: int, rng: np.random.Generator) -> Integers:
        return pick(list(_weights(self.kinds, mix).values()), rng, number)

    def _filled(self, times: Floats, kinds: Integers, rows_of: Rows, where: str) -> list[Demand]:
        numbers = np.bincount(kinds, minlength=len(self.kinds)).tolist()
        contents = [
            requests(kind, number, rows_of, self.seed, index, f"{where}: kinds.{name}")
            for index, ((name, kind), number) in enumerate(zip(self.kinds.items(), numbers, strict=True))
        ]
        return [
            replace(next(contents[kind]), at_s=at_s) for at_s, kind in zip(times.tolist(), kinds.tolist(), strict=True)
        ]

    def _rng(self, stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, stream])


def _weights(kinds: Mapping[str, Kind], mix: dict[str, float] | None) -> dict[str, float]:
    return {name: kind.weight if mix is None else mix.get(name, 0.0) for name, kind in kinds.items()}


def _check_made(workload: Workload) -> None:
    if workload.arrivals is None:
        raise ValueError('arrivals: is missing; for example {"process": "poisson", "rate": "1 req/s"}')
    if not workload.kinds:
        raise ValueError("kinds: at least one kind of requests is needed, or a trace")
    ends = {"num_requests": workload.num_requests, "duration": workload.duration, "phases": workload.phases or None}
    given = [name for name, end in ends.items() if end is not None]
    if len(given) != 1:
        raise ValueError(f"{' and '.join(given) or 'no end'} given; one of {', '.join(ends)} is needed")
    seconds = sum((period.duration or 0.0) * period.rate_factor for period in workload.periods())
    if isinstance(workload.arrivals, AllAtOnce):
        if seconds:
            raise ValueError("duration: requests that come all at once have none; use num_requests")
        return
    number = seconds * workload.arrivals.rate + sum(period.num_requests or 0 for period in workload.periods())
    if number > MOST_REQUESTS:
        raise ValueError(f"{number:.0f} requests would come; at most {MOST_REQUESTS} are possible")


def _check_mix(kinds: Mapping[str, Kind], mix: dict[str, float] | None, key: str) -> None:
    for name in mix or {}:
        if name not in kinds:
            close = get_close_matches(name, kinds, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"{key}.{name}: no such kind; {hint}kinds are {', '.join(kinds)}")
    if not sum(_weights(kinds, mix).values()) > 0:
        raise ValueError(f"{key}: all weights are 0; at least one must be above 0")
