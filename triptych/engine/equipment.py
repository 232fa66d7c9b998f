"""What an instance works with in its present role: books, state machines, and what computes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from triptych.config import InstanceConfig
from triptych.core import Chunk, EncodeWork, SampledToken
from triptych.errors import RequestError
from triptych.memory.pools import Pools
from triptych.stages.group import StageGroup
from triptych.transfer.select import Transfers

UNIT_SOURCES = ("cached", "transferred", "prefix")  # of units that were not encoded for the request that needed them


class EncodeRuns(Protocol):
    """`model.encoder.EncodeRunner`, or a cost model."""

    def run(self, works: list[EncodeWork]) -> list[RequestError | None]: ...


class LanguageRuns(Protocol):
    """`model.language.LanguageRunner`, or a cost model."""

    def run(self, chunks: list[Chunk]) -> list[SampledToken]: ...
    def offload(self, blocks: list[int]) -> Any: ...
    def restore(self, saved: Any, blocks: list[int]) -> None: ...


@dataclass(slots=True)
class Runners:
    """What computes; None where the role has no such stage."""

    encode: EncodeRuns | None = None
    language: LanguageRuns | None = None


@dataclass(slots=True)
class Equipment:
    """What depends on the role of an instance. `set_threads` is told before every language step whether a request
    waits for encoders. `steps_s`: how long each step of making this took."""

    config: InstanceConfig
    pools: Pools
    stages: StageGroup
    runners: Runners
    transfers: Transfers
    set_threads: Callable[[bool], None] = lambda beside_encoders: None
    steps_s: dict[str, float] = field(default_factory=dict)

    @property
    def counters(self) -> dict[str, float]:
        """Totals since it was made."""
        stages, embeddings = self.stages, self.pools.embeddings
        counters = {f"transfer_{name}": float(n) for name, n in self.transfers.counters.items()}
        if stages.encode is not None:
            counters["encode_units_computed"] = float(stages.encode.num_computed)
        if stages.prefill is not None:
            counters |= {f"encode_units_{source}": float(stages.prefill.num_units[source]) for source in UNIT_SOURCES}
            counters["prefix_queries"] = float(stages.prefill.num_prompt_tokens)
            counters["prefix_hits"] = float(stages.prefill.num_cached_tokens)
        if embeddings is not None:
            counters["embedding_hits"] = float(embeddings.num_hits)
            counters["embeddings_evicted"] = float(embeddings.num_evicted)
        if stages.decode is not None:
            counters["decode_offloads"] = float(stages.decode.num_offloads)
        return counters
