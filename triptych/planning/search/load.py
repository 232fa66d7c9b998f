"""Requests at any rate: the same ones in the same order, closer together or further apart."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from triptych.planning.workloads.demand import Demand

SHORT_SHARE = 8  # a short load has so many times fewer requests,
LEAST_SHORT = 60  # but so many at least


@dataclass(frozen=True)
class Load:
    """Requests in the order of their arrival, and how many a second they are meant to be."""

    demands: Sequence[Demand]
    rate: float

    def at(self, rate: float) -> list[Demand]:
        scale = self.rate / rate
        return [replace(demand, at_s=demand.at_s * scale) for demand in self.demands]

    def apart(self, seconds: float) -> list[Demand]:
        """Each alone: so long after the one before it."""
        return [replace(demand, at_s=number * seconds) for number, demand in enumerate(self.demands)]

    @property
    def span_s(self) -> float:
        """First arrival to last."""
        return self.demands[-1].at_s - self.demands[0].at_s

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest answer."""
        return max(demand.output_tokens for demand in self.demands)

    @cached_property
    def short(self) -> "Load":
        """The first of them, for a first impression."""
        return Load(self.demands[: max(LEAST_SHORT, len(self.demands) // SHORT_SHARE)], self.rate)
