"""The books of one instance together."""

from dataclasses import dataclass

from triptych.core import BlockHash, UnitHash
from triptych.memory.embedding_cache import EmbeddingCache
from triptych.memory.kv_cache import KVCache
from triptych.memory.leases import Leases
from triptych.messages import PoolUsage


@dataclass(slots=True)
class Pools:
    """A pool that the role has no use for is None."""

    leases: Leases
    kv: KVCache | None = None
    embeddings: EmbeddingCache | None = None

    def usage(self) -> dict[str, PoolUsage]:
        """By the region of memory that a pool divides."""
        found: dict[str, PoolUsage] = {}
        if self.kv is not None:
            found["kv"] = self.kv.usage()
        if self.embeddings is not None:
            found["embedding"] = self.embeddings.usage()
        return found

    def take_evicted_units(self) -> list[UnitHash]:
        """Those that were given up since the last call."""
        if self.embeddings is None:
            return []
        units, self.embeddings.evicted = self.embeddings.evicted, []
        return units

    def take_evicted_blocks(self) -> list[BlockHash]:
        if self.kv is None:
            return []
        blocks, self.kv.evicted = self.kv.evicted, []
        return blocks

    def check_integrity(self) -> None:
        for pool in (self.kv, self.embeddings):
            if pool is not None:
                pool.check_integrity()
