"""How much work comes, waits and gets done, stage by stage, from what the instances report. Pure: it has no clock.

Everything is measured in work, never in requests: a video is not a thumbnail. Work is counted in tokens (embedding rows
for encode), because these do not change when an instance gets faster, and told in seconds of one instance.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import msgspec

from triptych.core import InstanceId, Role, Stage
from triptych.messages import Load
from triptych.router.pressure import Pressure
from triptych.routing import RoutingTable

MEMORY_S = 12.0  # time constant of the arrival rates: how fast a shift is believed
STEP_MEMORY_S = 60.0  # of what is known about decode steps, which only the hardware changes
LEAST_SAMPLES = 5  # before anything is said about noise
SEEN_ENOUGH = 0.3  # share of the KV blocks in use from which on they tell how many sequences would fill the pool
PACE_COUNTERS = {f"{stage.name.lower()}_{what}" for stage in Stage for what in ("steps", "tokens", "busy_s")}
BATCH_RIDGE = 0.25  # sequences^2: a spread of batch sizes below that says nothing about their cost


@dataclass(frozen=True, slots=True)
class Observation:
    """What is known at one moment. `roles` and `loads` are of the instances that take new work."""

    at_s: float
    roles: Mapping[InstanceId, Role]
    loads: Mapping[InstanceId, Load]
    queued_s: Mapping[Stage, float] = field(default_factory=dict)  # work that no instance of the stage has yet
    ttft_slack: float | None = None  # 1 - recent TTFT / SLO: negative where it is violated; None without SLO or news
    tpot_slack: float | None = None

    @classmethod
    def of(cls, at_s: float, table: RoutingTable, loads: Mapping[InstanceId, Load], pressure: Pressure) -> Self:
        """An answer is work for decode from the moment when it is asked for, and arrives once: at the frontend."""
        roles = {peer.id: peer.role for peer in table.peers.values() if not peer.leaving}
        decode_s = pressure.queued_s.get(Stage.DECODE, 0.0) + pressure.decode_ahead_s
        return cls(
            at_s,
            roles,
            {id: load for id, load in loads.items() if id in roles},
            {**pressure.queued_s, Stage.DECODE: decode_s},
            _share(pressure.ttft_slack_s, pressure.ttft_s),
            _share(pressure.tpot_slack_s, pressure.tpot_s),
        )

    def serving(self, stage: Stage) -> list[Load]:
        """What those report that serve the stage."""
        return [load for id, load in self.loads.items() if stage in self.roles[id].stages]


def _share(slack_s: float | None, mean_s: float | None) -> float | None:
    """Slack as a share of the objective, which is the sum of both."""
    if slack_s is None or mean_s is None:
        return None
    return slack_s / (slack_s + mean_s)


class StageEstimate(msgspec.Struct, frozen=True, kw_only=True):
    """Of all instances of a stage together, in seconds of work of one of them."""

    demand: float  # work that arrives per second: so many instances it keeps busy
    noise: float  # standard error of the demand
    queued_s: float  # work that no instance of the stage has yet
    held_s: float  # work that instances have, running or waiting
    slack: float | None = None  # to the SLO, as a share of it

    @property
    def backlog_s(self) -> float:
        return self.queued_s + self.held_s


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    stages: dict[Stage, StageEstimate]
    memory_pressure: float  # share of decode's KV blocks that sequences hold
    full_batch: float  # sequences that a decode instance can run together
    decode_step_s: float  # of a decode step, without what each sequence adds
    decode_sequence_s: float  # what each sequence adds
    num_samples: int

    @property
    def is_settled(self) -> bool:
        """Whether enough was seen to act on."""
        return self.num_samples >= LEAST_SAMPLES


class Estimator:
    """Feed it about once a second."""

    def __init__(self, max_num_seqs: int, *, memory_s: float = MEMORY_S) -> None:
        """`max_num_seqs`: that a decode instance runs together, memory permitting."""
        self._max_num_seqs = max_num_seqs
        self._arrivals = {stage: _Mean(memory_s) for stage in Stage}
        self._steps = _Line(STEP_MEMORY_S)
        self._counters: dict[InstanceId, dict[str, float]] = {}  # as last reported
        self._present: dict[Stage, float] | None = None  # tokens that were there at the last observation
        self._pace_s = dict.fromkeys(Stage, 0.0)
        self._at_s = 0.0
        self._num_samples = 0

    def observe(self, seen: Observation) -> Estimate:
        done, steps = self._progress(seen.loads)
        for batch, seconds, num_steps in steps:
            self._steps.add(batch, seconds, num_steps, seen.at_s)
        self._learn_paces(seen.loads)
        held = {stage: sum(_tokens(load, stage) for load in seen.serving(stage)) for stage in Stage}
        queued = {stage: _ratio(seen.queued_s.get(stage, 0.0), self._pace_s[stage]) for stage in Stage}
        present = {stage: held[stage] + queued[stage] for stage in Stage}
        elapsed = seen.at_s - self._at_s
        if self._present is not None and elapsed > 0:
            self._num_samples += 1
            for stage in Stage:
                arrived = present[stage] - self._present[stage] + done[stage]
                self._arrivals[stage].add(arrived / elapsed, elapsed)
        self._present, self._at_s = present, seen.at_s
        return self._estimate(seen, held, queued)

    def _estimate(self, seen: Observation, held: dict[Stage, float], queued: dict[Stage, float]) -> Estimate:
        pressure, full_batch = self._memory(seen)
        step_s, sequence_s = self._steps.line()
        token_s = {**self._pace_s, Stage.DECODE: sequence_s + _ratio(step_s, full_batch)}
        slack = {Stage.ENCODE: seen.ttft_slack, Stage.PREFILL: seen.ttft_slack, Stage.DECODE: seen.tpot_slack}
        return Estimate(
            stages={
                stage: StageEstimate(
                    demand=max(0.0, self._arrivals[stage].mean) * token_s[stage],
                    noise=self._arrivals[stage].standard_error * token_s[stage],
                    queued_s=queued[stage] * token_s[stage],
                    held_s=held[stage] * token_s[stage],
                    slack=slack[stage],
                )
                for stage in Stage
            },
            memory_pressure=pressure,
            full_batch=full_batch,
            decode_step_s=step_s,
            decode_sequence_s=sequence_s,
            num_samples=self._num_samples,
        )

    def _progress(
        self, loads: Mapping[InstanceId, Load]
    ) -> tuple[dict[Stage, float], list[tuple[float, float, float]]]:
        """Tokens that were done since the last observation, and decode steps: batch, seconds, how many."""
        done = dict.fromkeys(Stage, 0.0)
        steps: list[tuple[float, float, float]] = []
        for id, load in loads.items():
            before = self._counters.get(id, {})
            counters = {name: value for name, value in load.counters.items() if name in PACE_COUNTERS}
            if any(value < before.get(name, 0.0) for name, value in counters.items()):
                before = {}  # a new process; a switch of roles keeps these counters, and no others
            new = {name: value - before.get(name, 0.0) for name, value in counters.items()}
            for stage in Stage:
                done[stage] += new.get(f"{stage.name.lower()}_tokens", 0.0)
            num_steps = new.get("decode_steps", 0.0)
            if num_steps > 0:
                steps.append((new["decode_tokens"] / num_steps, new["decode_busy_s"] / num_steps, num_steps))
            self._counters[id] = counters
        return done, steps

    def _learn_paces(self, loads: Mapping[InstanceId, Load]) -> None:
        for stage in Stage:
            paces = [load.pace_s[stage] for load in loads.values() if load.pace_s.get(stage)]
            if paces:
                self._pace_s[stage] = sum(paces) / len(paces)

    def _memory(self, seen: Observation) -> tuple[float, float]:
        """How full decode's pools are, and how many sequences fill one."""
        decoding = [load for load in seen.serving(Stage.DECODE) if "kv" in load.pools]
        pools = [(load.pools["kv"], load.queues.get("decode_running", 0)) for load in decoding]
        used = sum(pool.used for pool, _ in pools)
        total = sum(pool.total for pool, _ in pools)
        running = sum(count for _, count in pools)
        pressure = _ratio(used, total)
        if pressure < SEEN_ENOUGH or not running:
            return pressure, float(self._max_num_seqs)
        return pressure, min(float(self._max_num_seqs), total / len(pools) * running / used)


