"""One instance of a cluster without a model: real stages and books, and a runner that remembers what is in a block, so
that a wrong one is noticed.

The content of a KV slot stands for everything before it, tokens and media: shared prefixes are right or noticed, too.
"""

import random
from dataclasses import dataclass, replace

from tests.builders import BLOCK_TOKENS, make_unit
from triptych.config import SchedulingConfig
from triptych.core import (
    Chunk,
    EncodeUnit,
    EncodeWork,
    InstanceId,
    RequestId,
    Role,
    SampledToken,
    SamplingParams,
    Sequence,
    Stage,
)
from triptych.errors import RequestError
from triptych.memory.embedding_cache import EmbeddingCache
from triptych.memory.kv_cache import KVCache
from triptych.memory.leases import Leases
from triptych.memory.pools import Pools
from triptych.messages import (
    FRONTEND,
    AnyMessage,
    Peer,
    SlabDescription,
    Submit,
    Switched,
    SwitchRole,
    Table,
)
from triptych.routing import RoutingTable
from triptych.stages.base import Pull, Surroundings
from triptych.stages.decode import DecodePlan
from triptych.stages.group import StageGroup

PLACEMENTS = [
    "1e1p1d", "1e1pd", "1ep1d", "1ed1p", "1epd", "2e2p2d", "2epd", "2e1p1d", "1e2p1d", "2ep1d", "2ep2d", "2ed1p",
    "2ed2p", "1e2pd", "1e2pd1d", "1e1p1pd", "1ep1pd", "1e1p1epd", "1ed1ep",
]  # fmt: skip
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
class Turn:
    """What happens to one instance, the `subject`-th of those that are there then."""

    at: int
    subject: int
    what: str  # "kill", "stay", "end", or the role that it gets


@dataclass(frozen=True)
class Scenario:
    placement: str
    asks: tuple[Ask, ...]
    turns: tuple[Turn, ...] = ()
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


def picture(number: int) -> EncodeUnit:
    return make_unit(f"picture-{number}", UNIT_SIZES[number % len(UNIT_SIZES)])


def sample(sampling: SamplingParams, position: int) -> int:
    """The token at a position is a function of (seed, choice, position), never of batch or instance."""
    return random.Random(f"{sampling.seed}/{sampling.choice}/{position}").randrange(8)


class Instance:
    """Engine, runner and slab of one process."""

    def __init__(
        self,
        name: InstanceId,
        process: int,
        role: Role,
        scenario: Scenario,
        rng: random.Random,
        chains: dict[RequestId, "Chain"],
    ) -> None:
        self.id = name
        self.process = f"{name}/{process}"
        self.scenario = scenario
        self.rng = rng
        self.chains = chains
        self.awake = False
        self.ended = False
        self.num_pulls = 0  # under way
        self.num_fittings = 0
        self.num_former_offloads = 0
        self.order: SwitchRole | None = None  # that is being carried out
        self.newest_order = 0
        self.lost_processes: set[str] = set()
        self.near = Surroundings(name, "", frozenset({EOS}), scenario.max_model_len)
        self.near.decode_pace_s = 1.0  # so that sequences are handed to the instance with less to do
        self.fit(role)

    def fit(self, role: Role) -> None:
        """The slab carved for a role, under an epoch of its own: a ticket for another carving is stale."""
        scenario = self.scenario
        self.role = role
        self.num_fittings += 1
        self.near.epoch = f"{self.process}.{self.num_fittings}"
        self.leases = Leases(first_id=self.rng.getrandbits(40))
        num_blocks = scenario.kv_blocks + scenario.state_blocks + self.rng.randint(0, scenario.more_kv_blocks)
        self.kv = KVCache(
            num_blocks, BLOCK_TOKENS, state_blocks=scenario.state_blocks, prefix_caching=scenario.prefix_caching
        )
        shares = (Stage.ENCODE in role.stages) + (Stage.PREFILL in role.stages)
        self.cache = EmbeddingCache(scenario.embedding_blocks * shares, BLOCK_TOKENS)
        self.kv_content: dict[int, object] = {}  # slot -> link of a chain
        self.row_content: dict[int, object] = {}  # slot -> (unit, row)
        self.stages = StageGroup(
            role,
            self.near,
            Pools(self.leases, self.kv, self.cache),
            SchedulingConfig(
                max_num_seqs=scenario.max_num_seqs,
                streamed_prefill=scenario.streamed,
                chunked_kv_transfer=scenario.chunked_transfer,
            ),
            whole_spans=scenario.whole_spans,
        )
        self.encode, self.prefill, self.decode = self.stages.encode, self.stages.prefill, self.stages.decode

    @property
    def num_offloads(self) -> int:
        return self.num_former_offloads + (self.decode.num_offloads if self.decode is not None else 0)

    @property
    def peer(self) -> Peer:
        slab = SlabDescription(transports={}, host="here", device="cpu", base=0, regions={})
        return Peer(self.id, self.role, self.near.epoch, self.process, slab)

    # ---- engine

    def handle(self, message: AnyMessage) -> None:
        self.awake = True
        match message:
            case Table():
                self._take_table(RoutingTable.of(message))
            case SwitchRole():
                self._switch(message)
            case _:
                assert self.stages.take(message), f"{self.id} gets {message}"

    def _take_table(self, table: RoutingTable) -> None:
        near = self.near
        if table.version <= near.table.version:
            return
        here = {peer.address for peer in table.peers.values()}
        gone = [peer for peer in near.table.peers.values() if peer.address not in here and peer.id != self.id]
        before, near.table = near.table, table
        self.stages.table_changed(before)
        for peer in gone:
            self.lost_processes.add(peer.address)
            near.decode_loads.pop(peer.id, None)
            self.stages.lost(peer.id)

    def _switch(self, order: SwitchRole) -> None:
        assert order.order > self.newest_order
        self.newest_order = order.order
        if order.config is not None and order.config.role is self.role:
            self.order = None
            self.stages.stay()
            self._say_switched(order)
            return
        self.order = order
        self.stages.leave(order.room)

    @property
    def is_drained(self) -> bool:
        out = self.near.out
        unsaid = out.messages or out.pulls or out.tokens
        return not (unsaid or self.num_pulls) and self.stages.is_empty

    def carry_out(self) -> None:
        """Nothing is left here of the old role. Now and then it cannot be changed, and the old one is fitted again."""
        order = self.order
        assert order is not None
        self.order = None
        self.assert_idle()
        self.num_former_offloads = self.num_offloads
        if order.config is None:
            self.ended = True
            return
        self.fit(order.config.role if self.rng.random() < 0.9 else self.role)
        self._say_switched(order)
        self.awake = True

    def _say_switched(self, order: SwitchRole) -> None:
        self.near.out.send(FRONTEND, Switched(self.id, order.order, self.peer, {}))

    def settled(self, pull: Pull, failure: Exception | None) -> None:
        self.awake = True
        self.num_pulls -= 1
        self.stages.pulled(pull.key, failure)

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
            sequence.offloaded = [[self.kv_content.get(slot) for slot in slots(block)] for block in blocks]
        for sequence, blocks in plan.restores:
            assert len(blocks) == len(sequence.offloaded), "a restore gets as many blocks as were saved"
            for block, saved in zip(blocks, sequence.offloaded, strict=True):
                self.kv_content.update(zip(slots(block), saved, strict=True))
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
        for stage in self.stages:
            assert stage.is_empty, f"{self.id}: {stage.queues}"
            assert not any(stage.queues.values()), f"{self.id}: {stage.queues}"
        if self.prefill is not None:
            assert not self.prefill._intake.early, f"{self.id}: early {self.prefill._intake.early}"
            assert not self.prefill._intake.pulling


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


