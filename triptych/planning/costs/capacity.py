"""What fits into the memory of an instance of each role, from a model's config and a data sheet alone.

    device memory
    |- reserved                        1 - utilization: what the implementation leaves to others
    |- weights                         of the halves that the role needs
    |- embedding cache                 where a role encodes or prefills
    '- free
       |- KV cache                     kv_fraction of it, where the role has the language model
       '- activations                  the rest: one step over the whole batch

A batch is computed in one step, as the paper counts: all units of all its pictures, then all its prompts. An engine
that cuts steps into chunks takes more: say how long they are (`Runtime.max_num_batched_tokens`, `max_encode_tokens`).
The embedding cache must hold what one step encodes or prefills; a request that is alone may be encoded unit by unit.

The constants that are no fact of a model or a device are fields of `Runtime`, and `PAPER` has those of the paper's
system. `docs/capacity.md` compares the outcome with all published cells.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from triptych.config import EMBEDDING_BLOCK_TOKENS
from triptych.core import Role, Stage
from triptych.errors import ConfigError
from triptych.planning.costs.embedding_room import blocks_of, least_blocks
from triptych.planning.costs.hardware import Device
from triptych.planning.model.shape import ModelShape
from triptych.planning.model.tower import Tower
from triptych.planning.model.units import Unit, Units

MOST = 1 << 24  # more pictures or requests than any memory holds

# Numbers that live at the peak of a layer, which is in its MLP: what comes in and what goes around it, the step's input
# and the attention's output, each as wide as the layer; and within the MLP the width before and behind the activation.
HIDDEN_COPIES = 4
# In eager attention: what comes in, what goes around it, queries, keys and values; and for each head and pair of
# positions the scores, their softmax in 32 bits, and its copy in the type of the weights.
EAGER_HIDDEN_COPIES = 5
EAGER_SOFTMAX_BYTES = 4
PIXEL_BYTES = 4  # as they arrive on the device, beside a copy in the type of the weights


class Limit(StrEnum):
    """Why not one more."""

    WEIGHTS = "weights do not fit"
    MEMORY = "memory"  # activations of one step
    KV = "KV cache"
    CACHE = "embedding cache"
    CONTEXT = "context"
    NONE = "any number"  # steps take it in parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What an implementation keeps in memory beside weights and caches."""

    utilization: float = 0.9  # of the device; as vLLM and this engine by default
    embedding_bytes: float | None = None  # of the cache; None: room for the rows of one longest prompt
    embedding_units: int = 0  # or for so many of the model's largest units; then any number of requests shares them
    pixels_reach_prefill: bool = False  # whether tensors of pixels go on to prefill with the request
    max_num_batched_tokens: int | None = None  # of a prefill step; None: all prompts of a batch at once
    max_encode_tokens: int | None = None  # rows of an encode step, as long as one unit has no more; None: all at once


# vLLM 0.6.1, from which the paper's system takes its workers, uses 0.9 of a device; App. E.1 of the paper: 3,000 blocks
# of one slice each; its workers of all stages get the request with its pixels (Table 3: MiniCPM-V's P holds a quarter
# less than the language model alone explains, which is what they take, and the same fits the other two models).
PAPER = Runtime(utilization=0.9, embedding_units=3000, pixels_reach_prefill=True)
TRIPTYCH = Runtime()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request, as all of them are. Numbers of tokens are those of the paper's synthetic workload."""

    width: int
    height: int
    images: int = 1
    text_tokens: int = 22
    output_tokens: int = 10


@dataclass(frozen=True, slots=True)
class Most:
    """The largest number, and why there is not one more."""

    number: int
    limit: Limit


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleCapacity:
    """Of one instance. Bytes unless the name says otherwise."""

    role: Role
    weights: int
    weights_saved: float  # share of the whole model's that the role does without
    embedding_cache: int
    free: int  # below 0: the weights do not fit
    kv_tokens: int
    images_per_request: Most  # of one request alone
    batch: Most  # of requests as asked


def capacities(
    shape: ModelShape, device: Device, ask: Ask, *, kv_fraction: float = 0.8, runtime: Runtime = TRIPTYCH
) -> list[RoleCapacity]:
    """Of every role. Raises ConfigError for a fraction or a number outside its range."""
    return [Capacity(shape, device, role, ask, kv_fraction=kv_fraction, runtime=runtime).found() for role in Role]


def together(found: list[RoleCapacity], roles: tuple[Role, ...]) -> Most:
    """Pictures of one request that passes through instances of all these roles."""
    chosen = [capacity.images_per_request for capacity in found if capacity.role in roles]
    return min(chosen, key=lambda most: most.number)


