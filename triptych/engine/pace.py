"""How fast this instance is, learned while it works: seconds per token, per stage."""

from triptych.core import Stage

WEIGHT = 0.1  # of the newest step in the moving average


class Pace:
    """An exponential moving average of step time over step tokens; 0 until the first step of a stage."""

    def __init__(self) -> None:
        self._seconds: dict[Stage, float] = {}

    def observe(self, stage: Stage, num_tokens: int, seconds: float) -> None:
        new = seconds / num_tokens
        old = self._seconds.get(stage, new)
        self._seconds[stage] = old + WEIGHT * (new - old)

    def of(self, stage: Stage) -> float:
        return self._seconds.get(stage, 0.0)
