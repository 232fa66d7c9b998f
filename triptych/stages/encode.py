"""Encode: media units to embeddings. Batches units across requests, keeps the rows, tells prefill where they are."""

from collections import deque
from dataclasses import dataclass

from triptych.core import EncodeUnit, EncodeWork, InstanceId, RequestId
from triptych.errors import RequestError
from triptych.memory.embedding_cache import EmbeddingShare
from triptych.memory.leases import Leases
from triptych.messages import FRONTEND, Embedded, Encode, Failed
from triptych.stages.base import Surroundings


@dataclass(slots=True)
class EncodeJob:
    """One `Encode` order, until its embedding is announced."""

    request_id: RequestId
    unit: EncodeUnit
    data: bytes
    prefill: InstanceId
    aborted: bool = False


class EncodeStage:
    """FCFS over units. A unit that is in the cache is not encoded again; equal units of one batch are encoded once.

    Back-pressure: an announced embedding stays referenced by its lease, so that a reader that does not pull fills the
    cache, and the schedule stops here.
    """

    def __init__(self, near: Surroundings, embeddings: EmbeddingShare, leases: Leases, max_encode_tokens: int) -> None:
        self._near = near
        self._embeddings = embeddings
        self._leases = leases
        self._max_encode_tokens = max_encode_tokens
        self._waiting: deque[EncodeJob] = deque()
        self._running: list[EncodeJob] = []
        self.num_computed = 0  # units
        self.num_cached = 0

    @property
    def queues(self) -> dict[str, int]:
        return {"encode_waiting": len(self._waiting), "encode_running": len(self._running)}

    @property
    def queued_tokens(self) -> int:
        return sum(job.unit.num_tokens for job in self._waiting) + sum(job.unit.num_tokens for job in self._running)

    def admit(self, order: Encode) -> None:
        job = EncodeJob(order.request_id, order.unit, order.data, order.prefill)
        needed, there = self._embeddings.cache.num_blocks_of(order.unit), self._embeddings.max_blocks
        if needed > there:
            self._fail(job, RequestError(f"media item needs {needed} embedding blocks, the pool has {there}"))
        else:
            self._waiting.append(job)

    def schedule(self) -> list[EncodeWork]:
        """The next batch, its blocks held; empty if there is nothing to do or no space. Commit it before the next."""
        assert not self._running, f"{len(self._running)} units of the last batch were not committed"
        works: list[EncodeWork] = []
        num_tokens = 0
        while self._waiting:
            job = self._waiting[0]
            if works and num_tokens + job.unit.num_tokens > self._max_encode_tokens:
                break
            if not self._can_start(job.unit):
                break
            self._waiting.popleft()
            if self._is_ready(job.unit):
                self.num_cached += 1
                self._announce(job)
                continue
            entry = self._embeddings.hold(job.unit)
            self._running.append(job)
            if not entry.writing:
                entry.writing = True
                works.append(EncodeWork(job.unit, job.data, entry.blocks))
                num_tokens += job.unit.num_tokens
        return works

    def commit(self, works: list[EncodeWork], errors: list[RequestError | None]) -> None:
        """Takes the batch's outcome, one error or None per work, and announces what was encoded."""
        outcome = {work.unit.hash: error for work, error in zip(works, errors, strict=True)}
        self.num_computed += sum(error is None for error in errors)
        running, self._running = self._running, []
        for job in running:
            error = outcome[job.unit.hash]
            entry = self._embeddings.cache.find(job.unit.hash)
            assert entry is not None, f"unit {job.unit.hash.hex()} left the cache while it was encoded"
            entry.writing = False
            if error is None:
                entry.ready = True
                self._announce(job)
            else:
                self._fail(job, error)
            self._embeddings.release(job.unit.hash)

    def abort(self, request_id: RequestId) -> None:
        self._waiting = deque(job for job in self._waiting if job.request_id != request_id)
        for job in self._running:
            job.aborted |= job.request_id == request_id

    def _is_ready(self, unit: EncodeUnit) -> bool:
        entry = self._embeddings.cache.find(unit.hash)
        return entry is not None and entry.ready

    def _can_start(self, unit: EncodeUnit) -> bool:
        """Whether the unit is there, is being encoded in this batch, or can be: space, and no pull writing it."""
        entry = self._embeddings.cache.find(unit.hash)
        if entry is None or not entry.writing:
            return self._embeddings.can_hold([unit])
        return any(job.unit.hash == unit.hash for job in self._running)

    def _announce(self, job: EncodeJob) -> None:
        """Pins the embedding under a lease and sends the ticket. Nobody is waiting any more for an aborted job."""
        if job.aborted:
            return
        entry = self._embeddings.hold(job.unit)
        unit = job.unit.hash
        lease = self._leases.grant(job.prefill, unit, lambda: self._embeddings.release(unit))
        ticket = self._near.ticket(lease, "embedding", entry.blocks, job.unit.num_tokens)
        self._near.out.send(job.prefill, Embedded(job.request_id, unit, ticket))

    def _fail(self, job: EncodeJob, error: RequestError) -> None:
        if not job.aborted:
            failed = Failed(job.request_id, str(error), error.status, error.code, job.unit.hash)
            self._near.out.send(FRONTEND, failed)
