"""A profile from a model's config and a data sheet: a roofline with stated efficiencies, for hardware that is not at
hand.

A step takes the time of what it computes or of what it reads from memory, whichever is longer. `Costs` are linear, so
that a step is exact where it is empty (weights are read) and where it is full (compute decides), and a little too slow
between. Work of towers that take whole pictures grows with the square of these, as that of prompts.

Nothing here was measured on the device; a profile of `triptych profile` replaces it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from triptych import __version__
from triptych.errors import ConfigError
from triptych.planning.costs.capacity import encode_bytes, token_bytes
from triptych.planning.costs.fit import Sample, fit
from triptych.planning.costs.hardware import Device
from triptych.planning.costs.profile import USUAL, Made, Memory, Profile, StageCosts
from triptych.planning.model.shape import ModelShape
from triptych.planning.model.tower import Tower
from triptych.planning.model.units import Unit
from triptych.planning.quantities import Bytes, BytesPerSecond, DollarsPerHour, Seconds

FULL_STEP = USUAL.max_num_batched_tokens  # of a prefill step, as the engine bounds them
FULL_BATCH = 64  # sequences of a decode step
ROWS_OF_STEP = USUAL.max_encode_tokens  # of an encode step, as the engine bounds them
LARGE_PICTURE = (1344, 1344)  # whose units fill an encode step
PICTURES = ((224, 224), (448, 448), LARGE_PICTURE, (4032, 3024))  # whose units say what rows cost
CLIPS = (1.0, 10.0, 30.0)  # seconds, likewise
OF_UNIT = ("encode_unit", "encode_row", "encode_pair")
COLLECTIVES_OF_LAYER = 2  # behind attention and behind the MLP


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """How much of a data sheet's peak is reached, and what no data sheet has.

    All are assumptions in the middle of what engines publish; a profile that was measured needs none of them.

    - encode: of FLOP/s. Towers are narrow (about 1,000 wide), with short sequences and many small kernels.
    - prefill: of FLOP/s. Matrices of 7B models with thousands of tokens: 50 to 65% is usual on an A100.
    - decode: of memory bandwidth. Weights are read in large pieces; 60 to 80% is usual.
    - link: of a link's bytes per second, between peers and to the host. Copies of megabytes reach 80 to 90%.
    - *_launch: of a step, beside its kernels' work: scheduling, and kernels too small to fill the device.
    - pixel: of preparing a picture on one host core. Measured on one core of a server: a JPEG of 4032x3024 takes 4 ns
      for each pixel to decode (Pillow) and 20 ns to cut into tiles of 448 (transformers).
    - collective: latency of one all-reduce.
    """

    encode: float = 0.45
    prefill: float = 0.6
    decode: float = 0.7
    link: float = 0.8
    encode_launch: float = 0.005
    prefill_launch: float = 0.008
    decode_launch: float = 0.004
    pixel: float = 25e-9
    item: float = 0.002  # of opening a file
    arrival: float = 0.005  # HTTP, headers, tokens
    message: float = 0.0005
    transfer: float = 0.001
    collective: float = 10e-6
    switch_books: float = 0.05


EFFICIENCY = Efficiency()


def analytic_profile(
    shape: ModelShape,
    device: Device,
    *,
    tensor_parallel: int = 1,
) -> Profile:
    """Of an instance that is spread over `tensor_parallel` devices.

    Raises ConfigError for a degree that no engine can spread the heads of the language model over, and for a device on
    which nothing ends.
    """
    _check_degree(shape, tensor_parallel)
    machine = _Machine(shape, device, tensor_parallel)
    try:
        costs, memory = machine.costs(), machine.memory()
    except ValueError as error:
        raise ConfigError(f"--gpu: {shape.name} on {device.name or 'the device'}: {error}") from None
    return Profile(
        model=shape.name,
        hardware=device.name or "device",
        kind="analytic",
        tensor_parallel=tensor_parallel,
        costs_of_steps=costs,
        memory=memory,
        price=None if device.price is None else DollarsPerHour(device.price * tensor_parallel),
        made=Made(
            date=datetime.now(UTC).date().isoformat(),
            version=__version__,
            device=device.name,
            notes=("computed from a config and a data sheet; nothing was measured", device.source),
        ),
    )


def _check_degree(shape: ModelShape, degree: int) -> None:
    heads, kv_heads = shape.language.heads, shape.language.kv_heads
    if degree < 1 or heads % degree:
        raise ConfigError(f"--tensor-parallel: {degree} does not divide the {heads} heads of {shape.name}")
    if kv_heads % degree and degree % kv_heads:
        raise ConfigError(
            f"--tensor-parallel: {degree} neither divides the {kv_heads} heads of KV of {shape.name} nor is a multiple "
            "of them"
        )


class _Machine:
    """One instance. Seconds, unless the name says otherwise."""

    def __init__(self, shape: ModelShape, device: Device, degree: int) -> None:
        self._shape, self._device, self._degree = shape, device, degree
        # Where there are more devices than heads of KV, several have the same head.
        self._kv_token_bytes = shape.kv_token_bytes * max(1, degree // shape.language.kv_heads)
        self._read_rate = device.memory_bandwidth * EFFICIENCY.decode * degree
        self._link_rate = device.link * EFFICIENCY.link

    def costs(self) -> StageCosts:
        efficiency, shape = EFFICIENCY, self._shape
        seconds = {**self._encode(), **self._prefill(), **self._decode()}
        steps: dict[str, Any] = {name: Seconds(value) for name, value in seconds.items()}
        host_rate = self._device.host_link * efficiency.link * self._degree
        halves = max(shape.encoder_parameters, shape.language_parameters) * shape.weight_bytes
        return StageCosts(
            **steps,
            encode_item=Seconds(efficiency.item),
            encode_pixel=Seconds(efficiency.pixel),
            arrival=Seconds(efficiency.arrival),
            message=Seconds(efficiency.message),
            transfer=Seconds(efficiency.transfer),
            bytes_per_second=BytesPerSecond(self._link_rate * self._degree),
            host_bytes_per_second=BytesPerSecond(host_rate),
            switch_weights=Seconds(efficiency.switch_books + halves / host_rate),
            switch_books=Seconds(efficiency.switch_books),
        )

    def memory(self) -> Memory:
        shape = self._shape
        return Memory(
            device=Bytes(self._device.memory * self._degree),
            encoder_weights=Bytes(shape.encoder_parameters * shape.weight_bytes),
            language_weights=Bytes(shape.language_parameters * shape.weight_bytes),
            encode_activations=Bytes(self._encode_activations()),
            language_activations=Bytes(FULL_STEP * token_bytes(shape)),
            runtime=Bytes(0.5e9 * self._degree),  # a CUDA context and its libraries
            kv_token=Bytes(self._kv_token_bytes),
            kv_sequence=Bytes(shape.kv_sequence_bytes),
            embedding_row=Bytes(shape.row_bytes),
            context_len=shape.context,
        )

    # ---- encode

    def _encode(self) -> dict[str, float]:
        """The cost of a unit by its rows; where all have as many, that of any."""
        seconds = {float(unit.rows): self._unit_cost(unit, tower) for unit, tower in self._units()}
        costs = dict.fromkeys(OF_UNIT, 0.0)
        if len(seconds) == 1:
            costs["encode_unit"] = seconds.popitem()[1]
        else:
            amounts = {rows: dict(zip(OF_UNIT, (1.0, rows, rows**2), strict=True)) for rows in seconds}
            costs = fit([Sample(amounts[rows], value) for rows, value in seconds.items()], OF_UNIT).costs
        return {"encode_step": EFFICIENCY.encode_launch} | costs

    def _units(self) -> Iterator[tuple[Unit, Tower]]:
        """Those of small items and of large ones."""
        shape = self._shape
        if shape.vision is not None:
            yield from ((unit, shape.vision) for size in PICTURES for unit in shape.image_units(*size))
        else:
            assert shape.sound is not None, f"{shape.name} has no tower"
            yield from ((unit, shape.sound) for clip_s in CLIPS for unit in shape.audio_units(clip_s))

    def _unit_cost(self, unit: Unit, tower: Tower) -> float:
        flops = self._shape.encode_flops(unit, sound=tower is self._shape.sound)
        moved = tower.layers * unit.positions * tower.hidden * self._shape.weight_bytes
        compute = flops / (self._device.flops * EFFICIENCY.encode * self._degree)
        return compute + self._reduce(moved) + self._latency(tower.layers)

    def _encode_activations(self) -> float:
        """Of a step over as many rows as a step takes."""
        if self._shape.vision is None:
            return 0.0
        units = self._shape.image_units(*LARGE_PICTURE)
        rows = sum(unit.rows for unit in units)
        return encode_bytes(self._shape, units) * max(1.0, ROWS_OF_STEP / rows)

    # ---- prefill and decode

    def _prefill(self) -> dict[str, float]:
        language, full = self._shape.language, float(FULL_STEP)
        read = self._weights_read(FULL_STEP)
        token = language.flops_per_token / self._compute_rate + self._reduce_token()
        busy = max(read, full * token)
        head = language.flops_of_head / self._compute_rate
        return {
            "prefill_step": EFFICIENCY.prefill_launch + read + head + self._latency(language.layers),
            "prefill_token": (busy - read) / full,
            "prefill_pair": language.flops_per_pair / self._compute_rate,
        }

    def _decode(self) -> dict[str, float]:
        language = self._shape.language
        one, full = self._weights_read(1), self._weights_read(FULL_BATCH)
        compute = (language.flops_per_token + language.flops_of_head) / self._compute_rate
        return {
            "decode_step": EFFICIENCY.decode_launch + one + self._latency(language.layers),
            "decode_sequence": max((full - one) / FULL_BATCH, compute) + self._reduce_token(),
            "decode_context": self._kv_token_bytes / self._read_rate,
        }

    @property
    def _compute_rate(self) -> float:
        """FLOP/s of the language model."""
        return self._device.flops * EFFICIENCY.prefill * self._degree

    def _weights_read(self, tokens: int) -> float:
        """Those that so many tokens meet: of experts, all as soon as there are a few dozen tokens."""
        language = self._shape.language
        head = language.vocab * language.hidden
        everything = language.parameters - language.embedding - language.head
        numbers = min(everything, language.active * tokens) + head
        return numbers * self._shape.weight_bytes / self._read_rate

    def _reduce_token(self) -> float:
        language = self._shape.language
        return self._reduce(language.layers * language.hidden * self._shape.weight_bytes)

    def _reduce(self, moved_bytes: float) -> float:
        """All-reduces in a ring of what each layer gives, twice."""
        share = 2 * (self._degree - 1) / self._degree
        return COLLECTIVES_OF_LAYER * share * moved_bytes / self._link_rate

    def _latency(self, layers: int) -> float:
        return COLLECTIVES_OF_LAYER * layers * EFFICIENCY.collective if self._degree > 1 else 0.0
