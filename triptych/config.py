"""Frozen configuration, validated once and passed down in parts: a class takes the part it needs."""

import re
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from triptych.core import InstanceId, Role
from triptych.errors import ConfigError

KV_BLOCK_TOKENS = 16  # the block size of vLLM and of the paper
EMBEDDING_BLOCK_TOKENS = 16
ITEMS_AT_HAND = 4  # pictures, videos and clips that an encoder has read and keeps

GIB = 1 << 30

# Where instances share CPU cores: what one that only encodes yields to those that answer, and the time per token to
# which answers slow down while a request waits for encoders. Time per token wants encoding to yield, time to first
# token of pictures wants it not to. Measured with 2e1pd on two cores, 8 pictures, 4 clients: at a niceness of 0 decode
# steps take 5 times as long beside encoders, at 3 twice, at 5 and more once and a half, but then pictures wait.
ENCODE_NICENESS = 5
SHARED_DECODE_INTERVAL_MS = 30.0


def decode_interval_ms(num_instances: int, threads: int, cores: float) -> float:
    """Time per token to which answers slow down where nobody says: 0.0, not at all, unless instances with so many
    threads each have more of them than there are cores. Infinite `cores`: every instance has a device of its own."""
    return SHARED_DECODE_INTERVAL_MS if num_instances * threads > cores else 0.0


Count = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(gt=0, le=1)]
Seconds = Annotated[float, Meta(gt=0)]


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Which checkpoint, and how it is loaded."""

    path: str  # a local folder in Hugging Face format
    name: str  # what clients call it
    revision: str = ""  # part of every unit hash, so that two revisions never share an embedding
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: the checkpoint's own
    device: str = "cpu"  # or cuda, cuda:1
    load_format: Literal["auto", "dummy"] = "auto"  # dummy: random weights from the config alone
    max_model_len: Count | None = None  # prompt + output tokens of one request; None: what model and memory allow
    seed: int = 0  # of dummy weights

    def __post_init__(self) -> None:
        known = re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", self.device) is not None
        require(known, "device", f"{self.device!r} is none of cpu, cuda, cuda:N")


class MemoryConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of the pools of one instance. On CPU pages are taken when first written."""

    kv_cache_bytes: Count | None = None  # None: CPU 1 GiB (or less where it can never be filled), CUDA by utilisation
    embedding_cache_bytes: Count = GIB // 4
    prefix_caching: bool = True  # KV of equal beginnings is computed once
    gpu_memory_utilization: Share = 0.9


class SchedulingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one step."""

    max_num_seqs: Count = 64  # sequences that decode together
    max_num_batched_tokens: Count = 2048  # tokens of one language step: decodes first, prefill chunks fill the rest
    max_encode_tokens: Count = 1024  # embedding rows of one encode step, a bound of memory; a larger unit goes alone
    parallel_encode: bool = True  # units of one request on all encode instances (IRP)
    streamed_prefill: bool = True  # prefill starts on the prefix whose embeddings are here
    chunked_kv_transfer: bool = True  # KV goes to decode after every chunk of prefill
    decode_interval_ms: Annotated[float, Meta(ge=0)] | None = None  # see Engine; None: where CPU cores are shared

    def __post_init__(self) -> None:
        require(
            self.max_num_batched_tokens > self.max_num_seqs,
            "max_num_batched_tokens",
            f"{self.max_num_batched_tokens} leaves no room for prefill beside max_num_seqs={self.max_num_seqs} decodes",
        )


TransferMode = Literal["auto", "shm", "nixl"]


class InstanceConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one worker process is told at its start."""

    id: InstanceId
    role: Role
    epoch: str  # new for every process start
    server_pid: int  # the process that starts and stops this one
    inbox: str  # address this instance listens on
    frontend: str  # address of the frontend's inbox
    threads: Count  # CPU threads for tensor work
    threads_beside_encoders: Count | None = None  # while encoders work for a request here; None: as many
    niceness: Annotated[int, Meta(ge=0, le=19)] = 0  # what its threads are worth where they share cores with others
    transfer: TransferMode
    model: ModelConfig
    memory: MemoryConfig
    scheduling: SchedulingConfig
    heartbeat_s: float = 0.25
    alive_interval_s: float = 0.25  # between two `Alive`
    log_level: str = "info"
    black_box: str | None = None  # file that names the requests of the step that runs, readable after a crash
    timeline: bool = False  # every step is told to the frontend


Schedule = Literal["fcfs", "sjf", "slo"]


class AdmissionConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Which requests wait, in which order, and how long. Costs are predicted seconds of work."""

    schedule: Schedule = "fcfs"  # sjf: least work first; slo: least slack to `slo_ttft_ms` or to its deadline first
    max_queue_s: Seconds = 300.0  # a request that would have to wait longer gets 503 with Retry-After
    dispatch_s: Seconds = 1.0  # work of one kind (text, image, video, audio) that an instance is given in advance
    slo_ttft_ms: Seconds | None = None
    slo_tpot_ms: Seconds | None = None
    recovery_timeout_s: Seconds = 30.0  # how long requests wait for a stage that lost its last instance
    max_media_held_bytes: Count = 2 * GIB  # bodies and media of all requests, from the head on

    @property
    def window_s(self) -> float:
        """Work of one kind that an instance is really given in advance: a quarter of the time to first token that is
        to be kept, if that is less."""
        return self.dispatch_s if self.slo_ttft_ms is None else min(self.dispatch_s, self.slo_ttft_ms / 4e3)


class ControlConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How the cluster is kept up."""

    adaptive: bool = False  # roles follow the load
    drain_timeout_s: Seconds = 30.0  # what runs may take that long to finish when the server is told to stop
    switch_timeout_s: Seconds = 60.0  # what runs on an instance may take that long to finish before it changes its role


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the HTTP side enforces. Names follow vLLM's flags."""

    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    api_key: str | None = None
    served_model_names: tuple[str, ...] = ()
    limit_mm_per_prompt: dict[str, Annotated[int, Meta(ge=0)]] = msgspec.field(
        default_factory=lambda: {"image": 32, "video": 4, "audio": 4}
    )
    media_io_kwargs: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict)  # as in vLLM: {"video": {...}}
    media_store_bytes: Annotated[int, Meta(ge=0)] = GIB // 4  # of media that clients may name by `uuid` later
    max_body_bytes: Count = 64 << 20
    max_image_pixels: Count = 64_000_000  # decided from the header, before any pixel exists
    max_media_bytes: Count = 32 << 20  # of one fetched or embedded item
    media_fetch_timeout_s: Seconds = 10.0
    allow_private_media_hosts: bool = False  # private, loopback and link-local addresses in image_url
    allowed_local_media_path: str | None = None  # folder from which file: URLs may read


def require(condition: bool, field: str, message: str) -> None:
    """Raises ConfigError naming the field and the valid range."""
    if not condition:
        raise ConfigError(f"{field}: {message}")


Config = TypeVar("Config", bound=msgspec.Struct)


def checked(cls: type[Config], **fields: Any) -> Config:
    """A configuration whose fields are known to be valid. Raises ConfigError naming the field and the valid range."""
    try:
        return msgspec.convert(fields, cls)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$.")
        field, _, inside = path.rstrip("`").partition("[")
        allowed = get_type_hints(cls, include_extras=True).get(field)
        if inside and get_origin(allowed) is dict:
            allowed = get_args(allowed)[1]
        raise ConfigError(f"{field}: {refusal(fields.get(field), allowed, message)}") from None


# ---- what is wrong with a value, in words

BOUNDS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "at most"}
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "array": "a list",
    "object": "keys and values",
    "null": "nothing",
}
EXPECTED = re.compile(r"Expected `([^`]*)`")


def refusal(value: Any, allowed: Any, message: str) -> str:
    """Of a value that msgspec refused with this message where `allowed` was annotated."""
    if get_origin(allowed) is Literal:
        return f"{value!r} is none of {', '.join(get_args(allowed))}"
    valid = valid_range(allowed)
    if valid:
        return f"{value!r:.100} is not valid; {valid}"
    expected = EXPECTED.match(message)
    if expected is None:
        return f"{message}, got {value!r:.100}"
    names = [TYPES.get(name, name) for name in expected[1].split(" | ")]
    return f"expected {' or '.join(names)}, got {value!r:.100}"


def valid_range(kind: Any) -> str:
    """The bounds of an annotated number; empty where there are none."""
    if get_origin(kind) in (Union, UnionType):
        return next(filter(None, map(valid_range, get_args(kind))), "")
    if get_origin(kind) is not Annotated:
        return ""
    base, *notes = get_args(kind)
    limits = {bound: getattr(note, bound, None) for note in notes for bound in BOUNDS}
    bounds = [f"{BOUNDS[bound]} {limit:.10g}" for bound, limit in limits.items() if limit is not None]
    number = "a whole number" if base is int else "a number"
    return f"{number} {' and '.join(bounds)} is needed" if bounds and base in (int, float) else ""
