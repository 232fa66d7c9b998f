"""What is wanted: as high a rate as money is worth, or a rate for as little money as possible. Rates are those that are
kept: requests a second of which enough meet their objectives."""

import math
from dataclasses import dataclass
from typing import Protocol

SHORTFALL = 1e9  # below every score of what serves at all, or reaches the wanted rate


class Goal(Protocol):
    """Cost is per hour, in USD, or in GPUs where these have no price."""

    @property
    def most(self) -> float:
        """A rate beyond which nothing is gained."""

    def score(self, rate: float, cost: float) -> float:
        """The higher the better."""

    def needed(self, score: float, cost: float) -> float:
        """The rate with which something of that cost has that score; infinite if none is enough."""


@dataclass(frozen=True, slots=True)
class HighestRate:
    """The paper's objective (section 3.2.3), which calls such a rate goodput: rate - beta x cost."""

    beta: float = 0.0
    most: float = math.inf

    def score(self, rate: float, cost: float) -> float:
        return rate - self.beta * cost - (0.0 if rate > 0 else SHORTFALL)

    def needed(self, score: float, cost: float) -> float:
        return max(0.0, score + self.beta * cost)


@dataclass(frozen=True, slots=True)
class LeastCost:
    """At least `most` requests a second that are served well. What reaches less is the better the more it reaches."""

    most: float

    def score(self, rate: float, cost: float) -> float:
        return -cost if rate >= self.most else rate - SHORTFALL

    def needed(self, score: float, cost: float) -> float:
        if score < SHORTFALL * -0.5:
            return min(self.most, score + SHORTFALL)
        return self.most if -cost > score else math.inf
