"""How fast this instance is, learned while it works, and how fast its answers are to be beside encoders."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from triptych.core import RequestId, Stage

WEIGHT = 0.1  # of the newest step in the moving averages
MAX_PAUSE_S = 0.5
_COUNTED = {stage: [f"{stage.name.lower()}_{what}" for what in ("steps", "tokens", "busy_s")] for stage in Stage}


@dataclass(slots=True)
class _Steps:
    """Of one stage: exponential moving averages of a step, and totals since the start."""

    usual_s: float
    usual_tokens: float
    number: int = 0
    tokens: int = 0
    busy_s: float = 0.0


class Pace:
    """Seconds of a token: those of the usual step over its tokens, so that a small step, which is dear, counts for
    little; 0 until the first step of a stage."""

    def __init__(self) -> None:
        self._steps: dict[Stage, _Steps] = {}

    def observe(self, stage: Stage, num_tokens: int, seconds: float) -> None:
        self.observe_row(stage, num_tokens, 1, seconds, 0.0)

    def observe_row(self, stage: Stage, num_tokens: int, num_steps: int, first_s: float, more_s: float) -> None:
        """Steps of so many tokens each, one after the other, each of which takes `more_s` longer than the one before.
        The averages are those of `num_steps` single observations, as geometric series."""
        steps = self._steps.get(stage)
        if steps is None:
            steps = self._steps[stage] = _Steps(first_s, num_tokens)
        kept = (1.0 - WEIGHT) ** num_steps
        steps.usual_s = kept * steps.usual_s + (1.0 - kept) * first_s + more_s * (num_steps - (1.0 - kept) / WEIGHT)
        steps.usual_tokens = kept * steps.usual_tokens + (1.0 - kept) * num_tokens
        steps.number += num_steps
        steps.tokens += num_steps * num_tokens
        steps.busy_s += num_steps * (first_s + 0.5 * (num_steps - 1) * more_s)

    @property
    def counters(self) -> dict[str, float]:
        """Totals since the start: encode_steps, encode_tokens, encode_busy_s, ..."""
        totals: dict[str, float] = {}
        for stage, steps in self._steps.items():
            number, tokens, busy_s = _COUNTED[stage]
            totals[number], totals[tokens], totals[busy_s] = steps.number, steps.tokens, steps.busy_s
        return totals

    def of(self, stage: Stage) -> float:
        steps = self._steps.get(stage)
        return 0.0 if steps is None else steps.usual_s / steps.usual_tokens


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
