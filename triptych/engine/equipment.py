"""What an instance works with in its present role: books, state machines, and what computes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from triptych.config import InstanceConfig
from triptych.core import Chunk, EncodeWork, SampledToken
from triptych.engine.pools import Pools
from triptych.errors import RequestError
from triptych.stages.decode import DecodeStage
from triptych.stages.encode import EncodeStage
from triptych.stages.prefill import PrefillStage
from triptych.transfer.select import Transfers


class EncodeRuns(Protocol):
    """`model.encoder.EncodeRunner`, or a cost model."""

    def run(self, works: list[EncodeWork]) -> list[RequestError | None]: ...


class LanguageRuns(Protocol):
    """`model.language.LanguageRunner`, or a cost model."""

    def run(self, chunks: list[Chunk]) -> list[SampledToken]: ...
    def offload(self, blocks: list[int]) -> Any: ...
    def restore(self, saved: Any, blocks: list[int]) -> None: ...


@dataclass(slots=True)
class Stages:
    """The state machines of the role, in the order of the data; one that it does not serve is None."""

    encode: EncodeStage | None = None
    prefill: PrefillStage | None = None
    decode: DecodeStage | None = None


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
    stages: Stages
    runners: Runners
    transfers: Transfers
    set_threads: Callable[[bool], None] = lambda beside_encoders: None
    steps_s: dict[str, float] = field(default_factory=dict)
