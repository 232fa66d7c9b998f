"""From a configuration to an engine: loads the weights of the role, carves the slab, joins stages and runners."""

import math
import secrets
from dataclasses import dataclass

import torch
import zmq

from triptych.config import EMBEDDING_BLOCK_TOKENS, GIB, KV_BLOCK_TOKENS, InstanceConfig, require
from triptych.core import Stage
from triptych.engine.engine import Engine
from triptych.engine.sockets import Inbox, Post
from triptych.memory.embedding_cache import EmbeddingCache, EmbeddingShare
from triptych.memory.kv_cache import KVCache
from triptych.memory.leases import Leases
from triptych.messages import Peer
from triptych.model.caches import EmbeddingLayout, EmbeddingRegion, KVLayout, KVRegion, blocks_that_fit
from triptych.model.encoder import EncodeRunner
from triptych.model.families import family_for
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
EMBEDDING_BYTES = GIB // 4
ENCODE_SHARE = 0.5  # of an embedding cache that encode and prefill use together


@dataclass(frozen=True)
class Pools:
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
    stages, hf_config = config.role.stages, load_config(config.model.path)
    family = family_for(hf_config)
    model = load_model(config.model, config.role)
    max_model_len = resolve_max_model_len(config.model, hf_config)
    pools = plan_pools(config, max_model_len)
    slab = Slab(f"triptych-{config.id}", slab_bytes(pools.sizes()), config.model.device)
    slab.carve(pools.sizes())
    kv_region = embedding_region = None
    if pools.num_kv_blocks:
        kv_region = KVRegion(slab.region_tensor("kv"), pools.kv, pools.num_kv_blocks)
    if pools.num_embedding_blocks:
        embedding_region = EmbeddingRegion(slab.region_tensor("embedding"), pools.embedding, pools.num_embedding_blocks)

    processor = Processor.load(config.model.path, revision=config.model.revision)
    near = Surroundings(config.id, config.epoch, processor.eos_token_ids, max_model_len)
    leases, scheduling = Leases(first_id=secrets.randbits(48)), config.scheduling
    kv = KVCache(pools.num_kv_blocks, KV_BLOCK_TOKENS) if kv_region is not None else None
    embeddings = None
    encode = prefill = decode = encode_runner = language_runner = None
    if embedding_region is not None:
        embeddings = EmbeddingCache(pools.num_embedding_blocks, EMBEDDING_BLOCK_TOKENS)
        encode_blocks, prefill_blocks = shares(config, pools.num_embedding_blocks)
    if Stage.ENCODE in stages:
        assert embeddings is not None
        assert embedding_region is not None
        share = EmbeddingShare(embeddings, encode_blocks)
        encode = EncodeStage(near, share, leases, scheduling.max_encode_tokens)
        encode_runner = EncodeRunner(model, family, processor, embedding_region)
    if kv_region is not None:
        language_runner = LanguageRunner(model, family, kv_region, embedding_region, sorted(processor.eos_token_ids))
    if Stage.PREFILL in stages:
        assert embeddings is not None
        assert kv is not None
        prefill = PrefillStage(
            near,
            kv,
            EmbeddingShare(embeddings, prefill_blocks),
            leases,
            max_num_seqs=scheduling.max_num_seqs,
            # While this very instance encodes the rest, an early chunk only delays it.
            streamed=Stage.ENCODE not in stages,
            whole_spans=family.image_groups,
        )
    if Stage.DECODE in stages:
        assert kv is not None
        decode = DecodeStage(near, kv, leases, max_num_seqs=scheduling.max_num_seqs)
    for runner in (encode_runner, language_runner):
        if runner is not None:
            runner.warm_up()

    transfers = Transfers(slab, config.id, config.epoch, config.transfer)
    inbox = Inbox(context, config.inbox)
    engine = Engine(
        near,
        inbox=inbox,
        post=Post(context),
        frontend=config.frontend,
        transfers=transfers,
        leases=leases,
        kv=kv,
        embeddings=embeddings,
        encode=encode,
        prefill=prefill,
        decode=decode,
        encode_runner=encode_runner,
        language_runner=language_runner,
        max_num_batched_tokens=scheduling.max_num_batched_tokens,
        heartbeat_s=config.heartbeat_s,
    )
    return engine, Peer(config.id, config.role, config.epoch, inbox.address, transfers.describe())


def plan_pools(config: InstanceConfig, max_model_len: int) -> Pools:
    """Sizes the pools of a role. Raises ConfigError if the longest request would not fit."""
    hf_config, stages = load_config(config.model.path), config.role.stages
    dtype = resolve_dtype(config.model, hf_config)
    kv, embedding = kv_layout(hf_config, dtype), embedding_layout(hf_config, dtype)
    num_kv_blocks = num_embedding_blocks = 0
    if config.role.has_language_model:
        longest = math.ceil(max_model_len / KV_BLOCK_TOKENS) + 1
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
        num_embedding_blocks = blocks_that_fit(config.memory.embedding_cache_bytes or EMBEDDING_BYTES, embedding)
        require(num_embedding_blocks >= 8, "embedding_cache_bytes", f"at least {8 * embedding.block_bytes} needed")
    return Pools(kv, embedding, num_kv_blocks, num_embedding_blocks)


def shares(config: InstanceConfig, num_blocks: int) -> tuple[int, int]:
    """What encode and what prefill may hold of the embedding cache at once."""
    if Stage.ENCODE in config.role.stages and Stage.PREFILL in config.role.stages:
        encode_blocks = max(1, int(num_blocks * ENCODE_SHARE))
        return encode_blocks, num_blocks - encode_blocks
    return num_blocks, num_blocks


def _kv_bytes(config: InstanceConfig) -> int:
    if config.memory.kv_cache_bytes is not None:
        return config.memory.kv_cache_bytes
    if config.model.device == "cpu":
        return CPU_KV_BYTES
    free, total = torch.cuda.mem_get_info(config.model.device)
    return max(0, int(free - (1.0 - config.memory.gpu_memory_utilization) * total - EMBEDDING_BYTES))
