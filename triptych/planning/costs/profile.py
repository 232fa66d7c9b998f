"""A profile: what one model costs on one kind of hardware, in time and in memory. Measured by `triptych profile`, or
computed from a config and a data sheet. A file that people read, so its numbers carry their units."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from triptych.config import (
    EMBEDDING_BLOCK_TOKENS,
    GIB,
    KV_BLOCK_TOKENS,
    MemoryConfig,
    SchedulingConfig,
    decode_interval_ms,
    require,
)
from triptych.core import Placement, Role, Stage
from triptych.errors import ConfigError
from triptych.planning import files
from triptych.planning.costs.cost_model import Costs
from triptych.planning.costs.sizes import Sizes
from triptych.planning.quantities import Bytes, BytesPerSecond, DollarsPerHour, Quantity, Seconds

USUAL, USUAL_MEMORY = SchedulingConfig(), MemoryConfig()  # of an engine that is not told
Count = Annotated[int, Meta(ge=1)]
Number = Annotated[int, Meta(ge=0)]
Amount = Annotated[float, Meta(ge=0)]


class StageCosts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Fields of `Costs`, which says what each is. A step takes its fixed part and so much for each of what is in
    it; a part that is left out costs nothing."""

    encode_step: Seconds = Seconds(0)
    encode_item: Seconds = Seconds(0)
    encode_pixel: Seconds = Seconds(0)
    encode_unit: Seconds = Seconds(0)
    encode_row: Seconds = Seconds(0)
    encode_pair: Seconds = Seconds(0)
    prefill_step: Seconds = Seconds(0)
    prefill_sequence: Seconds = Seconds(0)
    prefill_token: Seconds = Seconds(0)
    prefill_pair: Seconds = Seconds(0)
    decode_step: Seconds = Seconds(0)
    decode_sequence: Seconds = Seconds(0)
    decode_few: Seconds = Seconds(0)
    decode_context: Seconds = Seconds(0)
    turn: Seconds = Seconds(0)
    wake: Seconds = Seconds(0)
    encode_crowding: Amount = 0.0
    prefill_crowding: Amount = 0.0
    decode_crowding: Amount = 0.0
    arrival: Seconds = Seconds(0)
    message: Seconds = Seconds(0)
    transfer: Seconds = Seconds(0)
    bytes_per_second: BytesPerSecond
    host_bytes_per_second: BytesPerSecond | None = None  # None: KV goes to host memory and back in no time
    switch_weights: Seconds
    switch_books: Seconds
    cores: Count | None = None  # that all processes share; None: every instance has a device of its own
    server_request: Seconds = Seconds(0)
    server_prompt_token: Seconds = Seconds(0)
    server_item: Seconds = Seconds(0)
    server_media_byte: Seconds = Seconds(0)
    server_step: Seconds = Seconds(0)
    server_token: Seconds = Seconds(0)
    server_report: Seconds = Seconds(0)
    client_request: Seconds = Seconds(0)
    client_token: Seconds = Seconds(0)


class Memory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What fills the memory of one instance."""

    device: Bytes  # all that it has
    encoder_weights: Bytes
    language_weights: Bytes
    encode_activations: Bytes = Bytes(0)  # at most, beside weights and pools, of steps as large as they usually may be
    language_activations: Bytes = Bytes(0)
    runtime: Bytes = Bytes(0)  # before any weight is loaded
    kv_token: Bytes
    kv_sequence: Bytes = Bytes(0)  # recurrent states
    embedding_row: Bytes
    context_len: Count  # prompt and answer of one request, at most

    def of_steps(self, encode_tokens: int, language_tokens: int) -> "Memory":
        """With the activations of steps of at most so many rows, and so many tokens; smaller steps save nothing."""
        return msgspec.structs.replace(
            self,
            encode_activations=Bytes(self.encode_activations * max(1.0, encode_tokens / USUAL.max_encode_tokens)),
            language_activations=Bytes(
                self.language_activations * max(1.0, language_tokens / USUAL.max_num_batched_tokens)
            ),
        )

    def used(self, role: Role) -> float:
        """Bytes that are no pool."""
        encodes, speaks = role.encodes, role.has_language_model
        activations = max(self.encode_activations * encodes, self.language_activations * speaks)
        return self.runtime + self.encoder_weights * encodes + self.language_weights * speaks + activations

    def free(self, role: Role) -> float:
        """Bytes that pools may fill; below 0 where the weights do not fit."""
        return self.device - self.used(role)


class Residual(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How well the costs of a stage describe what was measured: relative errors of its samples."""

    samples: Number
    median: Amount
    worst: Amount


