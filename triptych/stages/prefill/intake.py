"""How the embeddings that requests need come here: tickets, pulls, and what has to be asked for."""

from collections.abc import Iterable

from triptych.core import InstanceId, RequestId, Status, UnitHash
from triptych.memory.embedding_cache import EmbeddingShare
from triptych.messages import FRONTEND, Embedded, Share, Wanted
from triptych.stages.base import Pull, Surroundings
from triptych.stages.prefill.jobs import Jobs, PrefillJob


class Intake:
    """A started request holds space for every unit that it needs. One of its tickets is used to pull what is neither
    here nor coming; what nobody is about to announce is asked for.

    `pulling`: what is being written here. `early`: what came before its request was submitted.
    """

    def __init__(self, near: Surroundings, embeddings: EmbeddingShare, jobs: Jobs) -> None:
        self.pulling: dict[UnitHash, Embedded] = {}
        self.early: dict[RequestId, list[Embedded | Wanted]] = {}
        self._near = near
        self._embeddings = embeddings
        self._jobs = jobs
        self._gone = near.gone_from_prefill

    # ---- what is heard of units

    def take(self, message: Embedded | Wanted) -> None:
        """Kept for a request that is not submitted yet: messages of two senders may overtake each other; `forget_early`
        forgets it."""
        request_id = message.request_id
        job = self._jobs.find(request_id)
        if job is None and not (self._jobs.is_leaving or request_id in self._gone):
            self.early.setdefault(request_id, []).append(message)
        elif job is None:
            self._gone.add(request_id)  # a request that would wait for this must not be taken in any more
            if isinstance(message, Embedded):
                self._near.out.release(message.ticket)
        elif isinstance(message, Embedded):
            self._announced(job, message)
        else:
            self._withdrawn(job, message.units)

    def take_early(self, request_id: RequestId) -> None:
        """What came for a request that is submitted now."""
        for message in self.early.pop(request_id, []):
            self.take(message)

    def forget_early(self, request_id: RequestId) -> None:
        """What comes for it from now on is given back."""
        self._gone.add(request_id)
        for message in self.early.pop(request_id, []):
            if isinstance(message, Embedded):
                self._near.out.release(message.ticket)

    def pulled(self, unit: UnitHash, error: Exception | None) -> list[PrefillJob]:
        """A pull settled. After an error another request's ticket for the same unit is tried; if there is none, the
        requests that had theirs cannot go on, and are returned. The others go on waiting for theirs."""
        entry = self._embeddings.cache.find(unit)
        assert entry is not None and entry.writing, f"a pull of unit {unit.hex()} settled that was never started"
        entry.writing = False
        entry.ready = error is None
        self._embeddings.release(unit)
        self._near.out.release(self.pulling.pop(unit).ticket)
        if self._embeddings.cache.find(unit) is not None:
            self._fetch(unit)
        if error is None or unit in self.pulling:
            return []
        return [job for job in self._jobs.started.values() if unit in job.announced]

    def lost(self, instance: InstanceId) -> None:
        """An instance that was asked to share something is gone."""
        for job in self._jobs:
            units = [unit for unit, whom in job.asked.items() if whom == instance]
            if units:
                job.asked |= dict.fromkeys(units, FRONTEND)
                self._near.out.send(FRONTEND, Wanted(job.request_id, tuple(units)))

    # ---- what requests need

    def bring_all(self, job: PrefillJob) -> None:
        """Makes sure that every unit which a started request needs is here or on its way."""
        for unit in [unit for unit in job.needed if unit in job.tickets]:
            self._fetch(unit)
        coming = set().union(*(other.coming for other in self._jobs.started.values()))
        self._ask(job, [unit for unit in job.needed if unit not in coming and self._is_nowhere(unit)])

    def catch_up(self, job: PrefillJob) -> bool:
        """Counts what is here now of what a started request needs, asks anew for what nobody brings, and says whether
        all is here. Once here, it stays: the request refers to it."""
        sequence, spans = job.sequence, job.sequence.spans
        while job.num_ready_spans < len(spans):
            unit = sequence.units[spans[job.num_ready_spans].unit].hash
            if unit in job.needed and not self._embeddings.cache.is_ready(unit):
                if unit not in job.coming:  # what was writing it, a step or a pull of another request, may have failed
                    self.bring_all(job)
                return False
            job.num_ready_spans += 1
        return True

    def misses_any(self, job: PrefillJob) -> bool:
        return not all(map(self._embeddings.cache.is_ready, job.needed))

    def give_back(self, job: PrefillJob, units: Iterable[UnitHash]) -> None:
        """Tickets that are not used."""
        for unit in units:
            self._near.out.release(job.tickets.pop(unit).ticket)

    def let_go(self, job: PrefillJob) -> None:
        """It needs no unit any more."""
        for unit in job.needed:
            self._embeddings.release(unit)
        job.needed = {}

    # ---- inside

    def _withdrawn(self, job: PrefillJob, units: Iterable[UnitHash]) -> None:
        for unit in units:
            job.coming.discard(unit)
            job.asked.pop(unit, None)
        if job.sequence.status is not Status.WAITING:
            self.bring_all(job)

    def _announced(self, job: PrefillJob, message: Embedded) -> None:
        """Takes a ticket where it is of use now or will be; else gives it back."""
        unit, started = message.unit, job.sequence.status is not Status.WAITING
        job.coming.discard(unit)
        job.asked.pop(unit, None)
        useless = unit in job.announced or self._near.is_stale(message.ticket) or (started and unit not in job.needed)
        if useless or (not started and self._is_asking):
            self._near.out.release(message.ticket)
            return
        job.tickets[unit] = message
        job.announced.add(unit)
        if started:
            self._fetch(unit)

    def _is_nowhere(self, unit: UnitHash) -> bool:
        entry = self._embeddings.cache.find(unit)
        assert entry is not None, f"unit {unit.hex()} is needed by a started request that holds no space for it"
        return not entry.ready and not entry.writing

    def _fetch(self, unit: UnitHash) -> None:
        """Begins a pull of a unit that is announced to started requests, unless it is here or already coming."""
        entry = self._embeddings.cache.find(unit)
        assert entry is not None, f"unit {unit.hex()} is announced to a started request that holds no space for it"
        holders = [job for job in self._jobs.started.values() if unit in job.tickets]
        if entry.ready:
            for job in holders:
                if job.tickets[unit].computed:
                    job.sources[unit] = "computed"
                self._near.out.release(job.tickets.pop(unit).ticket)
        elif holders and not entry.writing:
            job = holders[0]
            message = job.tickets.pop(unit)
            job.sources[unit] = "computed" if message.computed else "transferred"
            self._embeddings.hold(job.needed[unit])  # the pull's own: an abort must not free what is being written
            entry.writing = True
            self.pulling[unit] = message
            self._near.out.pulls.append(Pull(unit, message.ticket, entry.blocks))

    def _ask(self, job: PrefillJob, units: list[UnitHash]) -> None:
        """Nobody is about to announce units that a started request holds space for: they were thought to be here, or
        their tickets had to be given back. What it asks for comes behind the orders of younger requests, so these must
        not fill the encode instances meanwhile: their tickets go back, and are asked for when their turn comes."""
        if not units:
            return
        near = self._near
        for unit in units:
            holder = job.held.pop(unit, near.instance)
            peer = near.table.peers.get(holder)
            can_share = holder != near.instance and peer is not None and not peer.leaving
            job.asked[unit] = holder if can_share else FRONTEND
            if can_share:
                near.out.send(holder, Share(job.request_id, job.needed[unit], near.instance))
        job.coming.update(units)
        wanted = tuple(unit for unit in units if job.asked[unit] == FRONTEND)
        if wanted:
            near.out.send(FRONTEND, Wanted(job.request_id, wanted))
        for waiting in self._jobs.waiting:
            waiting.announced.difference_update(waiting.tickets)
            self.give_back(waiting, list(waiting.tickets))

    @property
    def _is_asking(self) -> bool:
        return any(job.asked for job in self._jobs.started.values())
