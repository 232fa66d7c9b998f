"""Decode: one token per sequence and step. Short of blocks, the youngest sequence waits in host memory."""

from collections import deque
from dataclasses import dataclass, field

from triptych.core import Chunk, RequestId, SampledToken, Sequence, Status
from triptych.memory.kv_cache import KVCache
from triptych.memory.leases import Leases
from triptych.messages import Prefilled, Ticket
from triptych.stages.base import Gone, Pull, Surroundings, foreseen_tokens, token_update


@dataclass(slots=True)
class DecodePlan:
    """One step: first save what is offloaded, then bring back what is restored, then run the chunks.

    The block lists of `offloads` are already free again in the books, so they are read before anything is written.
    """

    offloads: list[tuple[Sequence, list[int]]] = field(default_factory=list)
    restores: list[tuple[Sequence, list[int]]] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)


class DecodeStage:
    """Continuous batching, FCFS: sequences join as soon as their KV is here and leave with their last token."""

    def __init__(self, near: Surroundings, kv: KVCache, leases: Leases, *, max_num_seqs: int) -> None:
        self._near = near
        self._kv = kv
        kv.decode_room = -(-near.max_model_len // kv.block_tokens)
        self._leases = leases
        self._max_num_seqs = max_num_seqs
        self._waiting: deque[tuple[Sequence, Ticket]] = deque()  # hold no block here
        self._pulling: dict[RequestId, tuple[Sequence, Ticket]] = {}
        self._here: deque[Sequence] = deque()  # KV complete, waiting for a place in the batch
        self._running: dict[RequestId, Sequence] = {}  # in the order of arrival
        self._offloaded: deque[Sequence] = deque()  # oldest first
        self._gone = Gone()  # aborted, perhaps before their KV was handed over
        self.num_offloads = 0

    @property
    def queues(self) -> dict[str, int]:
        waiting = len(self._waiting) + len(self._pulling) + len(self._here) + len(self._offloaded)
        return {"decode_waiting": waiting, "decode_running": len(self._running)}

    @property
    def queued_tokens(self) -> int:
        """Tokens that are expected to be decoded here for the sequences that are here or on their way."""
        sequences = [sequence for sequence, _ in [*self._waiting, *self._pulling.values()]]
        return sum(map(foreseen_tokens, [*sequences, *self._here, *self._offloaded, *self._running.values()]))

    # ---- what arrives

    def admit(self, order: Prefilled) -> None:
        ticket = order.ticket
        if order.request_id in self._gone:
            self._near.out.release(ticket)
            return
        if ticket.holder == self._near.instance:
            sequence = self._leases.claim(ticket.lease)
            if isinstance(sequence, Sequence):  # else it was aborted on the way
                self._here.append(sequence)
            return
        sequence = Sequence(
            order.request_id,
            order.token_ids,
            order.num_prompt_tokens,
            order.sampling,
            num_computed=ticket.num_tokens,
            rope_delta=order.rope_delta,
        )
        if len(sequence.token_ids) > self._kv.max_tokens:
            message = (
                f"the request needs KV space for {len(sequence.token_ids)} tokens, the pool has {self._kv.max_tokens}"
            )
            self._near.out.fail(order.request_id, message, status=400, code="request_too_large")
            self._near.out.release(ticket)
        else:
            self._waiting.append((sequence, ticket))
        self._pull_waiting()

    def pulled(self, request_id: RequestId, error: Exception | None) -> None:
        """A pull settled: no byte lands any more, whatever the outcome."""
        sequence, ticket = self._pulling.pop(request_id)
        self._near.out.release(ticket)
        if error is None and sequence.status is not Status.FINISHED:
            self._here.append(sequence)
            return
        self._kv.free(sequence)
        if sequence.status is not Status.FINISHED:
            sequence.status = Status.FINISHED
            self._near.out.fail(
                request_id, f"the KV of the request could not be fetched: {error}", 500, "transfer_failed"
            )

    def abort(self, request_id: RequestId) -> None:
        self._gone.add(request_id)
        for sequence, ticket in self._waiting:
            if sequence.request_id == request_id:
                self._near.out.release(ticket)
                sequence.status = Status.FINISHED
        self._waiting = deque(item for item in self._waiting if item[0].request_id != request_id)
        if request_id in self._pulling:  # its blocks are being written: they are freed when the pull settles
            self._pulling[request_id][0].status = Status.FINISHED
        for place in (self._here, self._offloaded):
            for sequence in [s for s in place if s.request_id == request_id]:
                place.remove(sequence)
                self._end(sequence)
        running = self._running.pop(request_id, None)
        if running is not None:
            self._end(running)

    # ---- schedule, commit

    def schedule(self) -> DecodePlan:
        """The next step. Commit its chunks before the next schedule."""
        plan = DecodePlan()
        self._offload_until_all_can_grow(plan)
        self._restore(plan)
        self._reserve_growth()
        self._pull_waiting()
        self._join(plan)
        self._reserve_growth()  # what prefill may take in this very step leaves room for those that just joined
        plan.chunks = [Chunk(s, len(s.token_ids) - 1, 1) for s in self._running.values()]
        return plan

    def commit(self, chunks: list[Chunk], sampled: list[SampledToken]) -> None:
        """Takes one token per chunk. A sequence that was aborted since is skipped."""
        near = self._near
        for chunk, token in zip(chunks, sampled, strict=True):
            sequence = chunk.sequence
            if sequence.status is not Status.RUNNING:
                continue
            sequence.num_computed += 1
            sequence.token_ids.append(token.token_id)
            finish = near.finish_of(sequence)
            near.out.tokens.append(token_update(sequence, finish, token.logprobs))
            if finish is not None:
                del self._running[sequence.request_id]
                self._end(sequence)

    # ---- inside

    def _pull_waiting(self) -> None:
        """Begins pulls in arrival order, for as many sequences as fit beside those that are here."""
        while self._waiting and not self._offloaded:
            sequence, ticket = self._waiting[0]
            if not self._kv.can_admit(sequence, len(sequence.token_ids)):
                break
            self._waiting.popleft()
            self._kv.hold(sequence, len(sequence.token_ids))
            sequence.status = Status.LOADING
            self._pulling[sequence.request_id] = (sequence, ticket)
            blocks = sequence.block_table[: len(ticket.blocks)]
            self._near.out.pulls.append(Pull(sequence.request_id, ticket, blocks))

    def _join(self, plan: DecodePlan) -> None:
        """Sequences whose KV is here join the batch. With nothing running, the oldest may push the youngest out."""
        while self._here and len(self._running) < self._max_num_seqs:
            oldest = self._here[0]
            while not self._running and len(self._here) > 1 and not self._kv.can_hold(oldest, len(oldest.token_ids)):
                self._offload(self._here.pop(), plan)
            if not self._kv.can_hold(oldest, len(oldest.token_ids)):
                break
            self._run(self._here.popleft())

    def _run(self, sequence: Sequence) -> None:
        self._kv.hold(sequence, len(sequence.token_ids))
        sequence.status = Status.RUNNING
        self._running[sequence.request_id] = sequence

    def _offload_until_all_can_grow(self, plan: DecodePlan) -> None:
        """Oldest first, every running sequence gets the block for its next token; the youngest pays for it."""
        for sequence in list(self._running.values()):
            while sequence.status is Status.RUNNING and not self._kv.can_hold(sequence, len(sequence.token_ids)):
                self._offload(self._youngest(), plan)
            if sequence.status is Status.RUNNING:
                self._kv.hold(sequence, len(sequence.token_ids))

    def _youngest(self) -> Sequence:
        if self._here:
            return self._here.pop()
        return self._running.pop(next(reversed(self._running)))

    def _offload(self, sequence: Sequence, plan: DecodePlan) -> None:
        """Takes the KV of a sequence that was just removed from its queue out of the pool."""
        plan.offloads.append((sequence, self._kv.computed_blocks(sequence)))
        self._kv.free(sequence)
        sequence.status = Status.OFFLOADED
        self._offloaded.appendleft(sequence)  # each one is older than those that left before it
        self.num_offloads += 1

    def _restore(self, plan: DecodePlan) -> None:
        while self._offloaded and not plan.offloads and len(self._running) < self._max_num_seqs:
            sequence = self._offloaded[0]
            if not self._kv.can_hold(sequence, len(sequence.token_ids) + self._kv.block_tokens * len(self._running)):
                break
            self._run(self._offloaded.popleft())
            plan.restores.append((sequence, self._kv.computed_blocks(sequence)))

    def _reserve_growth(self) -> None:
        """What newcomers must leave alone: one block per running sequence, and the way back of the oldest offloaded."""
        wanted = len(self._running)
        if self._offloaded:
            wanted += self._kv.num_missing(self._offloaded[0], len(self._offloaded[0].token_ids))
        self._kv.growth_reserve = wanted

    def _end(self, sequence: Sequence) -> None:
        self._kv.free(sequence)
        sequence.status = Status.FINISHED
        sequence.offloaded = None