class Capacity:
    """The memory of one instance of a role."""

    def __init__(
        self,
        shape: ModelShape,
        device: Device,
        role: Role,
        ask: Ask,
        *,
        kv_fraction: float = 0.8,
        runtime: Runtime = TRIPTYCH,
    ) -> None:
        _check(ask, kv_fraction, runtime)
        self.shape, self.role, self._ask, self._fraction = shape, role, ask, kv_fraction
        self._prefills, self._decodes = Stage.PREFILL in role.stages, Stage.DECODE in role.stages
        self._runtime = runtime
        self.weights = role_weights(shape, role)
        self.embedding_cache = self._cache_bytes() if role.encodes or self._prefills else 0
        self.free = int(device.memory * runtime.utilization - self.weights - self.embedding_cache)
        kv_bytes = kv_fraction * self.free if role.has_language_model else 0.0
        self._kv_bytes = max(0.0, kv_bytes)
        self._step_bytes = max(0.0, self.free - kv_bytes)

    def found(self) -> RoleCapacity:
        return RoleCapacity(
            role=self.role,
            weights=self.weights,
            weights_saved=1 - self.weights / (self.shape.parameters * self.shape.weight_bytes),
            embedding_cache=self.embedding_cache,
            free=self.free,
            kv_tokens=int(self._kv_bytes / self.shape.kv_token_bytes),
            images_per_request=self.most_images(),
            batch=self.most_requests(),
        )

    def most_images(self) -> Most:
        """In a request that is alone."""
        return _largest(lambda images: self.limit(images, 1))

    def most_requests(self) -> Most:
        """With as many pictures each as asked."""
        return _largest(lambda batch: self.limit(self._ask.images, batch))

    def limit(self, images: int, batch: int) -> Limit | None:
        """Why so many requests with so many pictures each do not fit; None if they do."""
        if self.free <= 0:
            return Limit.WEIGHTS
        prompt = self.prompt_tokens(images)
        if self.role.has_language_model and prompt + self._ask.output_tokens > self.shape.context:
            return Limit.CONTEXT
        if self.step_bytes(images, batch) > self._step_bytes:
            return Limit.MEMORY
        if self.role.has_language_model and batch * self._kv_of(prompt) > self._kv_bytes:
            return Limit.KV
        return None if self._cache_holds(images, batch) else Limit.CACHE

    def prompt_tokens(self, images: int) -> int:
        return self._ask.text_tokens + images * self.shape.prompt_tokens(self._units(images))

    def step_bytes(self, images: int, batch: int) -> float:
        """Activations of the largest of the steps that the role makes."""
        encode = self._encode_step(images, batch) if self.role.encodes else 0.0
        prefill = self._prefill_step(images, batch) if self._prefills else 0.0
        decode = batch * token_bytes(self.shape) if self._decodes else 0.0
        return max(encode, prefill, decode)

    def _encode_step(self, images: int, batch: int) -> float:
        return self._encoded(images, batch) * images * encode_bytes(self.shape, self._units(images))

    def _encoded(self, images: int, batch: int) -> float:
        """Requests whose pictures one step encodes; less than 1 where it is a part of them."""
        if self._runtime.max_encode_tokens is None:
            return batch
        rows = [unit.rows for unit in self._units(images)]
        return min(batch, max(self._runtime.max_encode_tokens, *rows, 1) / (images * sum(rows)))

    def _prefilled(self, images: int, batch: int) -> float:
        """Requests that one step prefills, likewise."""
        if self._runtime.max_num_batched_tokens is None:
            return batch
        return min(batch, self._runtime.max_num_batched_tokens / self.prompt_tokens(images))

    def _prefill_step(self, images: int, batch: int) -> float:
        units, beside = self._units(images), 0.0
        if self._runtime.pixels_reach_prefill:
            beside += pixel_bytes(self.shape, units)
        if self.role.encodes:  # what the encoder gave lives beside the inputs that it was copied into
            beside += sum(unit.rows for unit in units) * self.shape.row_bytes
        of_request = self.prompt_tokens(images) * token_bytes(self.shape) + images * beside
        return self._prefilled(images, batch) * of_request

    def most_kv(self, images: int) -> float | Limit:
        """The largest share of the free memory that the KV cache can have where one request of so many pictures comes
        (the paper's Table 8), or what is in the way."""
        if self.free <= 0:
            return Limit.WEIGHTS
        share = 1 - self.step_bytes(images, 1) / self.free
        if share <= 0:
            return Limit.MEMORY
        is_longer = self.prompt_tokens(images) + self._ask.output_tokens > self.shape.context
        return Limit.CONTEXT if is_longer else share

    def _cache_bytes(self) -> int:
        runtime, row_bytes = self._runtime, self.shape.row_bytes
        if runtime.embedding_bytes is not None:
            return int(runtime.embedding_bytes)
        if runtime.embedding_units:
            return runtime.embedding_units * max(unit.rows for unit in self._units(1)) * row_bytes
        blocks = math.ceil(self.shape.context * max(map(self._blocks_of_row, (1, 2)))) + 1
        return least_blocks(self.role, blocks, blocks) * EMBEDDING_BLOCK_TOKENS * row_bytes

    def _cache_holds(self, images: int, batch: int) -> bool:
        if not (self.role.encodes or self._prefills):
            return True
        units, row_bytes = self._units(images), self.shape.row_bytes
        if self._runtime.embedding_units:
            return images * sum(unit.rows for unit in units) * row_bytes <= self.embedding_cache
        of_request = images * sum(blocks_of(unit.rows) for unit in units)
        encoded = max(blocks_of(unit.rows) for unit in units)
        if batch > 1:
            encoded = max(encoded, math.ceil(self._encoded(images, batch) * of_request))
        prefilled = of_request * math.ceil(self._prefilled(images, batch))
        needed = least_blocks(self.role, encoded, prefilled)
        return needed <= self.embedding_cache // (EMBEDDING_BLOCK_TOKENS * row_bytes)

    def _blocks_of_row(self, images: int) -> float:
        units = self._units(images)
        return sum(blocks_of(unit.rows) for unit in units) / sum(unit.rows for unit in units)

    def _kv_of(self, prompt: int) -> float:
        tokens = prompt + (self._ask.output_tokens if self._decodes else 0)
        return tokens * self.shape.kv_token_bytes + self.shape.kv_sequence_bytes

    def _units(self, images: int) -> Units:
        return self.shape.image_units(self._ask.width, self._ask.height, images)


