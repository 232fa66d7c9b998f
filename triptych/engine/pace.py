"""How fast this instance is, learned while it works, and how fast its answers are to be beside encoders."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from triptych.core import RequestId, Stage

WEIGHT = 0.1  # of the newest step in the moving average
MAX_PAUSE_S = 0.5


@dataclass(slots=True)
class _Totals:
    steps: float = 0.0
    tokens: float = 0.0
    busy_s: float = 0.0


class Pace:
    """An exponential moving average of step time over step tokens; 0 until the first step of a stage."""

    def __init__(self) -> None:
        self._seconds: dict[Stage, float] = {}
        self._totals: dict[Stage, _Totals] = {}

    def observe(self, stage: Stage, num_tokens: int, seconds: float) -> None:
        self.observe_each(stage, num_tokens, (seconds,))

    def observe_each(self, stage: Stage, num_tokens: int, steps_s: Iterable[float]) -> None:
        """Steps of so many tokens each, one after the other."""
        pace, totals = self._seconds.get(stage), self._totals.setdefault(stage, _Totals())
        for seconds in steps_s:
            new = seconds / num_tokens
            pace = new if pace is None else pace + WEIGHT * (new - pace)
            totals.steps += 1
            totals.tokens += num_tokens
            totals.busy_s += seconds
        if pace is not None:
            self._seconds[stage] = pace

    @property
    def counters(self) -> dict[str, float]:
        """Totals since the start: encode_steps, encode_tokens, encode_busy_s, ..."""
        return {
            f"{stage.name.lower()}_{what}": amount
            for stage, totals in self._totals.items()
            for what, amount in (("steps", totals.steps), ("tokens", totals.tokens), ("busy_s", totals.busy_s))
        }

    def of(self, stage: Stage) -> float:
        return self._seconds.get(stage, 0.0)


class CpuTime:
    """What the thread that calls took of the cores, by what it was for: a stage, or none."""

    def __init__(self) -> None:
        self._spent_s = dict.fromkeys([*(stage.name.lower() for stage in Stage), "other"], 0.0)
        self._since = time.thread_time()

    def lap(self, stage: Stage | None) -> None:
        """All since the last lap was for this."""
        now = time.thread_time()
        self._spent_s["other" if stage is None else stage.name.lower()] += now - self._since
        self._since = now

    @property
    def counters(self) -> dict[str, float]:
        """Totals since the start: encode_cpu_s, prefill_cpu_s (with the decodes of the same steps), decode_cpu_s,
        other_cpu_s."""
        return {f"{what}_cpu_s": seconds for what, seconds in self._spent_s.items()}


class Metronome:
    """When running sequences are to have their next tokens: every `interval_s`, or later for one that is ahead of that,
    by `MAX_PAUSE_S` at most. Times are those of any clock that only goes forward, in seconds."""

    def __init__(self, interval_s: float) -> None:
        """0: at once, always."""
        self._interval_s = interval_s
        self._due: dict[RequestId, float] = {}

    def stepped(self, running: Iterable[RequestId], now: float) -> None:
        """These get a token by the step that begins now; others are forgotten."""
        if self._interval_s:
            latest = now + MAX_PAUSE_S
            self._due = {id: min(self._due.get(id, now) + self._interval_s, latest) for id in running}

    def wait_s(self, now: float) -> float:
        """Until the first of them is due; 0 or less if one is."""
        return min(self._due.values()) - now if self._due else 0.0
