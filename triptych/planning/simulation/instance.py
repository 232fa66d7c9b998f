"""One simulated instance: the engine's loop over the real stages and pools, on simulated time.

It makes the same steps as `engine.engine.Engine`: messages are taken between two steps, and what a step's forward would
take comes from a cost model. Decode steps in which nothing can change are made in one event, with the same outcome.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from triptych.config import EMBEDDING_BLOCK_TOKENS, ENCODE_NICENESS, ITEMS_AT_HAND, KV_BLOCK_TOKENS
from triptych.core import Chunk, EncodeWork, InstanceId, RequestId, Role, Stage
from triptych.engine.pace import Metronome, Pace
from triptych.engine.reports import load_of
from triptych.errors import InstanceError
from triptych.memory.embedding_cache import EmbeddingCache
from triptych.memory.kv_cache import KVCache
from triptych.memory.leases import Leases
from triptych.memory.pools import Pools
from triptych.messages import FRONTEND, AnyMessage, Evicted, Load, Peer, Tokens
from triptych.planning.costs.cost_model import Costs
from triptych.planning.costs.sizes import Sizes
from triptych.planning.simulation.clock import Clock, Event
from triptych.planning.simulation.host import Host, Job, weight_of
from triptych.planning.simulation.rows import TOKEN, DecodeRow, StepTimes, num_left
from triptych.planning.workloads.demand import Item
from triptych.routing import RoutingTable
from triptych.stages.base import Pull, Surroundings
from triptych.stages.group import StageGroup

Mail = list[tuple[InstanceId, AnyMessage]]  # sent together, so it arrives together, in this order


class Network(Protocol):
    """What an instance stands in: where messages and pulls go (`deliver` and `settled` are called in their own time),
    and who is told how long it computed."""

    @property
    def items(self) -> Mapping[bytes, Item]: ...
    @property
    def follows_tokens(self) -> bool: ...  # one by one; else later ones may stand for them
    def send(self, mail: Mail, /) -> None: ...
    def pull(self, reader: "SimulatedInstance", pull: Pull, /) -> None: ...
    def computed(self, instance: "SimulatedInstance", what: str, began_s: float, size: int, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Leave:
    """The order to leave the role; `drained` is called once, when nothing of it is left."""

    room: dict[InstanceId, int]
    drained: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Settled:
    """A pull that is over."""

    pull: Pull
    error: InstanceError | None


@dataclass(slots=True)
class Work:
    """What an instance has done: CPU seconds of each of its threads in the steps of each stage, with what crowding
    added, without waking; how many of them were the first after a rest or a step of another stage; and turns that
    computed nothing."""

    steps_s: dict[Stage, float] = field(default_factory=lambda: dict.fromkeys(Stage, 0.0))
    pixels_s: float = 0.0  # of those that encode, what hangs on the size of sources, without crowding
    riding_s: float = 0.0  # of those that prefill, what decodes add to them, without crowding
    wakes: dict[Stage, int] = field(default_factory=lambda: dict.fromkeys(Stage, 0))
    turns: int = 0


class SimulatedInstance:
    """Stages, pools and the loop of one instance. `become` changes its role."""

    def __init__(
        self,
        id: InstanceId,
        epoch: str,
        role: Role,
        costs: Costs,
        sizes: Sizes,
        clock: Clock,
        network: Network,
        host: Host | None,
    ) -> None:
        """`host`: whose cores it shares; None: it has a device of its own."""
        self.id = id
        self._costs = costs
        self._clock = clock
        self._network = network
        self._host = host
        self._inbox: list[AnyMessage | Settled | Leave | RoutingTable] = []
        self._busy = False  # a step is under way, the next turn is on its way, or it changes its role
        self._gone = False
        self._next: Event | None = None  # what it did last, or does next, by itself
        self._job: Job | None = None  # the last one on the host
        self._working_on: list[RequestId] = []  # in the step that is under way
        self._owed_s = 0.0  # what cold caches, and KV that went to host memory and back, take of the next step
        self.work = Work()
        self._warm_for: Stage | None = None  # that of its last step, unless it has rested since
        self._leave: Leave | None = None
        self._row: DecodeRow | None = None
        self._heard_of: frozenset[RequestId] = frozenset()  # of which tokens have said that they are decoded here
        self._wake: Event | None = None
        self._pulls: dict[int, Pull] = {}  # under way, by identity
        self._num_roles = 0
        self._reported_at = -sizes.heartbeat_s
        self._was_busy = False
        self.pace = Pace()
        self.near = Surroundings(id, epoch=epoch)
        self._install(role, sizes)

    def leave(self, leave: Leave) -> None:
        """Takes no new work from the end of the present step on. From when it is drained until `become` it does
        nothing."""
        self._hear(leave)

    def become(self, role: Role, sizes: Sizes) -> None:
        """Fresh pools and stages; what it knows of its surroundings and its pace stays. It has been drained."""
        self.check_integrity()
        self._install(role, sizes)
        self._busy = False
        if self._inbox:
            self._news()

    def kill(self) -> list[RequestId]:
        """From now on it does nothing and says nothing but the tokens of steps that it has made. Returns those that it
        was working on, as its black box would have them."""
        suspects = self._working_on if self._busy else []
        if self._job is not None and self._host is not None:
            self._host.cancel(self._job)
        for event in (self._next, self._wake):
            if event is not None:
                event.cancel()
        row, self._row = self._row, None
        if row is not None:
            self._say_what_is_done(row)
        self._gone = self._busy = True  # for ever: nothing begins any more
        return suspects

    def _install(self, role: Role, sizes: Sizes) -> None:
        self.role, self.sizes = role, sizes
        self._num_roles += 1
        # A late release never meets a lease of the next role.
        self.pools = Pools(Leases(first_id=self._num_roles << 32))
        if role.has_language_model:
            self.pools.kv = KVCache(sizes.num_kv_blocks, KV_BLOCK_TOKENS, prefix_caching=sizes.prefix_caching)
        if role.encodes or Stage.PREFILL in role.stages:
            self.pools.embeddings = EmbeddingCache(sizes.num_embedding_blocks, EMBEDDING_BLOCK_TOKENS)
        self.stages = StageGroup(role, self.near, self.pools, sizes.scheduling)
        self._weight = weight_of(ENCODE_NICENESS if role is Role.E else 0)
        self._at_hand: OrderedDict[bytes, None] = OrderedDict()
        self._metronome = Metronome(sizes.decode_interval_ms / 1e3)
        self._heard_of = frozenset()

    @property
    def is_drained(self) -> bool:
        """Whether nobody relies on it in its present role: no work, no lease, no pull."""
        return self.stages.is_empty and not self._pulls

    def check_integrity(self) -> None:
        """At rest: nothing is held any more."""
        self.pools.check_integrity()
        load = self.load()
        for pool in load.pools.values():
            assert pool.used == 0, f"{self.id} at rest: {pool}"
        assert self.is_drained, f"{self.id} at rest: {load.queues}, {len(self._pulls)} pulls"

    # ---- what arrives

    def deliver(self, message: AnyMessage) -> None:
        if self._gone:
            return
        if not isinstance(message, Load):
            self._hear(message)
        elif self._busy or self._row is not None or self._costs.turn:
            self._inbox.append(message)
            if self._row is None:  # no decode step hangs on how busy others are
                self._news()
        else:  # nor does anything else that could begin now
            self.near.take_load(message)
            self._report(busy=self._decode_wait_s() > 0)

    def settled(self, pull: Pull, error: InstanceError | None = None) -> None:
        """A pull of this instance is over. Said twice, it was over before."""
        if self._pulls.pop(id(pull), None) is not None:
            self._hear(Settled(pull, error))

    def take_table(self, table: RoutingTable) -> None:
        self._hear(table)

    def _hear(self, item: AnyMessage | Settled | Leave | RoutingTable) -> None:
        self._inbox.append(item)
        self._news()

    def _news(self) -> None:
        """Taken at the end of the step that runs now; at once if there is none."""
        if self._row is not None:
            self._cut(self._row)
        elif not self._busy:
            self._busy = True
            self._later(0.0, self._turn)

    def _later(self, seconds: float, action: Callable[..., None], *arguments: Any) -> None:
        self._next = self._clock.after(seconds, action, *arguments)

    def _compute(
        self,
        seconds: float,
        done: Callable[..., None],
        *arguments: Any,
        threads: int | None = None,
        crowding: float = 0.0,
    ) -> None:
        """So long, on as many cores as it has threads, or on a device of its own."""
        if self._host is None:
            self._later(seconds, done, *arguments)
            return
        threads = threads or self._costs.threads  # the system is fair to threads
        weight = self._weight * threads
        self._job = self._host.run(seconds * threads, weight, done, *arguments, threads=threads, crowding=crowding)

    def _step(self, stage: Stage, seconds: float, done: Callable[..., None], *arguments: Any) -> None:
        """Computes a step, with what it owes, what cold caches add to it, and others that work beside it. `done` gets
        the arguments, and when it began."""
        self._wake_up(stage)
        self.work.steps_s[stage] += seconds
        seconds += self._take_owed_s()
        if self._host is None:
            self._later(seconds, done, *arguments, self._clock.now)
        else:
            crowding = self._costs.crowding(stage)
            self._compute(seconds, self._stepped, stage, done, *arguments, self._clock.now, crowding=crowding)

    def _stepped(self, stage: Stage, done: Callable[..., None], *arguments: Any) -> None:
        assert self._job is not None
        self.work.steps_s[stage] += self._job.crowded_s / self._job.threads
        done(*arguments)

    def _receive(self) -> None:
        if not self._inbox:
            return
        inbox, self._inbox = self._inbox, []
        for item in inbox:
            if isinstance(item, Load):
                self.near.take_load(item)
            elif isinstance(item, Settled):
                self.stages.pulled(item.pull.key, item.error)
            elif isinstance(item, Leave):
                self._leave = item
                self.stages.leave(item.room)
            elif isinstance(item, RoutingTable):
                self._take_table(item)
            else:
                taken = self.stages.take(item)
                assert taken, f"{self.id} cannot take a {type(item).__name__}"

    def _take_table(self, table: RoutingTable) -> None:
        """As the engine: what is gone is read from no more."""
        near, before = self.near, self.near.table
        near.table = table
        self.stages.table_changed(before)
        gone = [peer.id for peer in before.peers.values() if self._is_gone(peer, table)]
        for instance in gone:
            near.decode_loads.pop(instance, None)
            for pull in [pull for pull in self._pulls.values() if pull.ticket.holder == instance]:
                del self._pulls[id(pull)]
                self.stages.pulled(pull.key, InstanceError(f"instance {instance} was lost"))
            self.stages.lost(instance)

    def _is_gone(self, before: Peer, table: RoutingTable) -> bool:
        """An address is that of one process."""
        now = table.peers.get(before.id)
        return before.id != self.id and (now is None or now.address != before.address)

    # ---- the loop

    def _turn(self) -> None:
        self._receive()
        works = self.stages.schedule_encode(self.pace.of(Stage.ENCODE), self.sizes.max_encode_tokens)
        if works:
            self._flush()
            assert self.stages.encode is not None
            self._working_on = list(self.stages.encode.running_requests)
            read = self._read(works)
            self.work.pixels_s += self._costs.pixels_s(read)
            self._step(Stage.ENCODE, self._costs.encode_s(works, read), self._encoded, works)
        else:
            self._speak(encoded=False)

    def _read(self, works: list[EncodeWork]) -> list[Item]:
        """Items that have to be read for a step: the encoder keeps the last few at hand."""
        read: list[Item] = []
        for media in {work.media.hash: work.media for work in works}.values():
            item = self._network.items.get(media.hash)  # None: the request ended while it was on its way
            if media.hash not in self._at_hand and item is not None:
                read.append(item)
            self._at_hand[media.hash] = None
            self._at_hand.move_to_end(media.hash)
            if len(self._at_hand) > ITEMS_AT_HAND:
                self._at_hand.popitem(last=False)
        return read

    def _encoded(self, works: list[EncodeWork], began_s: float) -> None:
        assert self.stages.encode is not None
        self.pace.observe(Stage.ENCODE, sum(work.unit.num_tokens for work in works), self._clock.now - began_s)
        self._network.computed(self, "encode", began_s, len(works))
        self.stages.encode.commit(works, [None] * len(works))
        self._flush()
        self._speak(encoded=True)

    def _speak(self, *, encoded: bool) -> None:
        decodes = self._schedule_decode()
        chunks: list[Chunk] = []
        if self.stages.prefill is not None:
            chunks = self.stages.prefill.schedule(self.sizes.max_num_batched_tokens - len(decodes))
        if chunks or decodes:
            self._flush()
            self._working_on = [chunk.sequence.request_id for chunk in [*decodes, *chunks]]
        if chunks:
            self.work.riding_s += self._costs.sequences_s(decodes)
            self._step(Stage.PREFILL, self._costs.language_s(decodes, chunks), self._spoken, decodes, chunks)
        elif decodes:
            self._begin_decodes(decodes)
        else:
            self._end_turn(busy=encoded)

    def _schedule_decode(self) -> list[Chunk]:
        if self.stages.decode is None or self._decode_wait_s() > 0:
            return []
        plan = self.stages.decode.schedule()
        for _, blocks in itertools.chain(plan.offloads, plan.restores):
            self._owed_s += self._costs.offload_s(len(blocks) * KV_BLOCK_TOKENS)
        self._metronome.stepped((chunk.sequence.request_id for chunk in plan.chunks), self._clock.now)
        return plan.chunks

    def _take_owed_s(self) -> float:
        owed_s, self._owed_s = self._owed_s, 0.0
        return owed_s

    def _decode_wait_s(self) -> float:
        """How long the next decode step is held back, as the engine does while a request waits for encoders."""
        decode, prefill = self.stages.decode, self.stages.prefill
        if not self.sizes.decode_interval_ms or decode is None or prefill is None:
            return 0.0
        if not decode.num_running or not prefill.awaits_embeddings:
            return 0.0
        return max(0.0, self._metronome.wait_s(self._clock.now))

    def _spoken(self, decodes: list[Chunk], chunks: list[Chunk], began_s: float) -> None:
        assert self.stages.prefill is not None
        num_tokens = len(decodes) + sum(chunk.length for chunk in chunks)
        self.pace.observe(Stage.PREFILL, num_tokens, self._clock.now - began_s)
        self._network.computed(self, "mixed" if decodes else "prefill", began_s, len(decodes) + len(chunks))
        if self.stages.decode is not None:
            self.stages.decode.commit(decodes, [TOKEN] * len(decodes))
        self.stages.prefill.commit(chunks, [TOKEN for chunk in chunks if chunk.samples])
        self._end_turn(busy=True)

    def _end_turn(self, *, busy: bool) -> None:
        """A turn that computed nothing took its time as well, before what comes of it goes out."""
        if busy:
            self._rest(busy)
            return
        self.work.turns += 1
        seconds = self._costs.turn + self._take_owed_s()
        if seconds:
            self._compute(seconds, self._rest, False, threads=1)
        else:
            self._rest(busy)

    def _wake_up(self, stage: Stage) -> None:
        if self._warm_for is not stage:
            self._warm_for = stage
            self.work.wakes[stage] += 1
            self._owed_s += self._costs.wake

    def _rest(self, busy: bool) -> None:
        self._flush()
        self._busy = busy or bool(self._inbox)
        if not self._busy:
            self._warm_for = None
        wait_s = self._decode_wait_s()
        self._report(busy=busy or wait_s > 0)
        if self._leave is not None and self.is_drained and not self._inbox:
            leave, self._leave = self._leave, None
            self._busy = True
            leave.drained()
        elif self._busy and self._host is None and self._clock.is_quiet:
            self._turn()
        elif self._busy:
            self._later(0.0, self._turn)
        elif wait_s > 0:
            self._wake_in(wait_s)

    def _wake_in(self, seconds: float) -> None:
        if self._wake is not None:
            self._wake.cancel()
        self._wake = self._clock.after(seconds, self._news)

    # ---- decode steps in a row

    def _begin_decodes(self, chunks: list[Chunk]) -> None:
        context = sum([chunk.start for chunk in chunks])
        if self._host is None:
            left = num_left(chunks)
            self._begin_row(chunks, context, left, self._silent_steps(chunks, left))
        else:  # one step after the other: others change how long it takes
            self._step(Stage.DECODE, self._costs.decode_s(len(chunks), context), self._decoded_once, chunks)

    def _begin_row(self, chunks: list[Chunk], context: int, left: list[int], silent: list[int]) -> None:
        self._wake_up(Stage.DECODE)
        owed_s = self._take_owed_s()
        times = StepTimes(self._costs.decode_s(len(chunks), context), self._costs.decode_growth_s(len(chunks)))
        num_steps = 1 if owed_s else self._num_equal_steps(times, len(chunks), min(left))
        self._row = DecodeRow(times, self._clock.now + owed_s, chunks, context, num_steps, left, silent)
        self._later(times.seconds(num_steps) + owed_s, self._decoded)

    def _decoded_once(self, chunks: list[Chunk], began_s: float) -> None:
        assert self.stages.decode is not None
        self.pace.observe(Stage.DECODE, len(chunks), self._clock.now - began_s)
        self._network.computed(self, "decode", began_s, len(chunks))
        self.stages.decode.commit(chunks, [TOKEN] * len(chunks))
        self._end_turn(busy=True)

    def _silent_steps(self, chunks: list[Chunk], left: list[int]) -> list[int]:
        """For how many steps nobody has to hear of each of them: until it ends, but for those of which nobody knows yet
        that they are decoded here, or if tokens are followed."""
        if self._network.follows_tokens:
            return [0] * len(chunks)
        known, ids = self._heard_of, [chunk.sequence.request_id for chunk in chunks]
        silent = [number - 1 if id in known else 0 for id, number in zip(ids, left, strict=True)]
        self._heard_of = frozenset(ids)
        return silent

    def _num_equal_steps(self, times: StepTimes, num_sequences: int, most: int) -> int:
        """How many steps, of at most `most`, would go as this one unless something arrives: nobody joins, leaves, is
        short of a block, or has to report before the last of them."""
        assert self.pools.kv is not None
        tokens_take_time = self._costs.server_step or self._costs.server_token
        if not self._others_are_idle or self._leave is not None or tokens_take_time:
            return 1  # among others where tokens keep the server busy, one step after the other
        until_report = self._reported_at + self.sizes.heartbeat_s - self._clock.now
        if until_report <= times.first_s:
            return 1
        most = min(most, max(1, self.pools.kv.num_available // num_sequences * KV_BLOCK_TOKENS))
        return times.first_after(until_report, most)

    @property
    def _others_are_idle(self) -> bool:
        """The stages beside decode."""
        encode, prefill = self.stages.encode, self.stages.prefill
        return (encode is None or encode.is_empty) and (prefill is None or prefill.is_empty)

    def _cut(self, row: DecodeRow) -> None:
        """Something arrived: the step that runs now is the last one of the row."""
        if row.num_steps == 1:
            return
        num_steps = row.num_begun(self._clock.now - row.began_s)
        if num_steps < row.num_steps:
            assert self._next is not None
            self._next.cancel()
            row.num_steps = num_steps
            ends_at = row.began_s + row.times.seconds(num_steps)
            self._later(max(ends_at - self._clock.now, 0.0), self._decoded)

    def _decoded(self) -> None:
        row, self._row = self._row, None
        assert row is not None
        self._network.computed(self, "decode", row.began_s, len(row.chunks))
        self.pace.observe_row(Stage.DECODE, len(row.chunks), row.num_steps, row.times.first_s, row.times.more_s)
        self._make(row, row.num_steps)
        if self._goes_on(row):
            self._flush()
            self._report(busy=True)
            self._metronome.stepped(self._working_on, self._clock.now)
            left = [number - row.num_steps for number in row.left]
            silent = row.silent if self._network.follows_tokens else [number - 1 for number in left]
            self._begin_row(row.chunks, row.context + row.num_steps * len(row.chunks), left, silent)
        else:
            self._end_turn(busy=True)

    def _goes_on(self, row: DecodeRow) -> bool:
        """Whether it ended only to be reported: a turn would begin with the same sequences again."""
        decode, kv = self.stages.decode, self.pools.kv
        assert decode is not None and kv is not None
        if self._inbox or self._leave is not None or not self._clock.is_quiet or self.near.out.messages:
            return False
        same = decode.num_running == len(row.chunks) and not decode.num_waiting
        return same and self._others_are_idle and kv.num_available >= len(row.chunks)

    def _say_what_is_done(self, row: DecodeRow) -> None:
        """Of a row that breaks off. The engine would have said each token as it came."""
        num_steps = row.num_done(self._clock.now - row.began_s)
        if num_steps:
            self._make(row, num_steps)
            self._flush()

    def _make(self, row: DecodeRow, num_steps: int) -> None:
        assert self.stages.decode is not None and self.pools.kv is not None
        self.work.steps_s[Stage.DECODE] += row.times.seconds(num_steps)
        said = row.catch_up(self.pools.kv, num_steps)
        self.stages.decode.commit(said, [TOKEN] * len(said))

    # ---- what leaves

    def _flush(self) -> None:
        out = self.near.out
        mail: Mail = []
        if out.tokens:
            mail.append((FRONTEND, Tokens(self.id, out.tokens)))
            out.tokens = []
        if out.messages:
            messages, out.messages = out.messages, []
            for to, message in messages:
                if to == self.id:
                    self._inbox.append(message)
                elif to == FRONTEND or to in self.near.table.peers:
                    mail.append((to, message))
                else:
                    mail += self.stages.undelivered(message)
        if mail:
            self._network.send(mail)
        if out.pulls:
            pulls, out.pulls = out.pulls, []
            for pull in pulls:
                self._pulls[id(pull)] = pull
                self._network.pull(self, pull)

    def _report(self, *, busy: bool) -> None:
        """Once a heartbeat, and at once when the last work is done."""
        fell_idle, self._was_busy = self._was_busy and not busy, busy
        due = self._clock.now - self._reported_at >= self.sizes.heartbeat_s
        if not fell_idle and not due:
            return
        if due:
            self._reported_at = self._clock.now
        load = self.load()
        mail: Mail = [(FRONTEND, load)]
        units, blocks = self.pools.take_evicted_units(), self.pools.take_evicted_blocks()
        if units or blocks:
            mail.append((FRONTEND, Evicted(self.id, units, blocks)))
        if Stage.DECODE in load.work_s:
            self.near.take_load(load)
            mail += [(peer.id, load) for peer in self.near.table.serving(Stage.PREFILL) if peer.id != self.id]
        self._network.send(mail)

    def load(self) -> Load:
        return load_of(self.near, self.stages, self.pools, self.pace, self.pace.counters)