def _check(ask: Ask, kv_fraction: float, runtime: Runtime) -> None:
    if not 0 < kv_fraction < 1:
        raise ConfigError(f"--kv-fraction: {kv_fraction:g} is not valid; a number above 0 and below 1 is needed")
    if not 0 < runtime.utilization <= 1:
        raise ConfigError(f"--utilization: {runtime.utilization:g} is not valid; above 0 and at most 1 is needed")
    if runtime.embedding_bytes is not None and not 0 < runtime.embedding_bytes < math.inf:
        raise ConfigError(f"--embedding-cache: {runtime.embedding_bytes:g} B is not valid; above 0 B is needed")
    for key, number, least in (
        ("max-num-batched-tokens", runtime.max_num_batched_tokens, 1),
        ("max-encode-tokens", runtime.max_encode_tokens, 1),
        ("image", min(ask.width, ask.height), 1),
        ("images-per-request", ask.images, 1),
        ("text-tokens", ask.text_tokens, 0),
        ("output-tokens", ask.output_tokens, 1),
    ):
        if number is not None and not least <= number <= MOST:
            raise ConfigError(f"--{key}: {number} is not valid; a number from {least} to {MOST} is needed")


def _largest(limit: Callable[[int], Limit | None]) -> Most:
    """By doubling and halving: more never fit where fewer do not."""
    reason = limit(1)
    if reason is not None:
        return Most(0, reason)
    low, high = 1, 2
    while high <= MOST and limit(high) is None:
        low, high = high, 2 * high
    if high > MOST:
        return Most(MOST, Limit.NONE)
    while high - low > 1:
        middle = (low + high) // 2
        if limit(middle) is None:
            low = middle
        else:
            high = middle
    reason = limit(high)
    assert reason is not None, f"{high} fit after all"
    return Most(low, reason)


def role_weights(shape: ModelShape, role: Role) -> int:
    """Bytes."""
    numbers = shape.encoder_parameters * role.encodes + shape.language_parameters * role.has_language_model
    return numbers * shape.weight_bytes


# ---- activations


def encode_bytes(shape: ModelShape, units: Units) -> float:
    """Of one picture, encoded whole, with its pixels."""
    assert shape.vision is not None, f"{shape.name} takes no pictures"
    return sum(layer_bytes(shape.vision, unit, shape.weight_bytes) for unit in units) + pixel_bytes(shape, units)


def layer_bytes(tower: Tower, unit: Unit, weight_bytes: int) -> float:
    """Of the larger half of a layer: the MLP, or attention where that writes down its scores."""
    inner = (3 if tower.gated else 2) * tower.intermediate
    mlp = unit.positions * (inner + HIDDEN_COPIES * tower.hidden) * weight_bytes
    if not tower.eager:
        return mlp
    scores = tower.heads * unit.positions**2 * (2 * weight_bytes + EAGER_SOFTMAX_BYTES)
    return max(mlp, scores + unit.positions * EAGER_HIDDEN_COPIES * tower.hidden * weight_bytes)


def pixel_bytes(shape: ModelShape, units: Units) -> float:
    tower = shape.vision
    assert tower is not None, f"{shape.name} takes no pictures"
    positions = sum(unit.positions - tower.class_positions for unit in units)
    return positions * tower.inputs * (PIXEL_BYTES + shape.weight_bytes)


def token_bytes(shape: ModelShape) -> float:
    """Of one token of a prompt in the language model."""
    language = shape.language
    return (3 * language.intermediate + HIDDEN_COPIES * language.hidden) * shape.weight_bytes
