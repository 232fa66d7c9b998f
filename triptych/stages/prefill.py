"""Prefill: prompts to KV and a first token, in chunks, over whatever part of the embeddings has arrived."""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from triptych.core import (
    Chunk,
    EncodeUnit,
    InstanceId,
    RequestId,
    SampledToken,
    Sequence,
    Stage,
    Status,
    UnitHash,
    distinct,
    units_behind,
)
from triptych.errors import RequestError
from triptych.memory.embedding_cache import EmbeddingShare
from triptych.memory.kv_cache import KVCache
from triptych.memory.leases import Leases
from triptych.messages import FRONTEND, Abort, Embedded, Prefilled, Prefilling, Share, Submit, Wanted
from triptych.routing import pick_decode
from triptych.stages.base import Pull, Surroundings, announcement, foreseen_tokens, token_update, turn_away


@dataclass(slots=True)
class PrefillJob:
    """A sequence on its way through prefill, and what is known about the embeddings that it needs."""

    sequence: Sequence
    coming: set[UnitHash]  # somebody was told to announce them, and did not yet
    held: dict[UnitHash, InstanceId]  # who seems to have others
    tickets: dict[UnitHash, Embedded] = field(default_factory=dict)  # announced, and nobody began to pull them for it
    announced: set[UnitHash] = field(default_factory=set)  # units whose ticket came, used since or not
    asked: dict[UnitHash, InstanceId] = field(default_factory=dict)  # asked for since the request started, and whom
    needed: dict[UnitHash, EncodeUnit] = field(default_factory=dict)  # referenced: a part of the prompt looks at them
    sources: dict[UnitHash, str] = field(default_factory=dict)  # where units came from, if not from the cache
    num_ready_spans: int = 0  # leading spans whose embeddings are here, or not needed
    num_cached: int = 0  # leading tokens whose KV was found
    decode: InstanceId | None = None  # where the KV goes, once that is decided
    num_sent_ahead: int = 0  # leading blocks that it was told of
    told: set[InstanceId] = field(default_factory=set)  # who was told of any, also those that leave their role since


