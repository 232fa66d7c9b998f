"""Decode: one token per sequence and step. Short of blocks, the youngest sequence waits in host memory."""

from dataclasses import dataclass, field

from msgspec.structs import replace

from triptych.core import Chunk, InstanceId, RequestId, SampledToken, SamplingParams, Sequence, Stage, Status
from triptych.memory.kv_cache import KVCache
from triptych.memory.leases import Leases
from triptych.messages import FRONTEND, Prefilled, Prefilling, Ticket
from triptych.stages.base import Pull, Surroundings, foreseen_tokens, prefilled, token_update
from triptych.stages.line import Line


@dataclass(slots=True)
class DecodePlan:
    """One step: first save what is offloaded, then bring back what is restored, then run the chunks.

    The block lists of `offloads` are already free again in the books, so they are read before anything is written.
    """

    offloads: list[tuple[Sequence, list[int]]] = field(default_factory=list)
    restores: list[tuple[Sequence, list[int]]] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)


@dataclass(slots=True)
class Arrival:
    """A sequence that holds its blocks here while its KV is on its way, perhaps while the end is still computed."""

    sequence: Sequence
    holder: InstanceId
    num_here: int  # leading blocks whose KV is here
    handed_over: bool = False  # prefill is done: the newest ticket is for everything
    ticket: Ticket | None = None  # the newest one, not used yet
    pulling: Ticket | None = None


