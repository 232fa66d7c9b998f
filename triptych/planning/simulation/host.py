"""Processes that share the cores of one machine, on simulated time: generalised processor sharing.

At every moment the cores are divided among the jobs in proportion to their weights, and what a job cannot use, because
it has fewer threads than its share, goes to the others. It is what a fair scheduler does, with slices infinitely thin.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from triptych.planning.simulation.clock import Clock, Event

NICE_STEP = 1.25  # one step of niceness is worth so many times less, as Linux weighs it
ROUNDING_S = 1e-12  # of work: less than that is none


@dataclass(slots=True, eq=False)
class Job:
    """Work of one process. Its numbers are those of the last change on its host."""

    left_s: float  # of one core, if it were alone
    weight: float
    threads: float
    crowding: float
    done: Callable[..., None]
    arguments: tuple[Any, ...]
    cores: float = 0.0  # that it has now
    others: float = 0.0  # cores that work beside it now and slow it down
    speed: float = 0.0  # seconds of work a second
    crowded_s: float = 0.0  # of a core, that it took more than alone


def weight_of(niceness: int) -> float:
    return float(NICE_STEP**-niceness)


class Host:
    """`run` a job, and its callback is called when it has had so many seconds of a core."""

    def __init__(self, clock: Clock, cores: float) -> None:
        """`cores` may be infinite: then nobody waits for anybody."""
        assert cores > 0, f"{cores} cores"
        self._clock = clock
        self._cores = cores
        self._jobs: dict[Job, None] = {}
        self._changed_at = clock.now
        self._next: Event | None = None
        self.busy_s = 0.0  # of all cores together, up to the last change

    def run(
        self,
        seconds: float,
        weight: float,
        done: Callable[..., None],
        *arguments: Any,
        threads: float = 1.0,
        crowding: float = 0.0,
    ) -> Job:
        """`seconds` of a core; with `threads` of them it takes that much less time, if it gets so many. For each other
        core that works it takes `crowding` more, as a share of that, for they share caches and the way to memory: of as
        many others as it has threads, as that is what profiles measure."""
        assert seconds >= 0 and weight > 0 and threads > 0, f"{seconds} s, weight {weight}, {threads} threads"
        assert crowding >= 0, f"crowding {crowding}"
        job = Job(seconds, weight, threads, crowding, done, arguments)
        self._advance()
        self._jobs[job] = None
        self._share()
        return job

    def cancel(self, job: Job) -> None:
        """Its process has ended: it gets no more, and its callback is not called. Idempotent."""
        if job in self._jobs:
            self._advance()
            del self._jobs[job]
            self._share()

    @property
    def num_running(self) -> int:
        return len(self._jobs)

    def _advance(self) -> None:
        elapsed = self._clock.now - self._changed_at
        self._changed_at = self._clock.now
        for job in self._jobs:
            had = min(job.left_s, job.speed * elapsed)
            job.left_s -= had
            job.crowded_s += job.crowding * job.others * had
            self.busy_s += had * job.cores / job.speed

    def _share(self) -> None:
        """Divides the cores anew, and asks to be woken when the first job is done."""
        self._divide()
        if self._next is not None:
            self._next.cancel()
        waits = [job.left_s / job.speed for job in self._jobs]
        self._next = self._clock.after(min(waits), self._finish) if waits else None

    def _divide(self) -> None:
        """Water-filling: those with fewer threads than their share first, the others share what is left."""
        cores, weight = self._cores, sum(job.weight for job in self._jobs)
        for job in sorted(self._jobs, key=lambda job: job.threads / job.weight):
            job.cores = min(job.threads, cores * job.weight / weight)
            cores -= job.cores
            weight -= job.weight
        at_work = sum(job.cores for job in self._jobs)
        for job in self._jobs:  # while it has cores, it has as many as it has threads
            job.others = max(0.0, min(job.threads, at_work - job.threads))
            job.speed = job.cores / (1.0 + job.crowding * job.others)

    def _finish(self) -> None:
        """All that are done now leave before the first callback, which may bring new ones."""
        self._next = None
        self._advance()
        soonest = min(job.left_s / job.speed for job in self._jobs)
        done = [job for job in self._jobs if job.left_s <= ROUNDING_S or job.left_s / job.speed <= soonest]
        for job in done:
            del self._jobs[job]
            self.busy_s += job.left_s
        self._share()
        for job in done:
            job.done(*job.arguments)
