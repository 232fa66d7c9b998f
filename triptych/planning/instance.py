"""One simulated instance: the engine's loop over the real stages and pools, on simulated time.

It makes the same steps as `engine.engine.Engine`: messages are taken between two steps, and what a step's forward would
take comes from a cost model. Decode steps in which nothing can change are made in one event, with the same outcome.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from triptych.config import EMBEDDING_BLOCK_TOKENS, KV_BLOCK_TOKENS
from triptych.core import Chunk, EncodeWork, InstanceId, Role, SampledToken, Stage
from triptych.engine.pace import Pace
from triptych.memory.embedding_cache import EmbeddingCache, EmbeddingShare
from triptych.memory.kv_cache import KVCache
from triptych.memory.leases import Leases
from triptych.messages import (
    FRONTEND,
    Abort,
    AnyMessage,
    Declined,
    Embedded,
    Encode,
    Load,
    Prefilled,
    Prefilling,
    Release,
    Share,
    Submit,
    Tokens,
    Wanted,
)
from triptych.planning.clock import Clock, Event
from triptych.planning.cost_model import Costs
from triptych.stages.base import Pull, Surroundings, turn_away
from triptych.stages.decode import DecodeStage
from triptych.stages.encode import EncodeStage
from triptych.stages.prefill import PrefillStage

SHORT_ENCODE_STEP_S = 0.02  # as the engine
ENCODE_SHARE = 0.5  # of an embedding cache that encode and prefill use together, as the engine
TOKEN = SampledToken(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Pools and bounds of an instance. The names are those of the configuration."""

    num_kv_blocks: int = 20_000
    num_embedding_blocks: int = 4_000
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    max_encode_tokens: int = 1024
    streamed_prefill: bool = True
    chunked_kv_transfer: bool = True
    heartbeat_s: float = 0.25


