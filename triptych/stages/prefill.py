"""Prefill: prompt to KV cache and first token, in chunks, over the prefix whose embeddings have arrived."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from triptych.core import Chunk, EncodeUnit, RequestId, SampledToken, Sequence, Status, UnitHash
from triptych.errors import RequestError
from triptych.memory.embedding_cache import EmbeddingShare
from triptych.memory.kv_cache import KVCache
from triptych.memory.leases import Leases
from triptych.messages import FRONTEND, Embedded, Located, Prefilled, Submit, Ticket
from triptych.routing import pick_decode
from triptych.stages.base import Gone, Pull, Surroundings, foreseen_tokens, token_update


@dataclass(slots=True)
class PrefillJob:
    """A sequence on its way through prefill, and the announced units that nobody has begun to pull for it."""

    sequence: Sequence
    tickets: dict[UnitHash, Ticket] = field(default_factory=dict)
    announced: set[UnitHash] = field(default_factory=set)  # units whose ticket came, used since or not
    num_ready_spans: int = 0  # leading spans whose embeddings are here


class PrefillStage:
    """FCFS. A request starts when it holds space for all its embeddings; then it takes KV blocks for its whole prompt.
    Both in arrival order, the order of the encode instances too: what the oldest request waits for is never held by
    one that waits for it. Requests that miss embeddings leave room for the decodes of this instance.
    """

    def __init__(
        self,
        near: Surroundings,
        kv: KVCache,
        embeddings: EmbeddingShare,
        leases: Leases,
        *,
        max_num_seqs: int,
        streamed: bool = True,
        whole_spans: bool = False,
    ) -> None:
        """`streamed`: prefill starts on the prefix that is ready; else it waits for all embeddings of a request.
        `whole_spans`: the model looks at an image as a whole (gemma3), so a chunk never ends inside one."""
        self._near = near
        self._kv = kv
        self._embeddings = embeddings
        self._leases = leases
        self._max_num_seqs = max_num_seqs
        self._streamed = streamed
        self._whole_spans = whole_spans
        self._waiting: deque[PrefillJob] = deque()
        self._started: dict[RequestId, PrefillJob] = {}  # in arrival order
        self._early: dict[RequestId, list[Embedded]] = {}  # announced before their request was submitted
        self._pulling: dict[UnitHash, Ticket] = {}
        self._gone = Gone()

    @property
    def queues(self) -> dict[str, int]:
        return {"prefill_waiting": len(self._waiting), "prefill_running": len(self._started)}

    @property
    def queued_tokens(self) -> int:
        jobs = [*self._waiting, *self._started.values()]
        return sum(len(job.sequence.token_ids) - job.sequence.num_computed for job in jobs)

    # ---- what arrives

    def admit(self, order: Submit) -> None:
        sequence = Sequence(
            order.request_id, order.token_ids, order.num_prompt_tokens, order.sampling, order.units, order.spans
        )
        early = self._early.pop(order.request_id, [])
        refusal = self._never_fits(sequence)
        if refusal is None:
            tickets = {message.unit: message.ticket for message in early}
            self._waiting.append(PrefillJob(sequence, tickets, set(tickets)))
            return
        self._near.out.fail(order.request_id, refusal, status=400, code="request_too_large")
        self._gone.add(order.request_id)
        for message in early:
            self._near.out.release(message.ticket)

    def embedded(self, message: Embedded) -> None:
        """A unit can be pulled. Kept for a request that is not submitted yet: messages of two senders may overtake
        each other; `abort` forgets it."""
        job = self._started.get(message.request_id) or self._find_waiting(message.request_id)
        if job is None and message.request_id not in self._gone:
            self._early.setdefault(message.request_id, []).append(message)
        elif job is None or message.unit in job.announced or self._near.is_stale(message.ticket):
            self._near.out.release(message.ticket)
        else:
            job.tickets[message.unit] = message.ticket
            job.announced.add(message.unit)
            if job.sequence.status is not Status.WAITING:
                self._fetch(message.unit)

    def pulled(self, unit: UnitHash, error: Exception | None) -> None:
        """A pull settled. After an error another request's ticket for the same unit is tried; if there is none, the
        requests that had theirs fail, and those that still expect one go on waiting for it."""
        entry = self._embeddings.cache.find(unit)
        assert entry is not None and entry.writing, f"a pull of unit {unit.hex()} settled that was never started"
        entry.writing = False
        entry.ready = error is None
        self._embeddings.release(unit)
        self._near.out.release(self._pulling.pop(unit))
        if self._embeddings.cache.find(unit) is not None:
            self._fetch(unit)
        if error is not None and unit not in self._pulling:
            for job in [job for job in self._started.values() if unit in job.announced]:
                message = f"an embedding of the request could not be fetched: {error}"
                self._near.out.fail(job.sequence.request_id, message, status=500, code="transfer_failed")
                self.abort(job.sequence.request_id)

    def abort(self, request_id: RequestId) -> None:
        self._gone.add(request_id)
        for message in self._early.pop(request_id, []):
            self._near.out.release(message.ticket)
        job = self._started.pop(request_id, None)
        if job is not None:
            self._let_go(job)
            self._kv.free(job.sequence)
        else:
            job = self._find_waiting(request_id)
            if job is None:
                return
            self._waiting.remove(job)
        for ticket in job.tickets.values():
            self._near.out.release(ticket)
        job.sequence.status = Status.FINISHED

    # ---- schedule, commit

    def schedule(self, budget: int) -> list[Chunk]:
        """Chunks of at most `budget` tokens together, oldest request first. Commit them before the next schedule."""
        self._start_waiting()
        self._hold_kv()
        chunks: list[Chunk] = []
        for job in self._started.values():
            if budget <= 0:
                break
            length = self._next_length(job, budget)
            if length > 0:
                chunks.append(self._chunk(job.sequence, length))
                budget -= length
        return chunks

    def commit(self, chunks: list[Chunk], sampled: list[SampledToken]) -> None:
        """`sampled` has one token for each chunk that samples, in order. An aborted sequence's chunk is dropped."""
        tokens = iter(sampled)
        for chunk in chunks:
            sequence = chunk.sequence
            token = next(tokens) if chunk.samples else None
            if sequence.status is Status.FINISHED:
                continue
            sequence.num_computed += chunk.length
            if token is not None:
                self._complete(self._started.pop(sequence.request_id), token)

    # ---- inside

    def _never_fits(self, sequence: Sequence) -> str | None:
        needed, there = len(sequence.token_ids) + 1, self._kv.max_tokens
        if needed > there:
            return f"the request needs KV space for {needed} tokens, the pool has {there}"
        blocks = sum(self._embeddings.cache.num_blocks_of(unit) for unit in _distinct(sequence))
        if blocks > self._embeddings.max_blocks:
            return f"the request's media need {blocks} embedding blocks, the pool has {self._embeddings.max_blocks}"
        return None

    def _find_waiting(self, request_id: RequestId) -> PrefillJob | None:
        return next((job for job in self._waiting if job.sequence.request_id == request_id), None)

    def _start_waiting(self) -> None:
        while self._waiting and len(self._started) < self._max_num_seqs:
            job = self._waiting[0]
            sequence = job.sequence
            if not self._embeddings.can_hold(sequence.units):
                break
            self._waiting.popleft()
            for unit in _distinct(sequence):
                self._embeddings.hold(unit)
            sequence.status = Status.RUNNING
            self._started[sequence.request_id] = job
            for unit_hash in list(job.tickets):
                self._fetch(unit_hash)

    def _hold_kv(self) -> None:
        """Gives started requests blocks for their whole prompt, oldest first. One whose embeddings are not all here
        may be passed by younger ones: if it took the blocks, it would wait with them for another instance."""
        num_waiting = sum(len(job.sequence.block_table) for job in self._started.values() if not self._is_complete(job))
        for job in self._started.values():
            sequence = job.sequence
            if sequence.block_table:
                continue
            needed = self._kv.num_missing(sequence, len(sequence.token_ids))
            if not self._is_complete(job):
                if not self._streamed or not self._kv.can_wait_with(num_waiting + needed):
                    continue
                num_waiting += needed
            if not self._kv.can_admit(sequence, len(sequence.token_ids)):
                break
            self._kv.hold(sequence, len(sequence.token_ids))

    def _fetch(self, unit: UnitHash) -> None:
        """Brings a unit nearer that a started request holds space for: begins a pull, unless it is there or coming."""
        entry = self._embeddings.cache.find(unit)
        assert entry is not None, f"unit {unit.hex()} is announced to a started request that holds no space for it"
        holders = [job for job in self._started.values() if unit in job.tickets]
        if entry.ready:
            for job in holders:
                self._near.out.release(job.tickets.pop(unit))
        elif holders and not entry.writing:
            ticket = holders[0].tickets.pop(unit)
            needed = next(u for u in holders[0].sequence.units if u.hash == unit)
            self._embeddings.hold(needed)  # the pull's own reference: an abort must not free what is being written
            entry.writing = True
            self._pulling[unit] = ticket
            self._near.out.pulls.append(Pull(unit, ticket, entry.blocks))

    def _next_length(self, job: PrefillJob, budget: int) -> int:
        """How many tokens of a started request can run now: up to the first placeholder that has no embedding yet."""
        sequence, spans = job.sequence, job.sequence.spans
        if not sequence.block_table:
            return 0
        ready_end = len(sequence.token_ids) if self._is_complete(job) else spans[job.num_ready_spans].start
        end = min(ready_end, sequence.num_computed + budget)
        if self._whole_spans:
            end = self._outside_spans(sequence, end)
        return end - sequence.num_computed

    def _is_complete(self, job: PrefillJob) -> bool:
        """Whether all embeddings of a started request are here. Once here, they stay: the request refers to them."""
        sequence, spans = job.sequence, job.sequence.spans
        while job.num_ready_spans < len(spans):
            unit = sequence.units[spans[job.num_ready_spans].unit].hash
            if not self._is_ready(unit):
                if unit in job.tickets:  # what was writing it, an encode step of another request, failed
                    self._fetch(unit)
                return False
            job.num_ready_spans += 1
        return True

    def _outside_spans(self, sequence: Sequence, end: int) -> int:
        """Moves a chunk's end out of a span: back to its start, or, if nothing stands before it, on to its end."""
        for span in sequence.spans:
            if span.start < end < span.start + span.length:
                return span.start if span.start > sequence.num_computed else span.start + span.length
        return end

    def _chunk(self, sequence: Sequence, length: int) -> Chunk:
        start = sequence.num_computed
        chunk = Chunk(sequence, start, length)
        for span in sequence.spans:
            if span.start < start + length and start < span.start + span.length:
                entry = self._embeddings.cache.find(sequence.units[span.unit].hash)
                assert entry is not None and entry.ready, f"span at {span.start} scheduled without its embedding"
                chunk.embedding_blocks[span.unit] = entry.blocks
        return chunk

    def _is_ready(self, unit: UnitHash) -> bool:
        entry = self._embeddings.cache.find(unit)
        return entry is not None and entry.ready

    def _complete(self, job: PrefillJob, token: SampledToken) -> None:
        """The prompt is computed and its first token sampled: report it, and hand the KV on unless this was all."""
        sequence = job.sequence
        self._gone.add(sequence.request_id)
        self._let_go(job)
        for ticket in job.tickets.values():
            self._near.out.release(ticket)
        sequence.token_ids.append(token.token_id)
        finish = self._near.finish_of(sequence)
        self._near.out.tokens.append(token_update(sequence, finish, token.logprobs))
        if finish is None:
            self._hand_on(sequence)
        else:
            self._kv.free(sequence)
            sequence.status = Status.FINISHED

    def _hand_on(self, sequence: Sequence) -> None:
        """Leases the KV to a decode instance picked from the newest table; this one, if no other is less loaded."""
        near, loads = self._near, self._near.decode_loads
        try:
            decode = pick_decode(near.table, loads, near.instance).id
        except RequestError as error:
            near.out.fail(sequence.request_id, str(error), error.status, error.code)
            self._kv.free(sequence)
            sequence.status = Status.FINISHED
            return
        loads[decode] = loads.get(decode, 0.0) + foreseen_tokens(sequence) * near.decode_pace_s
        sequence.status = Status.LEASED
        lease = self._leases.grant(decode, sequence, lambda: self._kv.free(sequence))
        ticket = near.ticket(lease, "kv", sequence.block_table, sequence.num_computed)
        near.out.send(FRONTEND, Located(sequence.request_id, decode))
        near.out.send(
            decode,
            Prefilled(
                sequence.request_id,
                sequence.token_ids,
                sequence.num_prompt_tokens,
                sequence.sampling,
                sequence.rope_delta,
                ticket,
            ),
        )

    def _let_go(self, job: PrefillJob) -> None:
        for unit in _distinct(job.sequence):
            self._embeddings.release(unit.hash)


def _distinct(sequence: Sequence) -> Iterator[EncodeUnit]:
    return iter({unit.hash: unit for unit in sequence.units}.values())
