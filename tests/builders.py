"""Small real things for tests: units, requests, neighbourhoods and stages with defaults that stay out of the way."""

from dataclasses import dataclass

from triptych.config import InstanceConfig, MemoryConfig, ModelConfig, SchedulingConfig
from triptych.core import (
    BlockHashes,
    EncodeUnit,
    InstanceId,
    LeaseId,
    Media,
    RequestId,
    Role,
    SamplingParams,
    Span,
    Stage,
    UnitHash,
)
from triptych.memory.embedding_cache import EmbeddingCache, EmbeddingShare
from triptych.memory.kv_cache import KVCache
from triptych.memory.leases import Leases
from triptych.memory.prefix import prompt_hashes
from triptych.messages import Embedded, Encode, Peer, Prefilled, SlabDescription, Submit, Ticket
from triptych.routing import RoutingTable
from triptych.stages.base import Surroundings
from triptych.stages.decode import DecodeStage
from triptych.stages.encode import EncodeStage
from triptych.stages.prefill import PrefillStage

BLOCK_TOKENS = 4


def make_unit(name: str = "cat", num_tokens: int = 8) -> EncodeUnit:
    return EncodeUnit(UnitHash(name.encode().ljust(16, b"\0")), "image", num_tokens)


def make_config(name: str, role: Role | str = Role.EPD) -> InstanceConfig:
    """Of a process that is never started."""
    return InstanceConfig(
        id=InstanceId(name),
        role=Role(role),
        epoch=f"epoch-{name}",
        server_pid=1,
        inbox="",
        frontend="",
        threads=1,
        transfer="shm",
        model=ModelConfig(path="", name=""),
        memory=MemoryConfig(),
        scheduling=SchedulingConfig(),
    )


def make_peer(name: str, role: Role | str = Role.EPD, epoch: str = "1") -> Peer:
    slab = SlabDescription(transports={}, host="here", device="cpu", base=0, regions={})
    return Peer(InstanceId(name), Role(role), epoch, f"ipc://{name}", slab)


def make_table(**roles: str) -> RoutingTable:
    """`make_table(e0="e", p0="p")`."""
    return RoutingTable(1, {InstanceId(name): make_peer(name, role) for name, role in roles.items()})


def make_near(name: str = "here", **others: str) -> Surroundings:
    return Surroundings(InstanceId(name), epoch="1", table=make_table(**others))


def make_sampling(max_tokens: int = 4, seed: int = 0, choice: int = 0) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=seed, choice=choice)


def make_prompt(units: tuple[EncodeUnit, ...] = (), text: int = 3) -> tuple[list[int], tuple[Span, ...]]:
    """`text` tokens, then for each unit its placeholders and `text` tokens more."""
    token_ids, spans = list(range(100, 100 + text)), []
    for index, unit in enumerate(units):
        spans.append(Span(len(token_ids), unit.num_tokens, index, 0))
        token_ids += [9] * unit.num_tokens + list(range(100, 100 + text))
    return token_ids, tuple(spans)


def make_request(
    name: str = "r",
    units: tuple[EncodeUnit, ...] = (),
    *,
    num_images: int = 0,
    text: int = 3,
    max_tokens: int = 4,
    hashed: bool = False,
    ordered: bool = True,
) -> Submit:
    """With `num_images`, the units are distinct pictures of 8 rows. `hashed`: its prefix may be found; `ordered`: its
    units are announced without being asked for."""
    units = units or tuple(make_unit(f"{name}-{i}") for i in range(num_images))
    token_ids, spans = make_prompt(units, text)
    return Submit(
        RequestId(name),
        token_ids,
        len(token_ids),
        units,
        spans,
        make_sampling(max_tokens),
        prompt_hashes=prompt_hashes(b"root", token_ids, units, spans, BLOCK_TOKENS) if hashed else BlockHashes(),
        ordered=tuple(unit.hash for unit in units) if ordered else (),
    )


def make_media(data: bytes = b"jpeg") -> Media:
    return Media(data.ljust(16, b"\0"), "image", data)


def make_ticket(
    holder: str = "there", lease: int = 1, region: str = "embedding", num_tokens: int = 8, epoch: str = "1"
) -> Ticket:
    blocks = list(range(-(-num_tokens // BLOCK_TOKENS)))
    return Ticket(InstanceId(holder), epoch, LeaseId(lease), region, blocks, num_tokens)


def make_order(name: str = "r", unit: EncodeUnit | None = None, prefill: str = "p0") -> Encode:
    return Encode(RequestId(name), make_media(), (unit or make_unit(),), InstanceId(prefill))


def make_embedded(name: str = "r", unit: EncodeUnit | None = None, lease: int = 1, holder: str = "e0") -> Embedded:
    unit = unit or make_unit()
    return Embedded(RequestId(name), unit.hash, make_ticket(holder, lease, "embedding", unit.num_tokens))


def make_prefilled(
    name: str = "r", num_prompt_tokens: int = 7, max_tokens: int = 4, holder: str = "p0", lease: int = 1
) -> Prefilled:
    """A prompt whose KV waits at `holder`, and its first token."""
    token_ids = list(range(100, 100 + num_prompt_tokens + 1))
    ticket = make_ticket(holder, lease, "kv", num_prompt_tokens)
    return Prefilled(RequestId(name), token_ids, num_prompt_tokens, make_sampling(max_tokens), 0, BlockHashes(), ticket)


@dataclass
class Pools:
    """The memory of one instance, and its neighbourhood."""

    near: Surroundings
    kv: KVCache
    cache: EmbeddingCache
    share: EmbeddingShare
    leases: Leases

    def check_integrity(self) -> None:
        self.kv.check_integrity()
        self.cache.check_integrity()

    def assert_idle(self) -> None:
        self.check_integrity()
        assert self.kv.usage().used == 0
        assert self.cache.usage().used == 0
        assert len(self.leases) == 0


def make_pools(kv_blocks: int = 16, embedding_blocks: int = 8, near: Surroundings | None = None) -> Pools:
    cache = EmbeddingCache(embedding_blocks, BLOCK_TOKENS)
    near = near or make_near("here", here="ep", d0="d")
    return Pools(near, KVCache(kv_blocks, BLOCK_TOKENS), cache, EmbeddingShare(cache, embedding_blocks), Leases())


def make_stage(stage: Stage, pools: Pools, **options: object) -> EncodeStage | PrefillStage | DecodeStage:
    """A stage over the pools; options go to its constructor."""
    if stage is Stage.ENCODE:
        return EncodeStage(pools.near, pools.share, pools.leases, **options)
    options = {"max_num_seqs": 8} | options
    if stage is Stage.PREFILL:
        return PrefillStage(pools.near, pools.kv, pools.share, pools.leases, **options)
    return DecodeStage(pools.near, pools.kv, pools.leases, **options)