class Made(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When, of what and how."""

    date: str
    version: str
    command: str = ""
    device: str = "cpu"
    dtype: str = ""
    threads: Number = 0  # of one instance; 0 where that means nothing
    notes: tuple[str, ...] = ()


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one instance that is spread over `tensor_parallel` devices; `memory` is of all of them together."""

    model: str
    hardware: str
    kind: Literal["measured", "analytic"]
    tensor_parallel: Count = 1
    costs_of_steps: StageCosts = msgspec.field(name="costs")
    memory: Memory
    price: DollarsPerHour | None = None  # of one instance
    residuals: dict[str, Residual] = {}
    made: Made

    @classmethod
    def load(cls, path: str | Path) -> "Profile":
        """Raises ConfigError naming the file, the key and what is valid there."""
        return files.read(path, cls)

    def save(self, path: str | Path) -> None:
        """Whole or not at all."""
        files.write(path, self)

    def costs(self) -> Costs:
        """For the simulator."""
        fields: dict[str, Any] = msgspec.structs.asdict(self.costs_of_steps)
        fields = {name: float(value) if isinstance(value, Quantity) else value for name, value in fields.items()}
        for name in ("cores", "host_bytes_per_second"):
            fields[name] = math.inf if fields[name] is None else fields[name]
        return Costs(
            **fields,
            threads=max(1, self.made.threads),
            kv_token_bytes=int(self.memory.kv_token),
            embedding_row_bytes=int(self.memory.embedding_row),
        )

    def sizes(
        self,
        role: Role,
        *,
        kv_bytes: float | None = None,
        embedding_bytes: float = USUAL_MEMORY.embedding_cache_bytes,
        max_num_seqs: int = USUAL.max_num_seqs,
        max_num_batched_tokens: int = USUAL.max_num_batched_tokens,
        max_encode_tokens: int = USUAL.max_encode_tokens,
        **bounds: Any,
    ) -> Sizes:
        """Pools and bounds of an instance of this role; `bounds` are further fields of `Sizes`.

        Without `kv_bytes` the KV cache gets what an engine gives it that is not told how much of the device it may use.
        Raises ConfigError where the model, or the longest request, does not fit.
        """
        memory = self.memory.of_steps(max_encode_tokens, max_num_batched_tokens)
        prefills = Stage.PREFILL in role.stages
        embedding_bytes = embedding_bytes if role.encodes or prefills else 0.0
        pool_bytes = 0.0 if role.has_language_model else embedding_bytes  # beside KV they are looked at with it
        require(
            memory.free(role) > pool_bytes,
            "--gpu" if self.kind == "analytic" else "--profile",
            f"{memory.device.short()} of {self.hardware} cannot hold what {role} of {self.model} needs: "
            f"{Bytes(memory.used(role) + pool_bytes).short()}",
        )
        num_kv_blocks = 0
        if role.has_language_model:
            if kv_bytes is None:
                left_bytes = (1 - USUAL_MEMORY.gpu_memory_utilization) * memory.device
                kv_bytes = memory.free(role) - left_bytes - embedding_bytes
            num_kv_blocks = self._num_kv_blocks(role, kv_bytes, max_num_seqs)
        return Sizes(
            num_kv_blocks=num_kv_blocks,
            num_embedding_blocks=int(embedding_bytes / (memory.embedding_row * EMBEDDING_BLOCK_TOKENS)),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_encode_tokens=max_encode_tokens,
            **bounds,
        )

    def as_served(self, placement: Placement) -> dict[Role, Sizes]:
        """Of each role of a placement, what `triptych serve` gives it that is told no more than the device and the
        threads: on a CPU 1 GiB of KV, prefix caching, and answers that slow down for pictures where cores are
        shared."""
        interval_ms, kv_bytes = self.decode_interval_ms(len(placement.roles)), self.usual_kv_bytes
        return {
            role: self.sizes(role, kv_bytes=kv_bytes, prefix_caching=True, decode_interval_ms=interval_ms)
            for role in set(placement.roles)
        }

    @property
    def usual_kv_bytes(self) -> float | None:
        """Of an engine that is not told: 1 GiB on a CPU. None: what is left of a device."""
        return GIB if self.made.device == "cpu" else None

    def decode_interval_ms(self, num_instances: int) -> float:
        """To which answers slow down in a server of so many instances with the threads that were measured."""
        return decode_interval_ms(num_instances, max(1, self.made.threads), self.costs().cores)

    def with_costs(self, costs: Costs) -> "Profile":
        """With those of the fields of `costs` that stand in a profile."""
        fields = {
            name: type(value)(getattr(costs, name))
            for name, value in msgspec.structs.asdict(self.costs_of_steps).items()
            if isinstance(value, Seconds)
        }
        return msgspec.structs.replace(self, costs_of_steps=msgspec.structs.replace(self.costs_of_steps, **fields))

    def _num_kv_blocks(self, role: Role, kv_bytes: float, max_num_seqs: int) -> int:
        """As many as fit; more than all sequences of a full batch could ever fill are of no use."""
        memory = self.memory
        block_bytes = memory.kv_token * KV_BLOCK_TOKENS
        longest = math.ceil(memory.kv_sequence / block_bytes) + math.ceil(memory.context_len / KV_BLOCK_TOKENS) + 1
        num_blocks = min(int(kv_bytes / block_bytes), longest * max_num_seqs)
        if num_blocks < longest:
            raise ConfigError(
                f"{role} of {self.model} on {self.hardware}: a request of {memory.context_len} tokens needs "
                f"{Bytes(longest * block_bytes).short()} for its KV, {Bytes(max(0.0, kv_bytes)).short()} are free"
            )
        return num_blocks
