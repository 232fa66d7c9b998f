"""Encode: media units to embeddings. Batches units across requests, keeps the rows, tells prefill where they are."""

from collections import deque
from dataclasses import dataclass

from triptych.core import EncodeUnit, EncodeWork, InstanceId, Media, RequestId, UnitHash
from triptych.errors import RequestError
from triptych.memory.embedding_cache import EmbeddingShare
from triptych.memory.leases import Leases
from triptych.messages import FRONTEND, Encode, Failed, Wanted
from triptych.stages.base import Surroundings, announce, turn_away


@dataclass(slots=True)
class EncodeJob:
    """One unit of an `Encode` order, until its embedding is announced."""

    request_id: RequestId
    unit: EncodeUnit
    media: Media
    prefill: InstanceId
    aborted: bool = False


class EncodeStage:
    """FCFS over units. A unit that is in the cache is not encoded again; equal units of one batch are encoded once.

    Back-pressure: an announced embedding stays referenced by its lease, so that a reader that does not pull fills the
    cache, and the schedule stops here.
    """

    def __init__(self, near: Surroundings, embeddings: EmbeddingShare, leases: Leases) -> None:
        self._near = near
        self._embeddings = embeddings
        self._leases = leases
        self._waiting: deque[EncodeJob] = deque()
        self._running: list[EncodeJob] = []
        self._leaving = False
        self.num_computed = 0  # units

    @property
    def queues(self) -> dict[str, int]:
        return {"encode_waiting": len(self._waiting), "encode_running": len(self._running)}

    @property
    def running_requests(self) -> list[RequestId]:
        """Those with a unit in the batch that is not committed yet."""
        return [job.request_id for job in self._running]

    @property
    def queued_tokens(self) -> int:
        return sum(job.unit.num_tokens for job in self._waiting) + sum(job.unit.num_tokens for job in self._running)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be done here. What was announced counts among the leases."""
        return not self._waiting and not self._running

    def admit(self, order: Encode) -> None:
        if self._leaving:
            turn_away(self._near, order)
            return
        there = self._embeddings.max_blocks
        for unit in order.units:
            job = EncodeJob(order.request_id, unit, order.media, order.prefill)
            needed = self._embeddings.cache.num_blocks_of(unit)
            if needed > there:
                text = f"a {unit.modality} needs {needed} embedding blocks, the pool has {there}"
                self._fail(job, RequestError(text, code="request_too_large"))
            else:
                self._waiting.append(job)

    def schedule(self, budget: int) -> list[EncodeWork]:
        """The next batch, of at most `budget` embedding rows unless a single unit has more, its blocks held. Empty if
        there is nothing to do or no space. Commit it before the next."""
        assert not self._running, f"{len(self._running)} units of the last batch were not committed"
        works: list[EncodeWork] = []
        num_tokens = 0
        while self._waiting:
            job = self._waiting[0]
            if works and num_tokens + job.unit.num_tokens > budget:
                break
            if not self._can_start(job.unit):
                break
            self._waiting.popleft()
            if self._embeddings.cache.is_ready(job.unit.hash):
                self._embeddings.cache.num_hits += 1
                self._announce(job, computed=False)
                continue
            entry = self._embeddings.hold(job.unit)
            self._running.append(job)
            if not entry.writing:
                entry.writing = True
                works.append(EncodeWork(job.unit, job.media, entry.blocks))
                num_tokens += job.unit.num_tokens
        return works

    def commit(self, works: list[EncodeWork], errors: list[RequestError | None]) -> None:
        """Takes the batch's outcome, one error or None per work, and announces what was encoded."""
        outcome = {work.unit.hash: error for work, error in zip(works, errors, strict=True)}
        self.num_computed += sum(error is None for error in errors)
        running, self._running = self._running, []
        told: set[UnitHash] = set()
        for job in running:
            unit = job.unit.hash
            error = outcome[unit]
            entry = self._embeddings.cache.find(unit)
            assert entry is not None, f"unit {unit.hex()} left the cache while it was encoded"
            entry.writing = False
            if error is None:
                entry.ready = True
                self._announce(job, computed=unit not in told)
                told.add(unit)
            else:
                self._fail(job, error)
            self._embeddings.release(unit)

    def abort(self, request_id: RequestId) -> None:
        self._waiting = deque(job for job in self._waiting if job.request_id != request_id)
        for job in self._running:
            job.aborted |= job.request_id == request_id

    def lost(self, instance: InstanceId) -> None:
        """An instance is gone: nobody waits for what was ordered for it."""
        self._waiting = deque(job for job in self._waiting if job.prefill != instance)
        for job in self._running:
            job.aborted |= job.prefill == instance

    def leave(self) -> None:
        """Gives the units back that are not begun, to those who wait for them. What runs is committed as usual."""
        self._leaving = True
        units: dict[tuple[InstanceId, RequestId], list[UnitHash]] = {}
        for job in self._waiting:
            units.setdefault((job.prefill, job.request_id), []).append(job.unit.hash)
        self._waiting.clear()
        for (prefill, request_id), wanted in units.items():
            self._near.out.send(prefill, Wanted(request_id, tuple(wanted)))

    def stay(self) -> None:
        """Takes orders again."""
        self._leaving = False

    def _can_start(self, unit: EncodeUnit) -> bool:
        """Whether the unit is there, is being encoded in this batch, or can be: space, and no pull writing it."""
        entry = self._embeddings.cache.find(unit.hash)
        if entry is None or not entry.writing:
            return self._embeddings.can_hold([unit])
        return any(job.unit.hash == unit.hash for job in self._running)

    def _announce(self, job: EncodeJob, *, computed: bool) -> None:
        """Nobody is waiting any more for an aborted job."""
        if not job.aborted:
            near, reader = self._near, job.prefill
            announce(near, self._embeddings, self._leases, job.unit, job.request_id, reader, computed=computed)

    def _fail(self, job: EncodeJob, error: RequestError) -> None:
        if not job.aborted:
            failed = Failed(job.request_id, str(error), error.status, error.code, job.unit.hash)
            self._near.out.send(FRONTEND, failed)
