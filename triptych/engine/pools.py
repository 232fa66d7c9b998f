"""How much memory a role gets, and for what."""

import math
import secrets
from dataclasses import dataclass
from typing import Self

import torch
from transformers import PreTrainedConfig

from triptych.config import (
    EMBEDDING_BLOCK_TOKENS,
    GIB,
    KV_BLOCK_TOKENS,
    InstanceConfig,
    MemoryConfig,
    ModelConfig,
    require,
)
from triptych.core import Stage
from triptych.memory.embedding_cache import EmbeddingCache
from triptych.memory.kv_cache import KVCache
from triptych.memory.leases import Leases
from triptych.memory.pools import Pools
from triptych.model.caches import EmbeddingLayout, KVLayout, blocks_that_fit
from triptych.model.loading import load_config, resolve_dtype, resolve_max_model_len
from triptych.model.probe import embedding_layout, kv_layout

CPU_KV_BYTES = GIB


@dataclass(frozen=True)
class Layouts:
    """What a block holds: the same for every instance of a model."""

    kv: KVLayout
    embedding: EmbeddingLayout

    @classmethod
    def of(cls, model: ModelConfig, hf_config: PreTrainedConfig) -> Self:
        dtype = resolve_dtype(model, hf_config)
        return cls(kv_layout(hf_config, dtype), embedding_layout(hf_config, dtype))


@dataclass(frozen=True)
class PoolPlan:
    """How many blocks a role gets; 0 of those that it has no use for."""

    layouts: Layouts
    num_kv_blocks: int
    num_embedding_blocks: int

    def sizes(self) -> dict[str, tuple[int, int, str]]:
        """What the slab is carved into: name -> block bytes, number of blocks, layout."""
        sizes = {}
        if self.num_kv_blocks:
            kv = self.layouts.kv
            sizes["kv"] = (kv.block_bytes, self.num_kv_blocks, kv.layout)
        if self.num_embedding_blocks:
            embedding = self.layouts.embedding
            sizes["embedding"] = (embedding.block_bytes, self.num_embedding_blocks, embedding.layout)
        return sizes

    def make_pools(self, *, prefix_caching: bool) -> Pools:
        """Lease ids start at random: a release for an earlier incarnation never meets a lease of this one."""
        pools = Pools(Leases(first_id=secrets.randbits(48)))
        if self.num_kv_blocks:
            pools.kv = KVCache(
                self.num_kv_blocks,
                KV_BLOCK_TOKENS,
                state_blocks=self.layouts.kv.state_blocks,
                prefix_caching=prefix_caching,
            )
        if self.num_embedding_blocks:
            pools.embeddings = EmbeddingCache(self.num_embedding_blocks, EMBEDDING_BLOCK_TOKENS)
        return pools


def plan_pools(config: InstanceConfig, layouts: Layouts, max_model_len: int) -> PoolPlan:
    """Sizes the pools of a role. Raises ConfigError if the longest request would not fit."""
    stages, kv, embedding = config.role.stages, layouts.kv, layouts.embedding
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
    return PoolPlan(layouts, num_kv_blocks, num_embedding_blocks)


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


def _kv_bytes(config: InstanceConfig) -> int:
    if config.memory.kv_cache_bytes is not None:
        return config.memory.kv_cache_bytes
    if config.model.device == "cpu":
        return CPU_KV_BYTES
    free, total = torch.cuda.mem_get_info(config.model.device)
    return max(
        0, int(free - (1.0 - config.memory.gpu_memory_utilization) * total - config.memory.embedding_cache_bytes)
    )