class PrefillStage:
    """FCFS. A request starts when it holds space for all embeddings that it needs; then it takes KV blocks for its
    whole prompt. Both in arrival order, the order of the encode instances too: what the oldest request waits for is
    never held by one that waits for it. Requests that miss embeddings give their KV up to decodes of this instance and
    to older requests that miss none; those that wait for space for them are passed by text.

    What a prefix that is here covers is neither computed nor encoded nor transferred: a request that begins with one
    takes all its blocks when it starts.
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
        chunked_transfer: bool = True,
        whole_spans: bool = False,
    ) -> None:
        """`streamed`: prefill starts on the prefix that is ready; else it waits for all embeddings of a request.
        `chunked_transfer`: KV is announced to decode after every chunk; else as a whole at the end.
        `whole_spans`: the model looks at an image as a whole (gemma3), so a chunk never ends inside one."""
        self._near = near
        self._kv = kv
        self._embeddings = embeddings
        self._leases = leases
        self._max_num_seqs = max_num_seqs
        kv.reclaim_waiting = self._preempt
        self._streamed = streamed
        self._chunked_transfer = chunked_transfer and not kv.state_blocks
        self._whole_spans = whole_spans
        self._waiting: deque[PrefillJob] = deque()
        self._started: dict[RequestId, PrefillJob] = {}  # in arrival order
        self._early: dict[RequestId, list[Embedded | Wanted]] = {}  # came before their request was submitted
        self._pulling: dict[UnitHash, Embedded] = {}
        self._gone = near.gone_from_prefill
        self._leaving = False
        self.num_units: Counter[str] = Counter()  # of prefilled requests: cached, transferred, prefix
        self.num_prompt_tokens = 0  # of prefilled requests
        self.num_cached_tokens = 0  # of those: found in the KV cache

    @property
    def queues(self) -> dict[str, int]:
        return {"prefill_waiting": len(self._waiting), "prefill_running": len(self._started)}

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be done here and nothing is being written. What was handed on counts among the
        leases."""
        return not self._waiting and not self._started and not self._pulling

    @property
    def awaits_embeddings(self) -> bool:
        """Whether a request here waits for what is being encoded."""
        return any(job.coming for job in [*self._waiting, *self._started.values()])

    @property
    def queued_tokens(self) -> int:
        jobs = [*self._waiting, *self._started.values()]
        return sum(len(job.sequence.token_ids) - job.sequence.num_computed for job in jobs)

    # ---- what arrives

    def admit(self, order: Submit) -> None:
        if order.request_id in self._started or self._find_waiting(order.request_id) is not None:
            return
        if self._leaving or order.request_id in self._gone:  # or what came before it was given back meanwhile
            self._forget_early(order.request_id)
            turn_away(self._near, order)
            return
        sequence = Sequence(
            order.request_id,
            order.token_ids,
            order.num_prompt_tokens,
            order.sampling,
            order.units,
            order.spans,
            order.position_arguments,
            order.prompt_hashes,
        )
        refusal = self._never_fits(sequence)
        if refusal is not None:
            self._near.out.fail(order.request_id, refusal, status=400, code="request_too_large")
            self._forget_early(order.request_id)
            return
        self._waiting.append(PrefillJob(sequence, set(order.ordered), dict(order.held)))
        for message in self._early.pop(order.request_id, []):
            self._told(message)

    def embedded(self, message: Embedded) -> None:
        """A unit can be pulled."""
        self._told(message)

    def wanted(self, message: Wanted) -> None:
        """Who was told to encode these units will not: the request asks for them in its turn."""
        self._told(message)

    def share(self, order: Share) -> None:
        """Another instance needs a unit that was seen here."""
        unit, near = order.unit, self._near
        if self._leaving:
            turn_away(near, order)
        elif self._embeddings.cache.is_ready(unit.hash) and self._embeddings.can_hold([unit]):
            pinned = announcement(
                near, self._embeddings, self._leases, unit, order.request_id, order.prefill, computed=False
            )
            near.out.send(order.prefill, pinned)
        else:
            near.out.send(FRONTEND, Wanted(order.request_id, (unit.hash,)))

    def pulled(self, unit: UnitHash, error: Exception | None) -> None:
        """A pull settled. After an error another request's ticket for the same unit is tried; if there is none, the
        requests that had theirs fail, and the others go on waiting for theirs."""
        entry = self._embeddings.cache.find(unit)
        assert entry is not None and entry.writing, f"a pull of unit {unit.hex()} settled that was never started"
        entry.writing = False
        entry.ready = error is None
        self._embeddings.release(unit)
        self._near.out.release(self._pulling.pop(unit).ticket)
        if self._embeddings.cache.find(unit) is not None:
            self._fetch(unit)
        if error is not None and unit not in self._pulling:
            for job in [job for job in self._started.values() if unit in job.announced]:
                text = f"an embedding of the request could not be fetched: {error}"
                self._near.out.retry(job.sequence.request_id, text, "transfer_failed")
                self.abort(job.sequence.request_id)

    def abort(self, request_id: RequestId) -> None:
        self._forget_early(request_id)
        job = self._started.pop(request_id, None)
        if job is not None:
            self._let_go(job)
            self._kv.free(job.sequence)
        else:
            job = self._find_waiting(request_id)
            if job is None:
                return
            self._waiting.remove(job)
        self._give_back(job, list(job.tickets))
        job.sequence.status = Status.FINISHED

    def lost(self, instance: InstanceId) -> None:
        """An instance that was asked to share something is gone."""
        for job in [*self._waiting, *self._started.values()]:
            units = [unit for unit, whom in job.asked.items() if whom == instance]
            if units:
                job.asked |= dict.fromkeys(units, FRONTEND)
                self._near.out.send(FRONTEND, Wanted(job.sequence.request_id, tuple(units)))

    def leave(self) -> None:
        """Gives the requests back of which nothing is computed yet; the others go on to their end."""
        self._leaving = True
        for request_id in list(self._early):
            self._forget_early(request_id)
        self._move_queued()

    def stay(self) -> None:
        """Takes requests again."""
        self._leaving = False

    # ---- schedule, commit

    def schedule(self, budget: int) -> list[Chunk]:
        """Chunks of at most `budget` tokens together, oldest request first. Commit them before the next schedule."""
        if self._leaving:  # some may have lost meanwhile what was computed of them
            self._move_queued()
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
            self._kv.seal(sequence)
            if token is not None:
                self._complete(self._started.pop(sequence.request_id), token)
            elif self._chunked_transfer:
                self._send_ahead(self._started[sequence.request_id])

    # ---- leaving

    def _move_queued(self) -> None:
        idle = [job for job in self._started.values() if self._is_untouched(job) and self._misses_embeddings(job)]
        for job in [*self._waiting, *idle]:
            request_id = job.sequence.request_id
            self._near.out.retry(request_id, f"instance {self._near.instance} leaves its role", "moved")
            self.abort(request_id)

    def _is_untouched(self, job: PrefillJob) -> bool:
        return job.sequence.num_computed == job.num_cached

    def _misses_embeddings(self, job: PrefillJob) -> bool:
        return not all(map(self._embeddings.cache.is_ready, job.needed))

    def _forget_early(self, request_id: RequestId) -> None:
        """What comes for it from now on is given back."""
        self._gone.add(request_id)
        for message in self._early.pop(request_id, []):
            if isinstance(message, Embedded):
                self._near.out.release(message.ticket)

    # ---- starting

    def _never_fits(self, sequence: Sequence) -> str | None:
        needed, there = len(sequence.token_ids) + 1, self._kv.max_tokens
        if needed > there:
            return f"the request needs KV space for {needed} tokens, the pool has {there}"
        blocks = sum(self._embeddings.cache.num_blocks_of(unit) for unit in distinct(sequence.units))
        if blocks > self._embeddings.max_blocks:
            return f"the request's media need {blocks} embedding blocks, the pool has {self._embeddings.max_blocks}"
        return None

    def _find_waiting(self, request_id: RequestId) -> PrefillJob | None:
        return next((job for job in self._waiting if job.sequence.request_id == request_id), None)

    def _start_waiting(self) -> None:
        """In arrival order, but those without media pass those that wait for space for embeddings: they wait for no
        encoder, so that whoever waits for them does not wait for ever."""
        while self._waiting and len(self._started) < self._max_num_seqs:
            self._hold_kv()  # first: it may put a started request back to the front
            job = self._waiting[0]
            found = self._found_prefix(job.sequence)
            if not self._can_begin_with(found, job):
                break
            needed = units_behind(job.sequence.units, job.sequence.spans, len(found) * self._kv.block_tokens)
            if not self._embeddings.can_hold(list(needed.values())):
                passing = next((other for other in self._waiting if not other.sequence.units), None)
                if passing is None:
                    break
                job, found, needed = passing, self._found_prefix(passing.sequence), {}
                if not self._can_begin_with(found, job):
                    break
            self._waiting.remove(job)
            if found:
                self._take_kv(job, found)
            self._start(job, needed)

    def _can_begin_with(self, found: list[int], job: PrefillJob) -> bool:
        """Whether there is KV space behind a prefix that is here; without one it is taken later. Who waits for it here
        waits for decodes, for readers, or for requests that started before: they all go on."""
        sequence = job.sequence
        if not found:
            return True
        return not self._is_short_of_kv and self._kv.make_room_for_new(sequence, len(sequence.token_ids), found)

    def _start(self, job: PrefillJob, needed: dict[UnitHash, EncodeUnit]) -> None:
        sequence = job.sequence
        job.needed = needed
        for unit in needed.values():
            self._embeddings.hold(unit)
        hashes = {sequence.units[span.unit].hash for span in sequence.spans}
        job.sources = dict.fromkeys(hashes - needed.keys(), "prefix")
        sequence.status = Status.RUNNING
        self._started[sequence.request_id] = job
        self._give_back(job, [unit for unit in job.tickets if unit not in needed])
        self._embeddings.cache.num_hits += sum(map(self._embeddings.cache.is_ready, needed))
        self._bring_all(job)

    def _hold_kv(self) -> None:
        """Gives started requests blocks for their whole prompt, oldest first. One whose embeddings are not all here
        may be passed by younger ones."""
        for job in list(self._started.values()):
            if job.sequence.block_table or job.sequence.status is Status.WAITING:  # reset for an older one just now
                continue
            complete = self._is_complete(job)
            if (complete or self._streamed) and not self._try_to_take_kv(job, complete) and complete:
                break

    def _try_to_take_kv(self, job: PrefillJob, complete: bool) -> bool:
        """A request that misses embeddings takes only what is free; a complete one also what younger ones wait with."""
        sequence = job.sequence
        found = self._found_prefix(sequence)
        while not self._kv.make_room_for_new(sequence, len(sequence.token_ids), found):
            if not complete or not self._preempt(older=job):
                return False
            found = self._found_prefix(sequence)
        self._take_kv(job, found)
        return True

    @property
    def _is_short_of_kv(self) -> bool:
        """Whether a started request waits for blocks and nothing else: younger ones must not take them."""
        return any(not job.sequence.block_table and self._is_complete(job) for job in self._started.values())

    def _found_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks that a request may begin with. The prompt's last token is always computed: samples and the positions
        of what is decoded follow from it."""
        return self._kv.find(sequence.prompt_hashes, sequence.num_prompt_tokens - 1)

    def _take_kv(self, job: PrefillJob, found: list[int]) -> None:
        self._kv.hold(job.sequence, len(job.sequence.token_ids), found)
        job.num_cached = job.sequence.num_computed

    def _preempt(self, older: PrefillJob | None = None) -> bool:
        """Takes the KV of the youngest request that waits for embeddings; with `older`, of one younger than that. It is
        computed again, or found. False where there is none."""
        for job in reversed(self._started.values()):
            if job is older:
                return False
            if job.sequence.block_table and not self._is_complete(job):
                self._reset(job)
                return True
        return False

    def _reset(self, job: PrefillJob) -> None:
        """As if the request had not begun. If it counted on a prefix for some units, it starts again, as the next."""
        sequence = job.sequence
        self._kv.free(sequence)
        sequence.num_computed, sequence.sealed = 0, []
        job.num_ready_spans = job.num_cached = 0
        if "prefix" in job.sources.values():
            del self._started[sequence.request_id]
            self._let_go(job)
            job.sources, job.announced = {}, set(job.tickets)  # what it had may be evicted by then
            sequence.status = Status.WAITING
            self._waiting.appendleft(job)

    # ---- embeddings

    def _told(self, message: Embedded | Wanted) -> None:
        """Kept for a request that is not submitted yet: messages of two senders may overtake each other; `abort`
        forgets it."""
        request_id = message.request_id
        job = self._started.get(request_id) or self._find_waiting(request_id)
        if job is None and not (self._leaving or request_id in self._gone):
            self._early.setdefault(request_id, []).append(message)
        elif job is None:
            self._gone.add(request_id)  # a request that would wait for this must not be taken in any more
            if isinstance(message, Embedded):
                self._near.out.release(message.ticket)
        elif isinstance(message, Embedded):
            self._announced(job, message)
        else:
            self._withdrawn(job, message.units)

    def _withdrawn(self, job: PrefillJob, units: Iterable[UnitHash]) -> None:
        for unit in units:
            job.coming.discard(unit)
            job.asked.pop(unit, None)
        if job.sequence.status is not Status.WAITING:
            self._bring_all(job)

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

    def _bring_all(self, job: PrefillJob) -> None:
        """Makes sure that every unit which a started request needs is here or on its way."""
        for unit in [unit for unit in job.needed if unit in job.tickets]:
            self._fetch(unit)
        coming = set().union(*(other.coming for other in self._started.values()))
        self._ask(job, [unit for unit in job.needed if unit not in coming and self._is_nowhere(unit)])

    def _is_nowhere(self, unit: UnitHash) -> bool:
        entry = self._embeddings.cache.find(unit)
        assert entry is not None, f"unit {unit.hex()} is needed by a started request that holds no space for it"
        return not entry.ready and not entry.writing

    def _fetch(self, unit: UnitHash) -> None:
        """Begins a pull of a unit that is announced to started requests, unless it is here or already coming."""
        entry = self._embeddings.cache.find(unit)
        assert entry is not None, f"unit {unit.hex()} is announced to a started request that holds no space for it"
        holders = [job for job in self._started.values() if unit in job.tickets]
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
            self._pulling[unit] = message
            self._near.out.pulls.append(Pull(unit, message.ticket, entry.blocks))

    def _ask(self, job: PrefillJob, units: list[UnitHash]) -> None:
        """Nobody is about to announce units that a started request holds space for: they were thought to be here, or
        their tickets had to be given back. What it asks for comes behind the orders of younger requests, so these must
        not fill the encode instances meanwhile: their tickets go back, and are asked for when their turn comes."""
        if not units:
            return
        request_id, near = job.sequence.request_id, self._near
        for unit in units:
            holder = job.held.pop(unit, near.instance)
            peer = near.table.peers.get(holder)
            can_share = holder != near.instance and peer is not None and not peer.leaving
            job.asked[unit] = holder if can_share else FRONTEND
            if can_share:
                near.out.send(holder, Share(request_id, job.needed[unit], near.instance))
        job.coming.update(units)
        wanted = tuple(unit for unit in units if job.asked[unit] == FRONTEND)
        if wanted:
            near.out.send(FRONTEND, Wanted(request_id, wanted))
        for waiting in self._waiting:
            waiting.announced.difference_update(waiting.tickets)
            self._give_back(waiting, list(waiting.tickets))

    @property
    def _is_asking(self) -> bool:
        return any(job.asked for job in self._started.values())

    def _give_back(self, job: PrefillJob, units: Iterable[UnitHash]) -> None:
        for unit in units:
            self._near.out.release(job.tickets.pop(unit).ticket)

    def _let_go(self, job: PrefillJob) -> None:
        for unit in job.needed:
            self._embeddings.release(unit)
        job.needed = {}

    # ---- chunks

    def _next_length(self, job: PrefillJob, budget: int) -> int:
        """How many tokens of a started request can run now: up to the first placeholder that has no embedding yet."""
        sequence, spans = job.sequence, job.sequence.spans
        if not sequence.block_table:
            return 0
        complete = self._is_complete(job)
        if not complete and not self._streamed:
            return 0
        ready_end = len(sequence.token_ids) if complete else spans[job.num_ready_spans].start
        end = min(ready_end, sequence.num_computed + budget)
        if self._whole_spans:
            end = self._outside_spans(sequence, end)
        return end - sequence.num_computed

    def _is_complete(self, job: PrefillJob) -> bool:
        """Whether all embeddings that a started request needs are here. Once here, they stay: it refers to them."""
        sequence, spans = job.sequence, job.sequence.spans
        while job.num_ready_spans < len(spans):
            unit = sequence.units[spans[job.num_ready_spans].unit].hash
            if unit in job.needed and not self._embeddings.cache.is_ready(unit):
                if unit not in job.coming:  # what was writing it, a step or a pull of another request, may have failed
                    self._bring_all(job)
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

    # ---- handing on

    def _complete(self, job: PrefillJob, token: SampledToken) -> None:
        """The prompt is computed and its first token sampled: report it, and hand the KV on unless this was all."""
        sequence = job.sequence
        self._gone.add(sequence.request_id)
        self._let_go(job)
        self._give_back(job, list(job.tickets))
        for unit in distinct(sequence.units):
            self.num_units[job.sources.get(unit.hash, "cached")] += 1
        self.num_prompt_tokens += len(sequence.token_ids)
        self.num_cached_tokens += job.num_cached
        sequence.token_ids.append(token.token_id)
        finish = self._near.finish_of(sequence)
        self._near.out.tokens.append(token_update(sequence, finish, token.logprobs, job.num_cached))
        self._recall(job, None if finish is not None else self._decode_of(job))
        if finish is None:
            self._hand_on(job)
        else:
            self._kv.free(sequence)
            sequence.status = Status.FINISHED

    def _recall(self, job: PrefillJob, decode: InstanceId | None) -> None:
        """All but `decode` have no use for what they were sent ahead. Not said before the end: who encodes, too, would
        take it for the end of the request."""
        for instance in sorted(job.told & self._near.table.peers.keys() - {decode}):
            self._near.out.send(instance, Abort(job.sequence.request_id))

    def _send_ahead(self, job: PrefillJob) -> None:
        """Tells decode of the blocks that are full by now: only the tail is left to move after the last chunk."""
        sequence, near = job.sequence, self._near
        num_full = sequence.num_computed // self._kv.block_tokens
        if foreseen_tokens(sequence) <= 1 or num_full == job.num_sent_ahead:
            return
        if self._decode_of(job) in (None, near.instance):
            return
        assert job.decode is not None
        if not job.num_sent_ahead:
            near.out.send(FRONTEND, near.located(sequence.request_id, job.decode))
        job.num_sent_ahead = num_full
        job.told.add(job.decode)
        blocks = sequence.block_table[:num_full]
        self._kv.refer(blocks)  # the reader's: an abort must not free what is being read
        lease = self._leases.grant(job.decode, sequence.request_id, lambda: self._kv.give_back(blocks))
        ticket = near.ticket(lease, "kv", blocks, num_full * self._kv.block_tokens)
        num_tokens = len(sequence.token_ids)
        near.out.send(job.decode, Prefilling(sequence.request_id, num_tokens, sequence.prompt_hashes, ticket))

    def _decode_of(self, job: PrefillJob) -> InstanceId | None:
        """Who decodes it: picked once, again if that one is gone or leaves. None where there is nobody."""
        near, loads = self._near, self._near.decode_loads
        peer = None if job.decode is None else near.table.peers.get(job.decode)
        if peer is None or (peer.leaving and peer.id != near.instance):
            try:
                job.decode = pick_decode(near.table, loads, near.instance, job.sequence.request_id).id
            except RequestError:
                if not near.serves_here(Stage.DECODE):
                    return None
                job.decode = near.instance  # leaves, too, but not before this is done
            loads[job.decode] = loads.get(job.decode, 0.0) + foreseen_tokens(job.sequence) * near.decode_pace_s
            job.num_sent_ahead = 0
        return job.decode

    def _hand_on(self, job: PrefillJob) -> None:
        """Leases the KV to a decode instance picked from the newest table; this one, if no other is less loaded."""
        near, sequence = self._near, job.sequence
        decode = self._decode_of(job)
        if decode is None:
            near.out.retry(sequence.request_id, "no instance serves decode at the moment", "unavailable")
            self._kv.free(sequence)
            sequence.status = Status.FINISHED
            return
        sequence.status = Status.LEASED
        lease = self._leases.grant(decode, sequence, lambda: self._kv.free(sequence), lambda: self._take_back(sequence))
        ticket = near.ticket(lease, "kv", sequence.block_table, sequence.num_computed)
        if not job.num_sent_ahead:
            near.out.send(FRONTEND, near.located(sequence.request_id, decode))
        near.out.send(
            decode,
            Prefilled(
                sequence.request_id,
                sequence.token_ids,
                sequence.num_prompt_tokens,
                sequence.sampling,
                sequence.rope_delta,
                sequence.prompt_hashes,
                ticket,
            ),
        )

    def _take_back(self, sequence: Sequence) -> None:
        """Who was to decode it leaves its role or is gone. It goes to another; where that may be this instance, there
        at once, because it is never declined here."""
        here = self._near.instance if self._near.serves_here(Stage.DECODE) else None
        self._hand_on(PrefillJob(sequence, coming=set(), held={}, decode=here))
