"""A whole cluster of real stages without a model: what is in a block is remembered, so that a wrong one is noticed.

The content of a KV slot stands for everything before it, tokens and media: shared prefixes are right or noticed, too.

The network keeps messages of one pair in order and nothing else; pulls copy some blocks when they begin and the rest
when they settle. A step runs when something arrived or the last step did something: a missed wake-up is a deadlock.
"""

import random
from collections import defaultdict, deque
from dataclasses import dataclass, field
from itertools import count

from tests.builders import BLOCK_TOKENS, make_media, make_peer, make_prompt, make_unit
from triptych import messages
from triptych.core import (
    BlockHash,
    Chunk,
    EncodeUnit,
    EncodeWork,
    FinishReason,
    InstanceId,
    Placement,
    RequestId,
    Role,
    SampledToken,
    SamplingParams,
    Sequence,
    Stage,
    UnitHash,
)
from triptych.errors import RequestError
from triptych.memory.embedding_cache import EmbeddingCache, EmbeddingShare
from triptych.memory.kv_cache import KVCache
from triptych.memory.leases import Leases
from triptych.memory.prefix import prompt_hashes
from triptych.messages import (
    FRONTEND,
    Abort,
    AnyMessage,
    Embedded,
    Encode,
    Evicted,
    Failed,
    Located,
    Prefilled,
    Prefilling,
    Release,
    Share,
    Submit,
    Tokens,
    Wanted,
)
from triptych.routing import RoutingTable, assign_units, pick
from triptych.server.directory import Directory
from triptych.stages.base import Pull, Surroundings
from triptych.stages.decode import DecodePlan, DecodeStage
from triptych.stages.encode import EncodeStage
from triptych.stages.prefill import PrefillStage

EOS = 0
GARBAGE = ("garbage",)
UNIT_SIZES = (3, 4, 5, 8, 9)  # rows of picture i: UNIT_SIZES[i % 5]; blocks have 4


@dataclass(frozen=True)
class Ask:
    """What one client wants, and when (in events of the simulation) it comes and goes."""

    pictures: tuple[int, ...] = ()  # equal numbers are equal pictures
    text: int = 3
    max_tokens: int = 4
    n: int = 1
    at: int = 0
    abort_at: int | None = None


@dataclass(frozen=True)
class Scenario:
    placement: str
    asks: tuple[Ask, ...]
    kv_blocks: int = 12  # room for one longest sequence
    more_kv_blocks: int = 0  # at most this many more, differently at every instance
    embedding_blocks: int = 8  # of each share
    max_num_seqs: int = 4
    budget: int = 16
    max_encode_tokens: int = 8
    streamed: bool = True
    chunked_transfer: bool = True
    prefix_caching: bool = True
    state_blocks: int = 0
    lies: float = 0.0  # how often the directory is told of a unit that an instance does not have
    whole_spans: bool = False
    pull_failures: float = 0.0
    encode_failures: float = 0.0
    seed: int = 0

    @property
    def max_model_len(self) -> int:
        return self.kv_blocks * BLOCK_TOKENS  # one sequence may fill the pool

    @property
    def injects_failures(self) -> bool:
        return self.pull_failures > 0 or self.encode_failures > 0


def picture(number: int) -> EncodeUnit:
    return make_unit(f"picture-{number}", UNIT_SIZES[number % len(UNIT_SIZES)])


def sample(sampling: SamplingParams, position: int) -> int:
    """The token at a position is a function of (seed, choice, position), never of batch or instance."""
    return random.Random(f"{sampling.seed}/{sampling.choice}/{position}").randrange(8)


@dataclass(slots=True, eq=False)
class Flight:
    """A pull on its way: which of its blocks are still to be copied."""

    reader: "Instance"
    pull: Pull
    left: list[tuple[int, int]]  # (block there, block here)
    failure: Exception | None