class _Mean:
    """An exponentially weighted mean, unbiased from the first sample on, and its standard error."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._weight = self._squared_weight = self._sum = self._squares = 0.0

    def add(self, value: float, seconds: float) -> None:
        keep = math.exp(-seconds / self._memory_s)
        self._weight = self._weight * keep + 1.0
        self._squared_weight = self._squared_weight * keep**2 + 1.0
        self._sum = self._sum * keep + value
        self._squares = self._squares * keep + value**2

    @property
    def mean(self) -> float:
        return _ratio(self._sum, self._weight)

    @property
    def standard_error(self) -> float:
        if not self._weight:
            return 0.0
        variance = max(0.0, self._squares / self._weight - self.mean**2)
        return math.sqrt(variance * self._squared_weight) / self._weight


class _Line:
    """Least squares with forgetting: seconds of a decode step over its batch. Both coefficients are at least 0; where
    all batches are alike, nothing is known about the slope, and it is 0."""

    def __init__(self, memory_s: float) -> None:
        self._memory_s = memory_s
        self._at_s = 0.0
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float, weight: float, at_s: float) -> None:
        keep = math.exp(-(at_s - self._at_s) / self._memory_s)
        self._at_s = at_s
        self._weight = self._weight * keep + weight
        self._x = self._x * keep + weight * x
        self._y = self._y * keep + weight * y
        self._xx = self._xx * keep + weight * x * x
        self._xy = self._xy * keep + weight * x * y

    def line(self) -> tuple[float, float]:
        """Value at 0, and slope."""
        if not self._weight:
            return 0.0, 0.0
        x, y = self._x / self._weight, self._y / self._weight
        spread = max(0.0, self._xx / self._weight - x * x)
        slope = max(0.0, (self._xy / self._weight - x * y) / (spread + BATCH_RIDGE))
        slope = min(slope, _ratio(y, x))
        return max(0.0, y - slope * x), slope


def _tokens(load: Load, stage: Stage) -> float:
    return _ratio(load.work_s.get(stage, 0.0), load.pace_s.get(stage, 0.0))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
