"""Instances that end by themselves, on simulated time."""

from dataclasses import dataclass

from triptych.core import InstanceId


@dataclass(frozen=True, slots=True)
class Failure:
    """The instance with that number, in the order of the placement, ends at `at_s`. Everybody knows `found_s` later;
    `restart_s` after that it is there again, empty."""

    at_s: float
    instance: int
    found_s: float = 0.025
    restart_s: float = 2.0

    @property
    def id(self) -> InstanceId:
        return InstanceId(f"i{self.instance}")