class Network(Protocol):
    """Where messages and pulls go; it calls `deliver` and `settled` in its own time."""

    def send(self, sender: InstanceId, to: InstanceId, message: AnyMessage, /) -> None: ...
    def pull(self, reader: "SimulatedInstance", pull: Pull, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Leave:
    """The order to leave the role; `drained` is called once, when nothing of it is left."""

    room: dict[InstanceId, int]
    drained: Callable[[], None]


@dataclass(slots=True, eq=False)
class DecodeRun:
    """Decode steps over the same sequences, the last of which ends with `end`."""

    began_s: float
    chunks: list[Chunk]
    context: int
    num_steps: int
    end: Event


class SimulatedInstance:
    """Stages, pools and the loop of one instance. `become` changes its role."""

    def __init__(self, id: InstanceId, role: Role, costs: Costs, sizes: Sizes, clock: Clock, network: Network) -> None:
        self.id = id
        self._costs = costs
        self._sizes = sizes
        self._clock = clock
        self._network = network
        self._inbox: list[AnyMessage | Pull | Leave] = []
        self._busy = False  # a step is under way, the next turn is on its way, or it changes its role
        self._leave: Leave | None = None
        self._run: DecodeRun | None = None
        self._num_pulls = 0
        self._num_roles = 0
        self._reported_at = -sizes.heartbeat_s
        self._was_busy = False
        self.pace = Pace()
        self.near = Surroundings(id, epoch="1")
        self._install(role)

    def leave(self, leave: Leave) -> None:
        """Takes no new work from the end of the present step on. From when it is drained until `become` it does
        nothing."""
        self._inbox.append(leave)
        self._news()

    def become(self, role: Role) -> None:
        """Fresh pools and stages; what it knows of its surroundings and its pace stays. It has been drained."""
        self.check_integrity()
        self._install(role)
        self._busy = False
        if self._inbox:
            self._news()

    def _install(self, role: Role) -> None:
        sizes = self._sizes
        self.role = role
        near = self.near
        self._num_roles += 1
        self.leases = Leases(first_id=self._num_roles << 32)  # a late release never meets a lease of the next role
        self.kv = KVCache(sizes.num_kv_blocks if role.has_language_model else 0, KV_BLOCK_TOKENS, prefix_caching=False)
        stages = role.stages
        prefills = Stage.PREFILL in stages
        self.embeddings = EmbeddingCache(
            sizes.num_embedding_blocks if role.encodes or prefills else 0, EMBEDDING_BLOCK_TOKENS
        )
        share = int(sizes.num_embedding_blocks * (ENCODE_SHARE if role.encodes and prefills else 1.0))
        self.encode = self.prefill = self.decode = None
        if role.encodes:
            self.encode = EncodeStage(near, EmbeddingShare(self.embeddings, share), self.leases)
        if prefills:
            self.prefill = PrefillStage(
                near,
                self.kv,
                EmbeddingShare(self.embeddings, share),
                self.leases,
                max_num_seqs=sizes.max_num_seqs,
                streamed=sizes.streamed_prefill and not role.encodes,
                chunked_transfer=sizes.chunked_kv_transfer,
            )
        if Stage.DECODE in stages:
            self.decode = DecodeStage(near, self.kv, self.leases, max_num_seqs=sizes.max_num_seqs)

    @property
    def is_drained(self) -> bool:
        """Whether nobody relies on it in its present role: no work, no lease, no pull."""
        stages = (self.encode, self.prefill, self.decode)
        is_empty = all(stage is None or stage.is_empty for stage in stages)
        return is_empty and not len(self.leases) and not self._num_pulls

    def check_integrity(self) -> None:
        """At rest: nothing is held any more."""
        for pool in (self.kv, self.embeddings):
            pool.check_integrity()
            assert pool.usage().used == 0, f"{self.id} at rest: {pool.usage()}"
        assert self.is_drained, f"{self.id} at rest: {self.load().queues}, {self._num_pulls} pulls"

    # ---- what arrives

    def deliver(self, message: AnyMessage) -> None:
        self._inbox.append(message)
        self._news()

    def settled(self, pull: Pull) -> None:
        """A pull of this instance is done."""
        self._num_pulls -= 1
        self._inbox.append(pull)
        self._news()

    def _news(self) -> None:
        """Taken at the end of the step that runs now; at once if there is none."""
        if self._run is not None:
            self._cut(self._run)
        elif not self._busy:
            self._busy = True
            self._clock.after(0.0, self._turn)

    def _receive(self) -> None:
        inbox, self._inbox = self._inbox, []
        for item in inbox:
            if isinstance(item, Pull):
                self._settle(item)
            elif isinstance(item, Leave):
                self._begin_to_leave(item)
            else:
                self._handle(item)

    def _settle(self, pull: Pull) -> None:
        if pull.ticket.region == "kv":
            assert self.decode is not None
            self.decode.pulled(pull.key, None)  # type: ignore[arg-type]
        else:
            assert self.prefill is not None
            self.prefill.pulled(pull.key, None)  # type: ignore[arg-type]

    def _handle(self, message: AnyMessage) -> None:
        match message:
            case Release():
                self.leases.release(message.lease)
            case Load():
                self._take_load(message)
            case Encode() if self.encode is not None:
                self.encode.admit(message)
            case Submit() if self.prefill is not None:
                self.prefill.admit(message)
            case Embedded() if self.prefill is not None:
                self.prefill.embedded(message)
            case Wanted() if self.prefill is not None:
                self.prefill.wanted(message)
            case Share() if self.prefill is not None:
                self.prefill.share(message)
            case Prefilling() if self.decode is not None:
                self.decode.prefilling(message)
            case Prefilled() if self.decode is not None:
                self.decode.admit(message)
            case Abort():
                for stage in (self.encode, self.prefill, self.decode):
                    if stage is not None:
                        stage.abort(message.request_id)
            case Declined():
                self.leases.decline(message.lease)
            case _:
                turn_away(self.near, message)

    def _begin_to_leave(self, order: Leave) -> None:
        self._leave = order
        if self.encode is not None:
            self.encode.leave()
        if self.prefill is not None:
            self.prefill.leave()
        if self.decode is not None:
            self.decode.leave(order.room)

    def _take_load(self, message: Load) -> None:
        self.near.decode_loads[message.instance] = message.work_s[Stage.DECODE]
        self.near.decode_pace_s = message.pace_s[Stage.DECODE]

    # ---- the loop

    def _turn(self) -> None:
        self._receive()
        works = self.encode.schedule(self._encode_budget()) if self.encode is not None else []
        self._flush()
        if works:
            seconds = self._costs.encode_s(works)
            self._clock.after(seconds, self._encoded, works, seconds)
        else:
            self._speak(encoded=False)

    def _encoded(self, works: list[EncodeWork], seconds: float) -> None:
        assert self.encode is not None
        self.pace.observe(Stage.ENCODE, sum(work.unit.num_tokens for work in works), seconds)
        self.encode.commit(works, [None] * len(works))
        self._flush()
        self._speak(encoded=True)

    def _encode_budget(self) -> int:
        """As the engine: a quarter of the time that all that waits takes."""
        assert self.encode is not None
        pace, step_s = self.pace.of(Stage.ENCODE), SHORT_ENCODE_STEP_S
        if self.decode is None or not self.decode.num_running:
            step_s = max(step_s, 0.25 * self.encode.queued_tokens * pace)
        return min(self._sizes.max_encode_tokens, int(step_s / max(pace, 1e-9)))

    def _speak(self, *, encoded: bool) -> None:
        decodes: list[Chunk] = []
        if self.decode is not None:
            decodes = self.decode.schedule().chunks
        chunks: list[Chunk] = []
        if self.prefill is not None:
            chunks = self.prefill.schedule(self._sizes.max_num_batched_tokens - len(decodes))
        self._flush()
        if chunks:
            seconds = self._costs.language_s(decodes, chunks)
            self._clock.after(seconds, self._spoken, decodes, chunks, seconds)
        elif decodes:
            self._begin_decodes(decodes)
        else:
            self._end_turn(busy=encoded)

    def _spoken(self, decodes: list[Chunk], chunks: list[Chunk], seconds: float) -> None:
        assert self.prefill is not None
        self.pace.observe(Stage.PREFILL, len(decodes) + sum(chunk.length for chunk in chunks), seconds)
        if self.decode is not None:
            self.decode.commit(decodes, [TOKEN] * len(decodes))
        self.prefill.commit(chunks, [TOKEN for chunk in chunks if chunk.samples])
        self._flush()
        self._end_turn(busy=True)

    def _end_turn(self, *, busy: bool) -> None:
        self._busy = busy or bool(self._inbox)
        self._report(busy)
        if self._leave is not None and self.is_drained and not self._inbox:
            leave, self._leave = self._leave, None
            self._busy = True
            leave.drained()
        elif self._busy:
            self._clock.after(0.0, self._turn)

    # ---- decode steps in a row

    def _begin_decodes(self, chunks: list[Chunk]) -> None:
        context = sum(chunk.start for chunk in chunks)
        num_steps = self._num_equal_steps(chunks, context)
        seconds = self._costs.decodes_s(len(chunks), context, num_steps)
        end = self._clock.after(seconds, self._decoded)
        self._run = DecodeRun(self._clock.now, chunks, context, num_steps, end)

    def _num_equal_steps(self, chunks: list[Chunk], context: int) -> int:
        """How many steps would go as this one unless something arrives: nobody joins, leaves, is short of a block, or
        has to report before the last of them."""
        assert self.decode is not None
        others_idle = all(stage is None or stage.is_empty for stage in (self.encode, self.prefill))
        if not others_idle or self._leave is not None:
            return 1
        num_steps = min(chunk.sequence.sampling.max_tokens - chunk.sequence.num_output_tokens for chunk in chunks)
        usage = self.kv.usage()
        num_steps = min(num_steps, max(1, (usage.free + usage.cached) // len(chunks) * KV_BLOCK_TOKENS))
        until_report = self._reported_at + self._sizes.heartbeat_s - self._clock.now
        return self._first_step_after(until_report, len(chunks), context, num_steps)

    def _first_step_after(self, seconds: float, num_sequences: int, context: int, num_steps: int) -> int:
        """The least number of steps that take so long, of at most `num_steps`."""
        low, high = 1, num_steps
        while low < high:
            middle = (low + high) // 2
            if self._costs.decodes_s(num_sequences, context, middle) >= seconds:
                high = middle
            else:
                low = middle + 1
        return low

    def _cut(self, run: DecodeRun) -> None:
        """Something arrived: the step that runs now is the last one of the run."""
        elapsed = self._clock.now - run.began_s
        num_steps = self._first_step_after(elapsed, len(run.chunks), run.context, run.num_steps)
        if num_steps < run.num_steps:
            run.end.cancel()
            run.num_steps = num_steps
            ends_at = run.began_s + self._costs.decodes_s(len(run.chunks), run.context, num_steps)
            run.end = self._clock.at(max(ends_at, self._clock.now), self._decoded)

    def _decoded(self) -> None:
        run, self._run = self._run, None
        assert run is not None and self.decode is not None
        for done in range(run.num_steps):
            num_sequences = len(run.chunks)
            seconds = self._costs.decodes_s(num_sequences, run.context + done * num_sequences, 1)
            self.pace.observe(Stage.DECODE, num_sequences, seconds)
        if run.num_steps > 1:
            self._catch_up(run.chunks, run.num_steps - 1)
        self.decode.commit(run.chunks, [TOKEN] * len(run.chunks))
        self._flush()
        self._end_turn(busy=True)

    def _catch_up(self, chunks: list[Chunk], num_steps: int) -> None:
        """All steps of a run but the last, of which the stage is not told: only these books change in them."""
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.token_ids += [TOKEN.token_id] * num_steps
            sequence.num_computed += num_steps
            self.kv.hold(sequence, len(sequence.token_ids))

    # ---- what leaves

    def _flush(self) -> None:
        out = self.near.out
        if out.tokens:
            self._network.send(self.id, FRONTEND, Tokens(self.id, out.tokens))
            out.tokens = []
        if out.messages:
            messages, out.messages = out.messages, []
            for to, message in messages:
                if to == self.id:
                    self._inbox.append(message)
                else:
                    self._network.send(self.id, to, message)
        if out.pulls:
            pulls, out.pulls = out.pulls, []
            for pull in pulls:
                self._num_pulls += 1
                self._network.pull(self, pull)

    def _report(self, busy: bool) -> None:
        """Once a heartbeat, and at once when the last work is done."""
        fell_idle, self._was_busy = self._was_busy and not busy, busy
        if not fell_idle and self._clock.now - self._reported_at < self._sizes.heartbeat_s:
            return
        self._reported_at = self._clock.now
        load = self.load()
        self._network.send(self.id, FRONTEND, load)
        self.embeddings.evicted, self.kv.evicted = [], []
        if self.decode is not None:
            self._take_load(load)
            for peer in self.near.table.serving(Stage.PREFILL):
                if peer.id != self.id:
                    self._network.send(self.id, peer.id, load)

    def load(self) -> Load:
        """As the engine reports it."""
        machines = {Stage.ENCODE: self.encode, Stage.PREFILL: self.prefill, Stage.DECODE: self.decode}
        served = {stage: machine for stage, machine in machines.items() if machine is not None}
        return Load(
            instance=self.id,
            queues={name: n for machine in served.values() for name, n in machine.queues.items()}
            | {"leases": len(self.leases)},
            pools={"kv": self.kv.usage(), "embedding": self.embeddings.usage()},
            work_s={stage.value: machine.queued_tokens * self.pace.of(stage) for stage, machine in served.items()},
            counters=dict(self.pace.counters),
            pace_s={stage.value: self.pace.of(stage) for stage in served},
            epoch=self.near.epoch,
        )
