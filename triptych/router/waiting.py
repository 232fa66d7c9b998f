"""Where requests wait until instances may have them: in order, bounded, fair between kinds.

Pure bookkeeping: knows predicted seconds of work and numbers of instances; the time is an argument, never a clock.
"""

import enum
import heapq
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import exp
from typing import Generic, TypeVar

from triptych.config import AdmissionConfig
from triptych.core import Stage
from triptych.router.slots import Slots

T = TypeVar("T")

MIN_SEQUENCES = 4  # that every prefill instance may have of each kind, however long they take: it batches them
AGEING = 10.0  # seconds that a request is put behind for each second of its work, where short ones go first
MEMORY_S = 30.0  # time constant of the measured speed
PRIOR_S = 5.0  # how long the number of instances counts for more than what was measured
_SLOWEST = 0.01  # of one instance's work per second: so that every wait is finite


class Kind(enum.StrEnum):
    """What is heaviest in a request, heaviest first. Each kind waits in a line of its own."""

    VIDEO = "video"
    AUDIO = "audio"
    IMAGE = "image"
    TEXT = "text"

    @classmethod
    def of(cls, modalities: Iterable[str]) -> "Kind":
        present = set(modalities)
        return next((kind for kind in cls if kind in present), cls.TEXT)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Which have to have an instance. Text needs no encoder."""
        return _OF_TEXT if self is Kind.TEXT else _OF_MEDIA


LIGHTEST_FIRST = tuple(reversed(Kind))
_OF_MEDIA = tuple(Stage)
_OF_TEXT = (Stage.PREFILL, Stage.DECODE)


@dataclass(frozen=True, slots=True)
class Work:
    """Predicted seconds of one instance of each stage."""

    encode_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def ahead_s(self) -> float:
        """Before the first token: what queues are measured by."""
        return self.encode_s + self.prefill_s

    def __add__(self, other: "Work") -> "Work":
        return Work(self.encode_s + other.encode_s, self.prefill_s + other.prefill_s, self.decode_s + other.decode_s)

    def __sub__(self, other: "Work") -> "Work":
        """Never below nothing: sums of floats come back to almost 0."""
        return Work(
            max(self.encode_s - other.encode_s, 0.0),
            max(self.prefill_s - other.prefill_s, 0.0),
            max(self.decode_s - other.decode_s, 0.0),
        )


NO_WORK = Work()


@dataclass(slots=True, eq=False)
class Waiter(Generic[T]):
    """Sequences that are sent together. `arrived_at` is when the client asked: queued again, it keeps its place.
    `goes_on`: an answer that has begun, and lost its instance. It goes before all others and needs no slot."""

    what: T
    kind: Kind
    num_sequences: int
    work: Work
    arrived_at: float
    queued_at: float
    deadline: float | None = None
    goes_on: bool = False
    is_waiting: bool = False


class WaitingRoom(Generic[T]):
    """One line per kind, each with a window: how much of it may be with the instances, without a first token yet.
    All kinds together have `slots`.

    A window is `window_s` seconds of work for every instance of a stage, or a few sequences if these are more. So no
    kind waits for another one, and what instances are given stays little. Within a line `schedule` says who is next;
    in each order there is a bound on who may pass whom, so that nobody starves.
    """

    def __init__(self, config: AdmissionConfig, slots: Slots | None = None) -> None:
        """`slots`: how many sequences may be with the instances; as many as the windows allow if left out."""
        self._config = config
        self._slots = slots
        self._lines: dict[Kind, _Line[T]] = {kind: _Line() for kind in Kind}
        self._instances: dict[Stage, int] = dict.fromkeys(Stage, 0)
        self._absent_since: dict[Stage, float] = dict.fromkeys(Stage, 0.0)
        self._missing: dict[Kind, Stage | None] = {kind: kind.stages[0] for kind in Kind}
        self.num_out = 0  # sequences with the instances
        self.returning: frozenset[Stage] = frozenset()  # served again soon: by whoever is changing its role
        self._count = itertools.count()

    def set_instances(self, instances: Mapping[Stage, int], now: float) -> None:
        """How many serve each stage from now on."""
        for line in self._lines.values():
            line.tick(now, measure=False)
        for stage in Stage:
            self._instances[stage] = instances.get(stage, 0)
            if self._instances[stage]:
                self._absent_since.pop(stage, None)
            else:
                self._absent_since.setdefault(stage, now)
        for kind in Kind:
            self._missing[kind] = next((stage for stage in kind.stages if not self._instances[stage]), None)

    def missing_stage(self, kind: Kind) -> Stage | None:
        """One that requests of this kind need and that has no instance."""
        return self._missing[kind]

    def absent_since(self, stage: Stage) -> float:
        """Of a stage that has no instance."""
        return self._absent_since[stage]

    # ---- in and out

    def add(self, waiter: Waiter[T], now: float) -> None:
        line = self._lines[waiter.kind]
        self._tick(waiter.kind, now)
        waiter.is_waiting = True
        line.num_waiting += waiter.num_sequences
        line.queued += waiter.work
        heapq.heappush(line.heap, (self._place(waiter), next(self._count), waiter))

    def remove(self, waiter: Waiter[T], now: float) -> None:
        """Of one that does not wait any more for its turn. Idempotent."""
        if waiter.is_waiting:
            self._tick(waiter.kind, now)
            self._lines[waiter.kind].remove(waiter)

    def take(self, now: float) -> Waiter[T] | None:
        """The next one that may go to the instances, None if there is none: of the kind that has least with them.
        Each of its sequences counts for the window until `release`, and has its slot until `leave`."""
        waiting = [kind for kind in LIGHTEST_FIRST if self._lines[kind].num_waiting]
        if not waiting:
            return None
        has_slot = self._has_slot
        for kind in sorted(waiting, key=lambda kind: self._lines[kind].place):
            line = self._lines[kind]
            if (has_slot or line.first.goes_on) and self._has_room(kind, line):
                self._tick(kind, now)
                waiter = line.pop()
                line.num_out += waiter.num_sequences
                self.num_out += waiter.num_sequences
                line.num_ahead += waiter.num_sequences
                line.ahead += waiter.work
                return waiter
        return None

    def leave(self, kind: Kind) -> None:
        """One sequence is not with the instances any more."""
        line = self._lines[kind]
        assert line.num_out > 0, f"more {kind} sequences left than were sent"
        line.num_out -= 1
        self.num_out -= 1

    def release(self, kind: Kind, work: Work, now: float, *, done: bool) -> None:
        """One sequence is past prefill, or was taken back before that."""
        line = self._lines[kind]
        assert line.num_ahead > 0, f"more {kind} sequences came back than were sent"
        line.num_ahead -= 1
        line.ahead = line.ahead - work if line.num_ahead else NO_WORK
        if done and line.num_waiting:
            self._tick(kind, now)
            line.done_s += work.ahead_s

    # ---- what is known about it

    def num_waiting(self, kind: Kind | None = None) -> int:
        """Sequences."""
        lines = self._lines.values() if kind is None else [self._lines[kind]]
        return sum(line.num_waiting for line in lines)

    def predicted_wait_s(self, kind: Kind, now: float) -> float:
        """Of one that came now: the work before it, at the speed at which work of its kind was done lately."""
        line = self._lines[kind]
        if not line.num_waiting:
            return 0.0
        self._tick(kind, now)
        return line.queued.ahead_s / line.rate(self._num_working(line))

    def queued(self) -> Work:
        """All that waits, of all kinds."""
        return sum((line.queued for line in self._lines.values()), NO_WORK)

    def ahead(self) -> Work:
        """All that is with the instances and not past prefill, of all kinds."""
        return sum((line.ahead for line in self._lines.values()), NO_WORK)

    def stalled(self) -> Iterator[tuple[Waiter[T], Stage, float]]:
        """All that wait for a stage that has no instance, that stage, and since when."""
        for kind, line in self._lines.items():
            missing = self.missing_stage(kind) if line.num_waiting else None
            if missing is not None:
                for waiter in line.waiting():
                    yield waiter, missing, max(waiter.queued_at, self._absent_since[missing])

    # ---- inside

    def _place(self, waiter: Waiter[T]) -> tuple[bool, float]:
        return not waiter.goes_on, self._turn(waiter)

    def _turn(self, waiter: Waiter[T]) -> float:
        match self._config.schedule:
            case "fcfs":
                return waiter.arrived_at
            case "sjf":
                return waiter.arrived_at + AGEING * waiter.work.ahead_s
            case "slo":
                wanted_ms = self._config.slo_ttft_ms
                within_s = self._config.max_queue_s if wanted_ms is None else wanted_ms / 1000
                due = waiter.arrived_at + within_s
                return min(due, due if waiter.deadline is None else waiter.deadline) - waiter.work.ahead_s

    def _has_room(self, kind: Kind, line: "_Line[T]") -> bool:
        if self.missing_stage(kind) is not None:
            return False
        if line.num_ahead < MIN_SEQUENCES * self._instances[Stage.PREFILL]:
            return True
        each_s, ahead = self._config.window_s, line.ahead
        encodes = kind is Kind.TEXT or ahead.encode_s < each_s * self._instances[Stage.ENCODE]
        return encodes and ahead.prefill_s < each_s * self._instances[Stage.PREFILL]

    @property
    def _has_slot(self) -> bool:
        if self._slots is None:
            return True
        few = MIN_SEQUENCES * self._instances[Stage.PREFILL]
        return self.num_out < self._slots.number(self._instances[Stage.DECODE], few)

    def _num_working(self, line: "_Line[T]") -> int:
        """Instances of the stage that has most to do for what waits."""
        encoders, prefills = max(self._instances[Stage.ENCODE], 1), max(self._instances[Stage.PREFILL], 1)
        return encoders if line.queued.encode_s / encoders > line.queued.prefill_s / prefills else prefills

    def _tick(self, kind: Kind, now: float) -> None:
        self._lines[kind].tick(now, measure=self.missing_stage(kind) is None)


class _Line(Generic[T]):
    """Those of one kind that wait, what of it is with the instances, and how fast these have been."""

    def __init__(self) -> None:
        self.heap: list[tuple[tuple[bool, float], int, Waiter[T]]] = []
        self.num_removed = 0  # of these: they are skipped
        self.num_waiting = 0
        self.queued = NO_WORK
        self.num_out = 0  # with the instances
        self.num_ahead = 0  # those of them that are not past prefill
        self.ahead = NO_WORK
        self.done_s = 0.0  # work that was done, while some waited, with exponential decay
        self._busy_s = 0.0  # time in which some waited, with the same decay
        self._ticked_at = 0.0

    def waiting(self) -> Iterator[Waiter[T]]:
        return (waiter for _, _, waiter in self.heap if waiter.is_waiting)

    @property
    def place(self) -> tuple[bool, int]:
        """Among the lines: one whose first goes on comes before the others, then the one that has least out."""
        return not (self.num_waiting and self.first.goes_on), self.num_out

    @property
    def first(self) -> Waiter[T]:
        """Whose turn it is, if any waits."""
        while not self.heap[0][2].is_waiting:
            heapq.heappop(self.heap)
            self.num_removed -= 1
        return self.heap[0][2]

    def pop(self) -> Waiter[T]:
        waiter = self.first
        heapq.heappop(self.heap)
        self._leave(waiter)
        return waiter

    def remove(self, waiter: Waiter[T]) -> None:
        """Without a search; those that were removed are swept out before they are more than the others."""
        self.num_removed += 1
        self._leave(waiter)
        if self.num_removed > len(self.heap) // 2:
            self.heap = [place for place in self.heap if place[2].is_waiting]
            heapq.heapify(self.heap)
            self.num_removed = 0

    def tick(self, now: float, *, measure: bool) -> None:
        """Time has passed. It counts only while some waited and every stage was there."""
        passed_s, self._ticked_at = now - self._ticked_at, now
        if measure and self.num_waiting and passed_s > 0:
            decay = exp(-passed_s / MEMORY_S)
            self._busy_s = self._busy_s * decay + passed_s
            self.done_s *= decay

    def rate(self, num_instances: int) -> float:
        """Seconds of work that are done per second. Until it is measured, that of so many instances: what is ahead now
        has to be done before it is seen."""
        prior_s = max(PRIOR_S + self.ahead.ahead_s / num_instances - self._busy_s, 0.0)
        rate = (self.done_s + num_instances * prior_s) / max(self._busy_s + prior_s, 1e-9)
        return max(rate, _SLOWEST)

    def _leave(self, waiter: Waiter[T]) -> None:
        waiter.is_waiting = False
        self.num_waiting -= waiter.num_sequences
        self.queued = self.queued - waiter.work if self.num_waiting else NO_WORK