class Instance:
    """Engine, runner and slab of one instance."""

    def __init__(
        self, name: str, role: Role, scenario: Scenario, rng: random.Random, chains: dict[RequestId, "Chain"]
    ) -> None:
        self.id = InstanceId(name)
        self.role = role
        self.scenario = scenario
        self.rng = rng
        self.awake = False
        self.near = Surroundings(self.id, "1", frozenset({EOS}), scenario.max_model_len)
        self.near.decode_pace_s = 1.0  # so that sequences are handed to the instance with less to do
        self.leases = Leases()
        num_blocks = scenario.kv_blocks + scenario.state_blocks + rng.randint(0, scenario.more_kv_blocks)
        self.kv = KVCache(
            num_blocks, BLOCK_TOKENS, state_blocks=scenario.state_blocks, prefix_caching=scenario.prefix_caching
        )
        self.chains = chains
        shares = (Stage.ENCODE in role.stages) + (Stage.PREFILL in role.stages)
        self.cache = EmbeddingCache(scenario.embedding_blocks * shares, BLOCK_TOKENS)
        self.kv_content: dict[int, object] = {}  # slot -> link of a chain
        self.row_content: dict[int, object] = {}  # slot -> (unit, row)
        self.encode = self.prefill = self.decode = None
        if Stage.ENCODE in role.stages:
            share = EmbeddingShare(self.cache, scenario.embedding_blocks)
            self.encode = EncodeStage(self.near, share, self.leases)
        if Stage.PREFILL in role.stages:
            self.prefill = PrefillStage(
                self.near,
                self.kv,
                EmbeddingShare(self.cache, scenario.embedding_blocks),
                self.leases,
                max_num_seqs=scenario.max_num_seqs,
                streamed=scenario.streamed,
                chunked_transfer=scenario.chunked_transfer,
                whole_spans=scenario.whole_spans,
            )
        if Stage.DECODE in role.stages:
            self.decode = DecodeStage(self.near, self.kv, self.leases, max_num_seqs=scenario.max_num_seqs)

    # ---- engine

    def handle(self, message: AnyMessage) -> None:
        self.awake = True
        match message:
            case Encode():
                self.encode.admit(message)
            case Submit():
                self.prefill.admit(message)
            case Embedded():
                self.prefill.embedded(message)
            case Share() if self.prefill is None:
                self.near.out.send(FRONTEND, Wanted(message.request_id, (message.unit.hash,)))
            case Share():
                self.prefill.share(message)
            case Prefilling():
                self.decode.prefilling(message)
            case Prefilled():
                self.decode.admit(message)
            case Release():
                self.leases.release(message.lease)
            case Abort():
                for stage in (self.encode, self.prefill, self.decode):
                    if stage is not None:
                        stage.abort(message.request_id)

    def settled(self, pull: Pull, failure: Exception | None) -> None:
        self.awake = True
        if pull.ticket.region == "kv":
            self.decode.pulled(pull.key, failure)
        else:
            self.prefill.pulled(pull.key, failure)

    def step(self) -> bool:
        """One turn; whether there was a batch (the engine waits for news if there was none)."""
        busy = False
        if self.encode is not None:
            works = self.encode.schedule(self.scenario.max_encode_tokens)
            self._check_encode_batch(works)
            self.encode.commit(works, [self._encode(work) for work in works])
            busy |= bool(works)
        plan, chunks = DecodePlan(), []
        if self.decode is not None:
            plan = self.decode.schedule()
        if self.prefill is not None:
            budget = self.scenario.budget - len(plan.chunks)
            chunks = self.prefill.schedule(budget)
            self._check_prefill_batch(chunks, budget)
        decoded, prefilled = self._run(plan, chunks)
        if self.decode is not None:
            self.decode.commit(plan.chunks, decoded)
        if self.prefill is not None:
            self.prefill.commit(chunks, prefilled)
        self.check_integrity()
        return busy or bool(plan.chunks or chunks)

    # ---- runner

    def _encode(self, work: EncodeWork) -> RequestError | None:
        if self.rng.random() < self.scenario.encode_failures:
            return RequestError("the picture cannot be decoded")
        for row in range(work.unit.num_tokens):
            self.row_content[_slot(work.blocks, row)] = (work.unit.hash, row)
        return None

    def _run(self, plan: DecodePlan, chunks: list[Chunk]) -> tuple[list[SampledToken], list[SampledToken]]:
        assert not {s.request_id for s, _ in plan.offloads} & {c.sequence.request_id for c in plan.chunks}
        for sequence, blocks in plan.offloads:
            sequence.offloaded = [[self.kv_content.get(slot) for slot in _slots(block)] for block in blocks]
        for sequence, blocks in plan.restores:
            assert len(blocks) == len(sequence.offloaded), "a restore gets as many blocks as were saved"
            for block, saved in zip(blocks, sequence.offloaded, strict=True):
                self.kv_content.update(zip(_slots(block), saved, strict=True))
            sequence.offloaded = None
        written = [block for chunk in [*plan.chunks, *chunks] for block in self._written(chunk)]
        assert len(written) == len(set(written)), "two sequences of one batch write to the same block"
        assert not set(written) & self.kv._hash_of.keys(), "a block is written to that others may find"
        decoded = [self._forward(chunk) for chunk in plan.chunks]
        prefilled = [self._forward(chunk) for chunk in chunks]
        return decoded, [token for chunk, token in zip(chunks, prefilled, strict=True) if chunk.samples]

    def _written(self, chunk: Chunk) -> list[int]:
        """State blocks, and those that the chunk's tokens fall into."""
        table, states = chunk.sequence.block_table, self.scenario.state_blocks
        last = (chunk.start + chunk.length - 1) // BLOCK_TOKENS
        return table[:states] + table[states + chunk.start // BLOCK_TOKENS : states + last + 1]

    def _forward(self, chunk: Chunk) -> SampledToken:
        sequence = chunk.sequence
        assert chunk.start == sequence.num_computed
        assert chunk.start + chunk.length <= len(sequence.token_ids)
        for span in sequence.spans:
            unit = sequence.units[span.unit]
            for position in range(
                max(span.start, chunk.start), min(span.start + span.length, chunk.start + chunk.length)
            ):
                row = span.offset + position - span.start
                found = self.row_content.get(_slot(chunk.embedding_blocks[span.unit], row))
                assert found == (unit.hash, row), f"row {row} of {unit.hash!r}: found {found} at {self.id}"
        chain = self.chains[sequence.request_id]
        states = sequence.block_table[: self.scenario.state_blocks]
        table = sequence.block_table[self.scenario.state_blocks :]
        for position in range(chunk.start):
            found = self.kv_content.get(_slot(table, position))
            wanted = chain.link(sequence, position)
            assert found == wanted, f"KV of {sequence.request_id} at {position}: found {found} at {self.id}"
        for block in states:
            slots = range(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
            found = {self.kv_content.get(slot) for slot in slots}
            wanted = ("state", chain.link(sequence, chunk.start - 1)) if chunk.start else None
            assert wanted is None or found == {wanted}, f"state of {sequence.request_id}: found {found} at {self.id}"
            new = ("state", chain.link(sequence, chunk.start + chunk.length - 1))
            self.kv_content.update(dict.fromkeys(slots, new))
        for position in range(chunk.start, chunk.start + chunk.length):
            self.kv_content[_slot(table, position)] = chain.link(sequence, position)
        return SampledToken(sample(sequence.sampling, len(sequence.token_ids)))

    # ---- invariants

    def _check_encode_batch(self, works: list[EncodeWork]) -> None:
        total = sum(work.unit.num_tokens for work in works)
        assert len(works) <= 1 or total <= self.scenario.max_encode_tokens
        assert len({work.unit.hash for work in works}) == len(works)
        for work in works:
            assert len(work.blocks) * BLOCK_TOKENS >= work.unit.num_tokens

    def _check_prefill_batch(self, chunks: list[Chunk], budget: int) -> None:
        total = sum(chunk.length for chunk in chunks)
        longest = max([span.length for chunk in chunks for span in chunk.sequence.spans], default=0)
        assert total <= max(budget, 0) + (longest if self.scenario.whole_spans else 0)
        for chunk in chunks:
            assert chunk.length > 0
            if self.scenario.whole_spans:
                end = chunk.start + chunk.length
                assert not any(span.start < end < span.start + span.length for span in chunk.sequence.spans)

    def check_integrity(self) -> None:
        self.kv.check_integrity()
        self.cache.check_integrity()

    def assert_idle(self) -> None:
        self.check_integrity()
        assert self.kv.usage().used == 0, f"{self.id}: KV {self.kv.usage()}"
        assert self.cache.usage().used == 0, f"{self.id}: embeddings {self.cache.usage()}"
        assert len(self.leases) == 0, f"{self.id}: {len(self.leases)} leases"
        for stage in (self.encode, self.prefill, self.decode):
            if stage is not None:
                assert not any(stage.queues.values()), f"{self.id}: {stage.queues}"
        if self.prefill is not None:
            assert not self.prefill._early, f"{self.id}: early {self.prefill._early}"
            assert not self.prefill._pulling


class Chain:
    """What the KV of a sequence must be: a link at each position, which stands for all tokens and media up to it."""

    def __init__(self, order: Submit) -> None:
        self._rows = {
            span.start + i: (order.units[span.unit].hash, span.offset + i)
            for span in order.spans
            for i in range(span.length)
        }
        self._links: list[int] = []

    def link(self, sequence: Sequence, position: int) -> int:
        while len(self._links) <= position:
            at = len(self._links)
            before = self._links[-1] if at else 0
            self._links.append(hash((before, sequence.token_ids[at], self._rows.get(at))))
        return self._links[position]


@dataclass
class Answer:
    """What the frontend knows about one sequence."""

    ask: int
    submit: Submit
    prefill: InstanceId
    holders: set[InstanceId]
    tokens: list[int] = field(default_factory=list)
    ahead: dict[int, messages.TokenUpdate] = field(default_factory=dict)  # came before an earlier token
    finish: FinishReason | None = None
    failure: Failed | None = None
    aborted: bool = False

    @property
    def live(self) -> bool:
        return self.finish is None and self.failure is None and not self.aborted


class Cluster:
    """The frontend, the network and the instances, driven by one random stream."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.rng = random.Random(scenario.seed)
        self.instances: dict[InstanceId, Instance] = {}
        self.chains: dict[RequestId, Chain] = {}
        self.directory = Directory()
        self.num_wanted = 0
        numbers: dict[Role, count] = defaultdict(count)
        for role in Placement.parse(scenario.placement).roles:
            instance = Instance(f"{role}{next(numbers[role])}", role, scenario, self.rng, self.chains)
            self.instances[instance.id] = instance
        self.table = RoutingTable(1, {i.id: make_peer(i.id, i.role) for i in self.instances.values()})
        for instance in self.instances.values():
            instance.near.table = self.table
        self.wires: dict[tuple[InstanceId, InstanceId], deque[bytes]] = defaultdict(deque)
        self.flights: list[Flight] = []
        self.answers: dict[RequestId, Answer] = {}
        self.sent = {stage: dict.fromkeys(self.instances, 0.0) for stage in Stage}
        self.num_events = 0

    # ---- running

    def run(self, max_events: int = 50_000) -> None:
        """Until nothing happens any more. Raises AssertionError where that is too early, or never."""
        coming = deque(sorted(enumerate(self.scenario.asks), key=lambda item: item[1].at))
        going = deque(sorted((ask.abort_at, i) for i, ask in enumerate(self.scenario.asks) if ask.abort_at is not None))
        while True:
            self.num_events += 1
            assert self.num_events < max_events, f"no end after {max_events} events\n{self.picture()}"
            while coming and coming[0][1].at <= self.num_events:
                self._submit(*coming.popleft())
            while going and going[0][0] <= self.num_events:
                self._abort(going.popleft()[1])
            if not self._event() and not coming and not going:
                break
        stuck = [name for name, answer in self.answers.items() if answer.live]
        assert not stuck, f"{stuck} wait for ever\n{self.picture()}"
        for instance in self.instances.values():
            instance.assert_idle()

    def _event(self) -> bool:
        choices = [(self._deliver, pair) for pair, wire in self.wires.items() if wire]
        choices += [(self._settle, flight) for flight in self.flights]
        choices += [(self._step, instance) for instance in self.instances.values() if instance.awake]
        if not choices:
            return False
        action, subject = self.rng.choice(choices)
        action(subject)
        return True

    def _deliver(self, pair: tuple[InstanceId, InstanceId]) -> None:
        message = messages.decode(self.wires[pair].popleft())
        if pair[1] == FRONTEND:
            self._frontend(message)
        else:
            instance = self.instances[pair[1]]
            instance.handle(message)
            self._flush(instance)
            instance.check_integrity()

    def _step(self, instance: Instance) -> None:
        instance.awake = instance.step()
        self._flush(instance)

    def _flush(self, instance: Instance) -> None:
        out = instance.near.out
        if out.tokens:
            self._send(instance.id, FRONTEND, Tokens(instance.id, list(out.tokens)))
        for to, message in out.messages:
            self._send(instance.id, to, message)
        for pull in out.pulls:
            self._begin(instance, pull)
        units, blocks = instance.cache.evicted, instance.kv.evicted
        if (units or blocks) and self.rng.random() < 0.5:  # told late, with the next heartbeat
            instance.cache.evicted, instance.kv.evicted = [], []
            self._send(instance.id, FRONTEND, Evicted(instance.id, units, blocks))
        out.messages.clear()
        out.pulls.clear()
        out.tokens.clear()

    def _send(self, sender: InstanceId, to: InstanceId, message: AnyMessage) -> None:
        self.wires[sender, to].append(messages.encode(message))

    # ---- transfer

    def _begin(self, reader: Instance, pull: Pull) -> None:
        assert len(pull.blocks) == len(pull.ticket.blocks)
        assert pull.ticket.holder != reader.id, "a hand-over inside an instance moves no bytes"
        failure = RuntimeError("link down") if self.rng.random() < self.scenario.pull_failures else None
        flight = Flight(reader, pull, [], failure)
        for pair in zip(pull.ticket.blocks, pull.blocks, strict=True):
            if self.rng.random() < 0.5:
                self._copy(flight, *pair)
            else:
                flight.left.append(pair)
        self.flights.append(flight)

    def _settle(self, flight: Flight) -> None:
        self.flights.remove(flight)
        for pair in flight.left:
            self._copy(flight, *pair)
        flight.reader.settled(flight.pull, flight.failure)
        self._flush(flight.reader)
        flight.reader.check_integrity()

    def _copy(self, flight: Flight, there: int, here: int) -> None:
        holder = self.instances[flight.pull.ticket.holder]
        kv = flight.pull.ticket.region == "kv"
        source, target = (i.kv_content if kv else i.row_content for i in (holder, flight.reader))
        for slot_there, slot_here in zip(_slots(there), _slots(here), strict=True):
            target[slot_here] = GARBAGE if flight.failure else source.get(slot_there)

    # ---- frontend

    def _submit(self, index: int, ask: Ask) -> None:
        units = tuple(picture(number) for number in ask.pictures)
        token_ids, spans = make_prompt(units, ask.text)
        if self.scenario.more_kv_blocks and len(token_ids) >= self.scenario.max_model_len:
            return  # refused here; without more blocks, prefill itself has to
        prefill = pick(self.table, Stage.PREFILL, self.sent[Stage.PREFILL]).id
        self.sent[Stage.PREFILL][prefill] += len(token_ids)
        hashes = prompt_hashes(b"root", token_ids, units, spans, BLOCK_TOKENS)
        distinct = {unit.hash: unit for unit in units}
        missing, held = self._look_up(prefill, distinct, hashes.blocks)
        encoders = self._assign(list(missing.values()))
        for choice in range(ask.n):
            sampling = SamplingParams(max_tokens=ask.max_tokens, seed=index, choice=choice)
            submit = Submit(
                RequestId(f"{index}.{choice}"),
                token_ids,
                len(token_ids),
                units,
                spans,
                sampling,
                prompt_hashes=hashes,
                ordered=tuple(encoders) if choice == 0 else (),
                held=held if choice == 0 else {},
            )
            self.chains[submit.request_id] = Chain(submit)
            self.answers[submit.request_id] = Answer(index, submit, prefill, {prefill, *encoders.values()})
            self._send(FRONTEND, prefill, submit)
        self._order(RequestId(f"{index}.0"), missing, prefill, encoders)

    def _look_up(
        self, prefill: InstanceId, units: dict[UnitHash, EncodeUnit], blocks: tuple[BlockHash, ...]
    ) -> tuple[dict[UnitHash, EncodeUnit], dict[UnitHash, InstanceId]]:
        """As the frontend does it, with a directory that may be wrong."""
        missing, held = {}, {}
        for hash_, unit in units.items():
            if self.rng.random() < self.scenario.lies:
                self.directory.add_unit(hash_, self.rng.choice(sorted(self.instances)))
            holders = self.directory.holders(hash_)
            if prefill in holders:
                continue
            if holders and not any(Stage.ENCODE in self.instances[holder].role.stages for holder in holders):
                held[hash_] = min(holders)
            else:
                missing[hash_] = unit
            self.directory.add_unit(hash_, prefill)
        self.directory.add_blocks(prefill, blocks)
        return missing, held

    def _assign(self, units: list[EncodeUnit]) -> dict[UnitHash, InstanceId]:
        holders = {unit.hash: self.directory.holders(unit.hash) for unit in units}
        encoders = assign_units(self.table, units, self.sent[Stage.ENCODE], 1.0, holders=holders)
        for unit in units:
            self.sent[Stage.ENCODE][encoders[unit.hash]] += unit.num_tokens
            self.directory.add_unit(unit.hash, encoders[unit.hash])
        return encoders

    def _order(
        self,
        request_id: RequestId,
        units: dict[UnitHash, EncodeUnit],
        prefill: InstanceId,
        encoders: dict[UnitHash, InstanceId],
    ) -> None:
        for encoder in sorted(set(encoders.values())):
            mine = tuple(unit for hash_, unit in units.items() if encoders[hash_] == encoder)
            self._send(FRONTEND, encoder, Encode(request_id, make_media(), mine, prefill))

    def _abort(self, ask: int) -> None:
        for name, answer in self.answers.items():
            if answer.ask == ask and answer.live:
                answer.aborted = True
                self._abort_everywhere(name, answer)

    def _abort_everywhere(self, name: RequestId, answer: Answer) -> None:
        for holder in sorted(answer.holders):
            self._send(FRONTEND, holder, Abort(name))

    def _frontend(self, message: AnyMessage) -> None:
        match message:
            case Tokens():
                for update in message.updates:
                    self._token(message.instance, update)
            case Located():
                answer = self.answers[message.request_id]
                answer.holders.add(message.decode)
                if not answer.live:
                    self._send(FRONTEND, message.decode, Abort(message.request_id))
            case Wanted():
                answer = self.answers[message.request_id]
                self.num_wanted += 1
                if answer.live and not answer.tokens:
                    units = {unit.hash: unit for unit in answer.submit.units if unit.hash in message.units}
                    encoders = self._assign(list(units.values()))
                    answer.holders.update(encoders.values())
                    self._order(message.request_id, units, answer.prefill, encoders)
            case Evicted():
                self.directory.evicted(message)
            case Failed():
                answer = self.answers[message.request_id]
                if answer.live:
                    answer.failure = message
                    self._abort_everywhere(message.request_id, answer)

    def _token(self, instance: InstanceId, update: messages.TokenUpdate) -> None:
        answer = self.answers[update.request_id]
        if not answer.live:
            if update.finish is None:
                self._send(FRONTEND, instance, Abort(update.request_id))
            return
        answer.holders.add(instance)
        assert update.index not in answer.ahead
        answer.ahead[update.index] = update  # the first token comes from prefill, on another wire than the rest
        while (following := answer.ahead.pop(len(answer.tokens), None)) is not None:
            assert answer.finish is None, f"{update.request_id} goes on after its end"
            answer.tokens.append(following.token_id)
            answer.finish = following.finish

    # ---- oracles

    def expected(self, answer: Answer) -> tuple[list[int], FinishReason]:
        tokens: list[int] = []
        sampling = answer.submit.sampling
        while True:
            length = answer.submit.num_prompt_tokens + len(tokens)
            tokens.append(sample(sampling, length))
            if tokens[-1] == EOS:
                return tokens, FinishReason.STOP
            if len(tokens) >= sampling.max_tokens or length + 1 >= self.scenario.max_model_len:
                return tokens, FinishReason.LENGTH

    def fits(self, answer: Answer) -> bool:
        rows = {unit.hash: -(-unit.num_tokens // BLOCK_TOKENS) for unit in answer.submit.units}
        kv = answer.submit.num_prompt_tokens + 1 <= self.instances[answer.prefill].kv.max_tokens
        return kv and sum(rows.values()) <= self.scenario.embedding_blocks

    def check_answers(self) -> None:
        """Everything that was not aborted or hit by an injected failure is complete and exact."""
        for name, answer in self.answers.items():
            tokens, finish = self.expected(answer)
            assert answer.tokens == tokens[: len(answer.tokens)], f"{name}: {answer.tokens} instead of {tokens}"
            if answer.failure is not None and self.fits(answer):
                assert self.scenario.injects_failures, f"{name}: {answer.failure}"
            if answer.failure is None and not answer.aborted:
                assert self.fits(answer), f"{name} was accepted and cannot fit"
                assert (answer.tokens, answer.finish) == (tokens, finish), name

    def picture(self) -> str:
        lines = [
            f"{i.id}: awake={i.awake} kv={i.kv.usage()} embeddings={i.cache.usage()} leases={len(i.leases)} "
            f"reserve={i.kv.growth_reserve} "
            + " ".join(str(stage.queues) for stage in (i.encode, i.prefill, i.decode) if stage is not None)
            for i in self.instances.values()
        ]
        lines += [f"{name}: {len(a.tokens)} tokens" for name, a in self.answers.items() if a.live]
        return "\n".join(lines)


def play(scenario: Scenario) -> Cluster:
    cluster = Cluster(scenario)
    cluster.run()
    cluster.check_answers()
    return cluster


def _slots(block: int) -> range:
    return range(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)


def _slot(blocks: list[int], index: int) -> int:
    return blocks[index // BLOCK_TOKENS] * BLOCK_TOKENS + index % BLOCK_TOKENS