def slots(block: int) -> range:
    return range(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)


def _slot(blocks: list[int], index: int) -> int:
    return blocks[index // BLOCK_TOKENS] * BLOCK_TOKENS + index % BLOCK_TOKENS


def random_scenario(seed: int) -> Scenario:
    """A cluster whose instances come, go and change, with a load that its pools can hardly hold."""
    rng = random.Random(seed)
    hurry, late = rng.choice([(5, 150), (60, 400), (600, 1500)])  # within how many events all is asked, and all happens
    asks = [
        Ask(
            pictures=tuple(rng.randrange(7) for _ in range(rng.choice([0, 1, 2, 3, 4]))),
            text=rng.randint(1, 8),
            max_tokens=rng.randint(1, 24),
            n=rng.choice([1, 1, 1, 2, 3]),
            at=rng.randint(0, hurry),
            abort_at=rng.choice([None, None, None, rng.randint(0, late)]),
        )
        for _ in range(rng.randint(1, 20))
    ]
    turns = [
        Turn(rng.randint(0, late), rng.randrange(8), rng.choice(["kill", "kill", "stay", "end", *Role, *Role]))
        for _ in range(rng.randint(0, 10))
    ]
    return Scenario(
        placement=rng.choice(PLACEMENTS),
        asks=tuple(asks),
        turns=tuple(turns),
        kv_blocks=rng.randint(8, 24),
        more_kv_blocks=rng.choice([0, 0, 3, 12]),
        embedding_blocks=rng.randint(4, 12),
        max_num_seqs=rng.randint(1, 6),
        budget=rng.randint(4, 40),
        max_encode_tokens=rng.randint(4, 24),
        streamed=rng.random() < 0.7,
        chunked_transfer=rng.random() < 0.7,
        prefix_caching=rng.random() < 0.7,
        state_blocks=rng.choice([0, 0, 0, 2]),
        lies=rng.choice([0.0, 0.0, 0.1, 0.5]),
        whole_spans=rng.random() < 0.3,
        pull_failures=rng.choice([0.0, 0.0, 0.1, 0.3]),
        seed=seed,
    )


ROUNDS: list[list[str]] = [  # what happens in turn
    ["d", "p", "e", "ed", "pd", "stay"],
    ["d", "pd", "stay", "d", "kill"],
    ["stay", "end", *Role],
    ["kill", "kill", "kill", "stay", *Role],
]
MANY = ["2e2p2d", "1e1p3d", "1e3d1pd", "1e1p2pd2d", "2ed2p", "3pd1e", "2ep3d", "3epd"]


def restless_scenario(seed: int) -> Scenario:
    """A burst of longer answers, while something happens all the time."""
    scenario = random_scenario(seed)
    rng = random.Random(seed * 7 + 1)
    kinds = rng.choice(ROUNDS)
    late = rng.choice([100, 300, 900])
    turns = [Turn(rng.randint(0, late), rng.randrange(8), rng.choice(kinds)) for _ in range(rng.randint(5, 40))]
    asks = [replace(ask, at=ask.at % 30, max_tokens=rng.randint(8, 30)) for ask in scenario.asks]
    return replace(
        scenario,
        turns=tuple(turns),
        asks=tuple(asks),
        placement=rng.choice([*MANY, scenario.placement]),
        pull_failures=rng.choice([0.0, 0.0, 0.0, 0.1]),
        kv_blocks=rng.randint(8, 14),
    )
