"""How fast this instance is, learned while it works, and how fast its answers are to be beside encoders."""

from collections.abc import Iterable

from triptych.core import RequestId, Stage

WEIGHT = 0.1  # of the newest step in the moving average
MAX_PAUSE_S = 0.5
_COUNTERS = {stage: tuple(f"{stage.name.lower()}_{what}" for what in ("steps", "tokens", "busy_s")) for stage in Stage}


class Pace:
    """An exponential moving average of step time over step tokens; 0 until the first step of a stage."""

    def __init__(self) -> None:
        self._seconds: dict[Stage, float] = {}
        self.counters: dict[str, float] = {}  # totals since the start: encode_steps, encode_tokens, encode_busy_s, ...

    def observe(self, stage: Stage, num_tokens: int, seconds: float) -> None:
        new = seconds / num_tokens
        old = self._seconds.get(stage, new)
        self._seconds[stage] = old + WEIGHT * (new - old)
        for name, amount in zip(_COUNTERS[stage], (1.0, float(num_tokens), seconds), strict=True):
            self.counters[name] = self.counters.get(name, 0.0) + amount

    def of(self, stage: Stage) -> float:
        return self._seconds.get(stage, 0.0)


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
