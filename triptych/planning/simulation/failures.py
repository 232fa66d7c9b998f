"""Instances that end by themselves, on simulated time."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Failure:
    """The instance with that number, in the order of the placement, ends at `at_s`. Everybody knows `found_s` later;
    `restart_s` after that it is there again, empty."""

    at_s: float
    instance: int
    found_s: float = 0.025
    restart_s: float = 2.0
