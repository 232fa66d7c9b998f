"""From a configuration to an engine: loads the weights of the role, carves the slab, joins stages and runners."""

import io
import math
import secrets
import wave
from collections.abc import Callable
from dataclasses import dataclass

import torch
import zmq
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedModel

from triptych.config import (
    EMBEDDING_BLOCK_TOKENS,
    GIB,
    KV_BLOCK_TOKENS,
    InstanceConfig,
    MemoryConfig,
    ModelConfig,
    require,
)
from triptych.core import Media, Role, Stage
from triptych.engine.engine import Engine, Pools, Runners, Stages
from triptych.engine.sockets import Inbox, Post
from triptych.memory.embedding_cache import EmbeddingCache, EmbeddingShare
from triptych.memory.kv_cache import KVCache
from triptych.memory.leases import Leases
from triptych.messages import Peer
from triptych.model.caches import EmbeddingLayout, EmbeddingRegion, KVLayout, KVRegion, blocks_that_fit
from triptych.model.encoder import EncodeRunner
from triptych.model.families import Family, family_for
from triptych.model.language import LanguageRunner
from triptych.model.loading import load_config, load_model, resolve_dtype, resolve_max_model_len
from triptych.model.probe import embedding_layout, kv_layout
from triptych.model.processor import Processor
from triptych.stages.base import Surroundings
from triptych.stages.decode import DecodeStage
from triptych.stages.encode import EncodeStage
from triptych.stages.prefill import PrefillStage
from triptych.transfer.select import Transfers
from triptych.transfer.slab import Slab, slab_bytes

CPU_KV_BYTES = GIB
WARM_UP_SIDE = 224  # pixels
WARM_UP_SECONDS = 0.5
WARM_UP_RATE = 16_000  # samples per second
ENCODE_SHARE = 0.5  # of an embedding cache that encode and prefill use together


@dataclass(frozen=True)
class PoolPlan:
    """How many blocks of what size; a role without a region has 0 blocks of it."""

    kv: KVLayout
    embedding: EmbeddingLayout
    num_kv_blocks: int
    num_embedding_blocks: int

    def sizes(self) -> dict[str, tuple[int, int, str]]:
        """What the slab is carved into: name -> block bytes, number of blocks, layout."""
        sizes = {}
        if self.num_kv_blocks:
            sizes["kv"] = (self.kv.block_bytes, self.num_kv_blocks, self.kv.layout)
        if self.num_embedding_blocks:
            sizes["embedding"] = (self.embedding.block_bytes, self.num_embedding_blocks, self.embedding.layout)
        return sizes


def build(config: InstanceConfig, context: zmq.Context[zmq.Socket[bytes]]) -> tuple[Engine, Peer]:
    """The engine of this instance and its row of the routing table.

    Raises ConfigError where the checkpoint, the device or the memory cannot serve the role.
    """
    hf_config = load_config(config.model.path)
    family, processor = family_for(hf_config), Processor.load(config.model.path, revision=config.model.revision)
    model = load_model(config.model, config.role)
    max_model_len = resolve_max_model_len(config.model, hf_config)
    plan = plan_pools(config, hf_config, max_model_len)
    slab = Slab(f"triptych-{config.id}", slab_bytes(plan.sizes()), config.model.device)
    slab.carve(plan.sizes())

    near = Surroundings(config.id, config.epoch, processor.eos_token_ids, max_model_len)
    pools = _make_pools(plan, prefix_caching=config.memory.prefix_caching)
    runners = _make_runners(config.role, model, family, processor, plan, slab)
    stages = _make_stages(config, near, pools, whole_spans=family.image_groups)
    transfers = Transfers(slab, config.id, config.epoch, config.transfer)
    inbox = Inbox(context, config.inbox)
    engine = Engine(
        near,
        pools,
        stages,
        runners,
        transfers,
        inbox,
        Post(context),
        frontend=config.frontend,
        max_num_batched_tokens=config.scheduling.max_num_batched_tokens,
        max_encode_tokens=config.scheduling.max_encode_tokens,
        heartbeat_s=config.heartbeat_s,
        decode_interval_s=(config.scheduling.decode_interval_ms or 0.0) / 1e3,
        set_threads=_thread_setter(config),
    )
    return engine, Peer(config.id, config.role, config.epoch, inbox.address, transfers.describe())


def fitting_model_len(model: ModelConfig, memory: MemoryConfig) -> int:
    """Prompt + output tokens of one request: as asked, else what the model supports, on CPU as far as it fits the
    default KV cache. Raises ConfigError if the model supports less than was asked for."""
    hf_config = load_config(model.path)
    supported = resolve_max_model_len(model, hf_config)
    if model.max_model_len is not None or model.device != "cpu":
        return supported
    layout = kv_layout(hf_config, resolve_dtype(model, hf_config))
    num_blocks = blocks_that_fit(memory.kv_cache_bytes or CPU_KV_BYTES, layout)
    return min(supported, max(1, num_blocks - layout.state_blocks - 1) * KV_BLOCK_TOKENS)