class DecodeStage:
    """Continuous batching, FCFS: sequences join as soon as their KV is here and leave with their last token.

    KV that prefill sends ahead takes space that nobody needs at the moment, and gives it back to whoever does.

    An instance that leaves its role hands its sequences over to others that have room, as prefill does, and declines
    what waits for space. Nobody waits for space here while KV of this instance waits for somebody else: so instances
    that leave can never wait for each other in a circle.
    """

    def __init__(self, near: Surroundings, kv: KVCache, leases: Leases, *, max_num_seqs: int) -> None:
        self._near = near
        self._kv = kv
        kv.reclaim_ahead = self._drop_ahead
        self._leases = leases
        self._max_num_seqs = max_num_seqs
        self._waiting = Line()  # hold no block here
        self._tickets: dict[RequestId, Ticket] = {}  # of those
        self._arriving: dict[RequestId, Arrival] = {}
        self._here = Line()  # KV complete, waiting for a place in the batch
        self._running: dict[RequestId, Sequence] = {}  # in the order of arrival
        self._offloaded = Line()  # oldest first
        self._gone = near.gone_from_decode  # aborted, perhaps before their KV was handed over
        self._leaving = False
        self._room: dict[InstanceId, int] = {}  # KV blocks that others could still take
        self._num_handed_over = 0  # sequences whose KV waits here for somebody else
        self.num_offloads = 0

    @property
    def queues(self) -> dict[str, int]:
        return {"decode_waiting": self.num_waiting, "decode_running": len(self._running)}

    @property
    def is_empty(self) -> bool:
        """Whether no sequence is here or on its way. What was handed over counts among the leases."""
        places = (self._waiting, self._arriving, self._here, self._running, self._offloaded)
        return not any(places)

    @property
    def num_waiting(self) -> int:
        """Sequences that are here or on their way, and not in the batch."""
        return len(self._waiting) + len(self._arriving) + len(self._here) + len(self._offloaded)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def queued_tokens(self) -> int:
        """Tokens that are expected to be decoded here for the sequences that are here or on their way."""
        in_line = self._waiting.foreseen_tokens + self._here.foreseen_tokens + self._offloaded.foreseen_tokens
        arriving = [arrival.sequence for arrival in self._arriving.values() if arrival.handed_over]
        return in_line + sum(map(foreseen_tokens, arriving)) + sum(map(foreseen_tokens, self._running.values()))

    # ---- what arrives

    def prefilling(self, order: Prefilling) -> None:
        """The first blocks of a sequence that is still prefilled. Taken only where nobody else waits for space."""
        arrival = self._arriving.get(order.request_id)
        if arrival is None and not (self._leaving or order.request_id in self._gone):
            arrival = self._make_room_ahead(order)
        if arrival is None or arrival.handed_over or arrival.sequence.status is Status.FINISHED:
            self._near.out.release(order.ticket)
        else:
            self._pull(arrival, order.ticket)

    def admit(self, order: Prefilled) -> None:
        ticket = order.ticket
        if order.request_id in self._gone:  # if only prefill took it back for a while, it is needed
            self._near.out.retry(order.request_id, "the request was given up here", "moved")
            self._near.out.release(ticket)
            return
        if ticket.holder == self._near.instance:
            sequence = self._leases.claim(ticket.lease)
            if isinstance(sequence, Sequence):  # else it was aborted on the way
                self._here.append(sequence)
            return
        arrival = self._arriving.get(order.request_id)
        if self._near.is_stale(ticket):
            self._near.out.retry(
                order.request_id, f"the KV of the request was lost with {ticket.holder}", "instance_lost"
            )
            self._near.out.release(ticket)
        elif arrival is not None:
            self._take_over(arrival.sequence, order)
            arrival.handed_over = True
            self._pull(arrival, ticket)
        elif self._has(order.request_id):
            self._near.out.release(ticket)
        else:
            self._receive(order)

    def pulled(self, request_id: RequestId, error: Exception | None) -> None:
        """A pull settled: no byte lands any more, whatever the outcome."""
        arrival = self._arriving[request_id]
        sequence, ticket = arrival.sequence, arrival.pulling
        assert ticket is not None, f"a pull of {request_id} settled that was never started"
        arrival.pulling = None
        self._near.out.release(ticket)
        if sequence.status is Status.FINISHED:
            self._forget(arrival)
            return
        if error is None:
            arrival.num_here = max(arrival.num_here, len(ticket.blocks))
            sequence.num_computed = max(sequence.num_computed, ticket.num_tokens)
            self._kv.seal(sequence)
        if arrival.ticket is not None:  # if something that came ahead got lost, it is read again with the rest
            self._pull(arrival, arrival.ticket)
        elif error is None:
            self._settle(arrival)
        else:
            self._forget(arrival)
            if arrival.handed_over:
                message = f"the KV of the request could not be fetched: {error}"
                self._near.out.retry(request_id, message, "transfer_failed")

    def abort(self, request_id: RequestId) -> None:
        self._gone.add(request_id)
        if self._waiting.take(request_id) is not None:
            self._near.out.release(self._tickets.pop(request_id))
        arrival = self._arriving.get(request_id)
        if arrival is not None:
            self._drop(arrival)
        for holding in (
            self._here.take(request_id),
            self._offloaded.take(request_id),
            self._running.pop(request_id, None),
        ):
            if holding is not None:
                self._end(holding)

    def lost(self, instance: InstanceId) -> None:
        """An instance is gone: what waits to be pulled from it will not come."""
        for request_id in [id for id, ticket in self._tickets.items() if ticket.holder == instance]:
            self._near.out.retry(request_id, f"the KV of the request was lost with {instance}", "instance_lost")
            self._waiting.take(request_id)
            del self._tickets[request_id]
        for arrival in [a for a in self._arriving.values() if a.holder == instance and not a.handed_over]:
            self._drop(arrival)

    def leave(self, room: dict[InstanceId, int]) -> None:
        """`room`: KV blocks that others could still take. Sequences go there as far as they fit, from the next schedule
        on, and end here otherwise."""
        self._leaving, self._room = True, dict(room)

    def stay(self) -> None:
        """Takes sequences again."""
        self._leaving, self._room = False, {}

    def give_up_waiting(self) -> None:
        """Those that hold nothing here yet go back to whoever has their KV, who picks anew."""
        while self._waiting:
            self._near.out.decline(self._tickets.pop(self._waiting.pop_first().request_id))

    # ---- schedule, commit

    def schedule(self) -> DecodePlan:
        """The next step. Commit its chunks before the next schedule."""
        if self._leaving:
            self._move_on()
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
        near, kv, tokens = self._near, self._kv, self._near.out.tokens
        for chunk, token in zip(chunks, sampled, strict=True):
            sequence = chunk.sequence
            if sequence.status is not Status.RUNNING:
                continue
            sequence.num_computed += 1
            if sequence.num_computed % kv.block_tokens == 0:  # one more block is full
                kv.seal(sequence)
            sequence.token_ids.append(token.token_id)
            finish = near.finish_of(sequence)
            tokens.append(token_update(sequence, finish, token.logprobs))
            if finish is not None:
                del self._running[sequence.request_id]
                self._end(sequence)

    # ---- leaving

    def _move_on(self) -> None:
        """Gives away what others can take; without any others all goes on here."""
        while self._drop_ahead():
            pass
        if not self._others:
            return
        self.give_up_waiting()  # before anything is handed over, see `_may_wait`
        for sequence in [*self._here, *reversed(self._running.values())]:  # the oldest are soonest at their end
            num_blocks = self._kv.num_blocks_for(len(sequence.token_ids)) + 1
            target = self._roomiest(num_blocks)
            if target is not None:
                self._room[target] -= num_blocks
                self._hand_over(sequence, target)

    @property
    def _others(self) -> list[InstanceId]:
        return [peer.id for peer in self._near.table.serving(Stage.DECODE) if peer.id != self._near.instance]

    def _roomiest(self, num_blocks: int) -> InstanceId | None:
        """Who has most room, if that is enough."""
        target = max(self._others, key=lambda id: self._room.get(id, 0))
        return target if self._room.get(target, 0) >= num_blocks else None

    def _hand_over(self, sequence: Sequence, target: InstanceId) -> None:
        """Leases the KV to another decode instance."""
        if self._running.pop(sequence.request_id, None) is None:
            self._here.take(sequence.request_id)
        sequence.status = Status.LEASED
        self._num_handed_over += 1
        near = self._near
        lease = self._leases.grant(
            target, sequence, lambda: self._let_go(sequence), lambda: self._take_back(sequence, target)
        )
        ticket = near.ticket(lease, "kv", self._kv.computed_blocks(sequence), sequence.num_computed)
        near.out.send(FRONTEND, near.located(sequence.request_id, target))
        near.out.send(target, prefilled(sequence, ticket))

    def _let_go(self, sequence: Sequence) -> None:
        self._num_handed_over -= 1
        self._end(sequence)

    def _take_back(self, sequence: Sequence, target: InstanceId) -> None:
        """It goes on here, after all."""
        self._num_handed_over -= 1
        self._room.pop(target, None)
        if sequence.request_id in self._gone:
            self._end(sequence)
        else:
            self._here.append(sequence)

    def _may_wait(self, holder: InstanceId) -> bool:
        """Whether a sequence whose KV lies at `holder` may wait there for space here. Nobody may where that could close
        a circle: at an instance whose own KV waits for others. And decodes do not stand still for it."""
        near = self._near
        if self._num_handed_over or (self._leaving and self._others):
            return False
        peer = near.table.peers.get(holder)
        if peer is None or Stage.DECODE not in peer.role.stages:
            return True
        return not peer.leaving and not near.serves_here(Stage.PREFILL)

    # ---- inside

    def _has(self, request_id: RequestId) -> bool:
        return any(request_id in place for place in (self._running, self._waiting, self._here, self._offloaded))

    def _receive(self, order: Prefilled) -> None:
        ticket = order.ticket
        sequence = Sequence(order.request_id, [], order.num_prompt_tokens, order.sampling)
        self._take_over(sequence, order)
        if len(sequence.token_ids) > self._kv.max_tokens:
            message = (
                f"the request needs KV space for {len(sequence.token_ids)} tokens, the pool has {self._kv.max_tokens}"
            )
            self._near.out.fail(order.request_id, message, status=400, code="request_too_large")
            self._near.out.release(ticket)
        elif self._may_wait(ticket.holder):
            self._waiting.append(sequence)
            self._tickets[sequence.request_id] = ticket
            self._pull_waiting()
        elif self._waiting or self._offloaded or self._leaving or not self._try_to_begin(sequence, ticket):
            self._near.out.decline(ticket)

    def _take_over(self, sequence: Sequence, order: Prefilled) -> None:
        """What prefill knows of the sequence is known here from now on."""
        sequence.token_ids = order.token_ids
        sequence.num_prompt_tokens = order.num_prompt_tokens
        sequence.sampling = order.sampling
        sequence.rope_delta = order.rope_delta
        sequence.prompt_hashes = order.prompt_hashes

    def _make_room_ahead(self, order: Prefilling) -> Arrival | None:
        """Space for a whole sequence that is not done yet; None where somebody else could need it."""
        nobody = SamplingParams(max_tokens=0, seed=0)  # comes with `Prefilled`
        sequence = Sequence(order.request_id, [], 0, nobody, prompt_hashes=order.prompt_hashes)
        found = self._kv.find(order.prompt_hashes, order.num_tokens)
        num_tokens = order.num_tokens + 1
        if self._waiting or self._offloaded or not self._kv.has_room(sequence, num_tokens, found):
            return None
        return self._begin(sequence, num_tokens, found, order.ticket.holder)

    def _begin(self, sequence: Sequence, num_tokens: int, found: list[int], holder: InstanceId) -> Arrival:
        self._kv.hold(sequence, num_tokens, found)
        sequence.status = Status.LOADING
        arrival = self._arriving[sequence.request_id] = Arrival(sequence, holder, len(found))
        return arrival

    def _pull(self, arrival: Arrival, ticket: Ticket) -> None:
        """Reads what the newest ticket has and is not here. While a pull is under way, the next one waits."""
        out = self._near.out
        if arrival.ticket is not None and arrival.ticket is not ticket:
            out.release(arrival.ticket)
        arrival.ticket = ticket
        if arrival.pulling is not None:
            return
        arrival.ticket = None
        missing = ticket.blocks[arrival.num_here :]
        if missing:
            arrival.pulling = ticket
            here = arrival.sequence.block_table[arrival.num_here : len(ticket.blocks)]
            out.pulls.append(Pull(arrival.sequence.request_id, replace(ticket, blocks=missing), here))
        else:
            out.release(ticket)
        self._settle(arrival)

    def _settle(self, arrival: Arrival) -> None:
        """Moves an arrival on whose KV is complete."""
        sequence = arrival.sequence
        if arrival.handed_over and arrival.pulling is None:
            sequence.num_computed = len(sequence.token_ids) - 1
            self._kv.seal(sequence)
            del self._arriving[sequence.request_id]
            self._here.append(sequence)

    def _drop(self, arrival: Arrival) -> None:
        arrival.sequence.status = Status.FINISHED
        if arrival.pulling is None:  # else its blocks are being written: they are freed when the pull settles
            self._forget(arrival)

    def _forget(self, arrival: Arrival) -> None:
        if arrival.ticket is not None:
            self._near.out.release(arrival.ticket)
        del self._arriving[arrival.sequence.request_id]
        self._end(arrival.sequence)

    def _drop_ahead(self) -> bool:
        """Gives back what the youngest sequence that is still prefilled holds here; it comes again as a whole."""
        for arrival in reversed(self._arriving.values()):
            if not arrival.handed_over and arrival.pulling is None:
                self._forget(arrival)
                return True
        return False

    def _pull_waiting(self) -> None:
        """Begins pulls in arrival order, for as many sequences as fit beside those that are here."""
        while self._waiting and not self._offloaded:
            request_id = self._waiting.first.request_id
            if self._try_to_begin(self._waiting.first, self._tickets[request_id]):
                self._waiting.take(request_id)
                del self._tickets[request_id]
            elif not self._kv.reclaim_waiting():
                break

    def _try_to_begin(self, sequence: Sequence, ticket: Ticket) -> bool:
        num_tokens = len(sequence.token_ids)
        found = self._kv.find(sequence.prompt_hashes, ticket.num_tokens)
        if not self._kv.make_room_for_new(sequence, num_tokens, found):
            return False
        arrival = self._begin(sequence, num_tokens, found, ticket.holder)
        arrival.handed_over = True
        self._pull(arrival, ticket)
        return True

    def _join(self, plan: DecodePlan) -> None:
        """Sequences whose KV is here join the batch. With nothing running, the oldest may push the youngest out."""
        while self._here and len(self._running) < self._max_num_seqs:
            oldest = self._here.first
            while not self._running and len(self._here) > 1 and not self._kv.make_room(oldest, len(oldest.token_ids)):
                self._offload(self._here.pop_last(), plan)
            if not self._kv.make_room(oldest, len(oldest.token_ids)):
                break
            self._run(self._here.pop_first())

    def _run(self, sequence: Sequence) -> None:
        self._kv.hold(sequence, len(sequence.token_ids))
        sequence.status = Status.RUNNING
        self._running[sequence.request_id] = sequence

    def _offload_until_all_can_grow(self, plan: DecodePlan) -> None:
        """Oldest first, every running sequence gets the block for its next token; the youngest pays for it."""
        has_space = self._kv.has_space  # as for most tokens
        for sequence in [sequence for sequence in self._running.values() if not has_space(sequence)]:
            while sequence.status is Status.RUNNING and not self._kv.make_room(sequence, len(sequence.token_ids)):
                self._offload(self._youngest(), plan)
            if sequence.status is Status.RUNNING:
                self._kv.hold(sequence, len(sequence.token_ids))

    def _youngest(self) -> Sequence:
        if self._here:
            return self._here.pop_last()
        return self._running.pop(next(reversed(self._running)))

    def _offload(self, sequence: Sequence, plan: DecodePlan) -> None:
        """Takes the KV of a sequence that was just removed from its queue out of the pool."""
        plan.offloads.append((sequence, self._kv.computed_blocks(sequence)))
        self._kv.free(sequence)
        sequence.status = Status.OFFLOADED
        self._offloaded.put_first(sequence)  # each one is older than those that left before it
        self.num_offloads += 1

    def _restore(self, plan: DecodePlan) -> None:
        while self._offloaded and not plan.offloads and len(self._running) < self._max_num_seqs:
            sequence = self._offloaded.first
            if not self._kv.make_room(sequence, len(sequence.token_ids) + self._kv.block_tokens * len(self._running)):
                break
            self._run(self._offloaded.pop_first())
            plan.restores.append((sequence, self._kv.computed_blocks(sequence)))

    def _reserve_growth(self) -> None:
        """What newcomers must leave alone: one block per running sequence, and the way back of the oldest offloaded."""
        wanted = len(self._running)
        if self._offloaded:
            wanted += self._kv.num_missing(self._offloaded.first, len(self._offloaded.first.token_ids))
        self._kv.growth_reserve = wanted

    def _end(self, sequence: Sequence) -> None:
        self._kv.free(sequence)
        sequence.status = Status.FINISHED
        sequence.offloaded = None
