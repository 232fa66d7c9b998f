"""What the times of requests are told in, measured or simulated: percentiles, latencies, objectives."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Protocol

import msgspec


class Percentiles(msgspec.Struct, frozen=True):
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles | None":
        """None without values."""
        if not values:
            return None
        ordered = sorted(values)
        mean = math.fsum(ordered) / len(ordered)
        return cls(mean, percentile(ordered, 50), percentile(ordered, 90), percentile(ordered, 99))

    @classmethod
    def of_repeated(cls, values: Iterable[tuple[float, int]]) -> "Percentiles | None":
        """Of values that each stand there so many times."""
        ordered = sorted((value, count) for value, count in values if count)
        if not ordered:
            return None
        ends = list(accumulate(count for _, count in ordered))
        mean = math.fsum(value * count for value, count in ordered) / ends[-1]

        def at(percent: float) -> float:
            low, high, share = _between(ends[-1], percent)
            below, above = ordered[bisect_right(ends, low)][0], ordered[bisect_right(ends, high)][0]
            return below + (above - below) * share

        return cls(mean, at(50), at(90), at(99))


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of sorted values, linear between the two nearest."""
    low, high, share = _between(len(ordered), percent)
    return ordered[low] + (ordered[high] - ordered[low]) * share


def _between(number: int, percent: float) -> tuple[int, int, float]:
    """The two indices of `number` sorted values that a percentile lies between, and how far it is from the first."""
    position = (number - 1) * percent / 100
    low = math.floor(position)
    return low, min(low + 1, number - 1), position - low


class Objectives(msgspec.Struct, frozen=True):
    """Limits that a request has to keep, each or none of them, in milliseconds."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.ttft_ms, self.tpot_ms, self.e2e_ms))

    def met(self, ttft_s: float, tpot_s: float | None, e2e_s: float) -> bool:
        """By a request that succeeded. An answer of a single token has no TPOT to miss."""
        in_time = self.ttft_ms is None or ttft_s * 1e3 <= self.ttft_ms
        in_pace = self.tpot_ms is None or tpot_s is None or tpot_s * 1e3 <= self.tpot_ms
        return in_time and in_pace and (self.e2e_ms is None or e2e_s * 1e3 <= self.e2e_ms)


class Timed(Protocol):
    """A request that ended. Times in seconds, None where it failed; `itl_s` are the times between its texts."""

    @property
    def error(self) -> str | None: ...
    @property
    def ttft_s(self) -> float | None: ...
    @property
    def tpot_s(self) -> float | None: ...
    @property
    def e2e_s(self) -> float | None: ...
    @property
    def itl_s(self) -> Sequence[float]: ...


class Latencies(msgspec.Struct, frozen=True, kw_only=True):
    """Of one kind of requests, without those that failed."""

    num_requests: int
    num_failed: int
    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None
    itl_ms: Percentiles | None
    e2e_ms: Percentiles | None

    @classmethod
    def of(cls, records: Sequence[Timed]) -> "Latencies":
        good = [record for record in records if record.error is None]
        return cls(
            num_requests=len(records),
            num_failed=len(records) - len(good),
            ttft_ms=milliseconds(record.ttft_s for record in good),
            tpot_ms=milliseconds(record.tpot_s for record in good),
            itl_ms=milliseconds(gap for record in good for gap in record.itl_s),
            e2e_ms=milliseconds(record.e2e_s for record in good),
        )


def milliseconds(values: Iterable[float | None]) -> Percentiles | None:
    """Of seconds, without those that are None."""
    return Percentiles.of([value * 1e3 for value in values if value is not None])