def plan_pools(config: InstanceConfig, hf_config: PreTrainedConfig, max_model_len: int) -> PoolPlan:
    """Sizes the pools of a role. Raises ConfigError if the longest request would not fit."""
    stages, dtype = config.role.stages, resolve_dtype(config.model, hf_config)
    kv, embedding = kv_layout(hf_config, dtype), embedding_layout(hf_config, dtype)
    num_kv_blocks = num_embedding_blocks = 0
    if config.role.has_language_model:
        longest = kv.state_blocks + math.ceil(max_model_len / KV_BLOCK_TOKENS) + 1
        num_kv_blocks = min(
            blocks_that_fit(_kv_bytes(config), kv),
            longest * config.scheduling.max_num_seqs,  # more could never be filled
        )
        require(
            num_kv_blocks >= longest,
            "kv_cache_bytes",
            f"{longest * kv.block_bytes} needed for one request of max_model_len={max_model_len} tokens, "
            f"{_kv_bytes(config)} given; lower max_model_len or raise the size",
        )
    if Stage.ENCODE in stages or Stage.PREFILL in stages:
        num_embedding_blocks = blocks_that_fit(config.memory.embedding_cache_bytes, embedding)
        require(num_embedding_blocks >= 8, "embedding_cache_bytes", f"at least {8 * embedding.block_bytes} needed")
    return PoolPlan(kv, embedding, num_kv_blocks, num_embedding_blocks)


def _make_pools(plan: PoolPlan, *, prefix_caching: bool) -> Pools:
    """Lease ids start at random: a release for an earlier incarnation never meets a lease of this one."""
    pools = Pools(Leases(first_id=secrets.randbits(48)))
    if plan.num_kv_blocks:
        pools.kv = KVCache(
            plan.num_kv_blocks,
            KV_BLOCK_TOKENS,
            state_blocks=plan.kv.state_blocks,
            prefix_caching=prefix_caching,
        )
    if plan.num_embedding_blocks:
        pools.embeddings = EmbeddingCache(plan.num_embedding_blocks, EMBEDDING_BLOCK_TOKENS)
    return pools


def _make_runners(
    role: Role, model: PreTrainedModel, family: Family, processor: Processor, plan: PoolPlan, slab: Slab
) -> Runners:
    """Runners over the regions of the slab, warmed up."""
    runners, embedding_region = Runners(), None
    if plan.num_embedding_blocks:
        embedding_region = EmbeddingRegion(slab.region_tensor("embedding"), plan.embedding, plan.num_embedding_blocks)
    if role.encodes:
        assert embedding_region is not None
        encoder = EncodeRunner(model, processor, embedding_region)
        encoder.warm_up(next(_WARM_UP[name]() for name in processor.modalities if name in _WARM_UP))
        runners.encode = encoder
    if role.has_language_model:
        kv_region = KVRegion(slab.region_tensor("kv"), plan.kv, plan.num_kv_blocks)
        language = LanguageRunner(model, family, kv_region, embedding_region, sorted(processor.eos_token_ids))
        language.warm_up()
        runners.language = language
    return runners


def _make_stages(config: InstanceConfig, near: Surroundings, pools: Pools, *, whole_spans: bool) -> Stages:
    stages, role, scheduling = Stages(), config.role, config.scheduling
    prefills = Stage.PREFILL in role.stages
    if pools.embeddings is not None:
        encode_blocks = prefill_blocks = pools.embeddings.num_blocks
        if role.encodes and prefills:
            encode_blocks = int(encode_blocks * ENCODE_SHARE)
            prefill_blocks -= encode_blocks
        if role.encodes:
            share = EmbeddingShare(pools.embeddings, encode_blocks)
            stages.encode = EncodeStage(near, share, pools.leases)
        if prefills:
            assert pools.kv is not None
            stages.prefill = PrefillStage(
                near,
                pools.kv,
                EmbeddingShare(pools.embeddings, prefill_blocks),
                pools.leases,
                max_num_seqs=scheduling.max_num_seqs,
                # While this very instance encodes the rest, an early chunk would only delay it.
                streamed=scheduling.streamed_prefill and not role.encodes,
                chunked_transfer=scheduling.chunked_kv_transfer,
                whole_spans=whole_spans,
            )
    if Stage.DECODE in role.stages:
        assert pools.kv is not None
        stages.decode = DecodeStage(near, pools.kv, pools.leases, max_num_seqs=scheduling.max_num_seqs)
    return stages


def _thread_setter(config: InstanceConfig) -> Callable[[bool], None]:
    """Sets the threads of the next step, where their number changes at all."""

    def set_threads(beside_encoders: bool) -> None:
        wanted = fewer if beside_encoders else config.threads
        if torch.get_num_threads() != wanted:
            torch.set_num_threads(wanted)

    fewer = config.threads_beside_encoders or config.threads
    return set_threads


def _grey_picture() -> Media:
    file = io.BytesIO()
    Image.new("RGB", (WARM_UP_SIDE, WARM_UP_SIDE), (128, 128, 128)).save(file, "PNG")
    return Media(b"warm-up", "image", file.getvalue())


def _silence() -> Media:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(WARM_UP_RATE)
        sound.writeframes(bytes(2 * int(WARM_UP_SECONDS * WARM_UP_RATE)))
    return Media(b"warm-up", "audio", file.getvalue())


# What to encode first. Every family takes the one or the other.
_WARM_UP = {"image": _grey_picture, "audio": _silence}


def _kv_bytes(config: InstanceConfig) -> int:
    if config.memory.kv_cache_bytes is not None:
        return config.memory.kv_cache_bytes
    if config.model.device == "cpu":
        return CPU_KV_BYTES
    free, total = torch.cuda.mem_get_info(config.model.device)
    return max(
        0, int(free - (1.0 - config.memory.gpu_memory_utilization) * total - config.memory.embedding_cache_bytes)
    )
