"""Every message between processes, as one tagged union. Small enough to log: bytes of tensors never ride here.

Delivery is at most once and ordered per pair of processes; every handler is idempotent, and a message about an
unknown request is answered by giving back what it holds, never by an error. docs/protocol.md has the table.
"""

import msgspec

from triptych.core import (
    EncodeUnit,
    FinishReason,
    InstanceId,
    LeaseId,
    RequestId,
    Role,
    SamplingParams,
    Span,
    TokenLogprobs,
    UnitHash,
)

FRONTEND = InstanceId("frontend")


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """Base of the union. `array_like`: field order is the wire format, so both ends run the same version."""


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """The right to pull some blocks: they stay as they are until the reader sends `Release(lease)`."""

    holder: InstanceId
    epoch: str  # the holder's incarnation; a ticket of a dead one is never pulled
    lease: LeaseId
    region: str  # "kv" or "embedding"
    blocks: list[int]
    num_tokens: int


# ---- frontend -> instances


class Encode(Message, frozen=True):
    """Frontend -> E: encode one unit and tell `prefill` when it can be pulled."""

    request_id: RequestId
    unit: EncodeUnit
    data: bytes
    prefill: InstanceId


class Submit(Message, frozen=True):
    """Frontend -> P: prefill this prompt; its embeddings arrive as `Embedded`.

    `token_ids` is the expanded prompt followed, for a request that is taken up again, by the output so far.
    """

    request_id: RequestId
    token_ids: list[int]
    num_prompt_tokens: int
    units: tuple[EncodeUnit, ...]
    spans: tuple[Span, ...]
    sampling: SamplingParams


class Abort(Message, frozen=True):
    """Frontend -> every instance that may hold a part of the request. Legal at any time, any number of times."""

    request_id: RequestId


# ---- between instances


class Embedded(Message, frozen=True):
    """E -> P: a unit's embeddings can be pulled."""

    request_id: RequestId
    unit: UnitHash
    ticket: Ticket


class Prefilled(Message, frozen=True):
    """P -> D: a sequence's KV can be pulled. `token_ids` ends with the first token, whose KV does not exist yet."""

    request_id: RequestId
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    rope_delta: int
    ticket: Ticket


class Release(Message, frozen=True):
    """Reader -> holder: the pull is done or will never happen; the blocks may be reused."""

    lease: LeaseId


# ---- instances -> frontend


class TokenUpdate(msgspec.Struct, frozen=True, array_like=True):
    """One more token of one sequence: the one at `index` of its output. `finish` is set on the last one.

    The index is what orders them: the first comes from P, the others from D, and D's may overtake P's.
    """

    request_id: RequestId
    token_id: int
    index: int
    finish: FinishReason | None = None
    logprobs: TokenLogprobs | None = None


class Tokens(Message, frozen=True):
    """P or D -> frontend: what one step sampled, all sequences together."""

    instance: InstanceId
    updates: list[TokenUpdate]


class Located(Message, frozen=True):
    """P -> frontend: this request went on to that decode instance (where an abort has to go from now on)."""

    request_id: RequestId
    decode: InstanceId


class Failed(Message, frozen=True):
    """Any instance -> frontend: this request cannot go on, and why. `unit` names the media item to blame, if one is."""

    request_id: RequestId
    message: str
    status: int
    code: str | None = None
    unit: UnitHash | None = None


class PoolUsage(msgspec.Struct, frozen=True):
    """Blocks of one pool: total = free + used + cached. Cached blocks hold reusable content nobody needs now."""

    total: int
    free: int
    used: int
    cached: int


class Load(Message, frozen=True):
    """Instance -> frontend, a D also -> every P: what it holds; sent once a heartbeat and whenever it falls idle."""

    instance: InstanceId
    queues: dict[str, int]  # per stage: waiting and running, e.g. {"prefill_waiting": 2, "prefill_running": 1}
    pools: dict[str, PoolUsage]  # "kv", "embedding"
    work_s: dict[str, float]  # predicted seconds of work queued, per stage letter
    counters: dict[str, float]  # monotonic totals for metrics
    pace_s: dict[str, float]  # predicted seconds per token (e: per embedding row), per stage letter


# ---- cluster life cycle


class SlabDescription(msgspec.Struct, frozen=True):
    """How another instance reads this one's slab. `layout` must agree between reader and holder, region by region."""

    transports: dict[str, bytes]  # by back-end, what a peer needs to connect: place of the memory file, NIXL metadata
    host: str  # boot id + machine: shared memory is possible only where it is equal
    device: str  # "cpu" or "cuda:N"
    base: int  # address of byte 0 of the slab in the holder
    regions: dict[str, "RegionDescription"]


class RegionDescription(msgspec.Struct, frozen=True):
    """A part of a slab cut into equal blocks: block i lies at `offset + i * block_bytes`."""

    offset: int
    block_bytes: int
    num_blocks: int
    layout: str


class Peer(msgspec.Struct, frozen=True):
    """One row of the routing table."""

    id: InstanceId
    role: Role
    epoch: str
    address: str
    slab: SlabDescription


class Ready(Message, frozen=True):
    """Instance -> controller: loaded, listening, pools registered."""

    peer: Peer
    start_s: float


class Table(Message, frozen=True):
    """Controller -> everyone: who is there. A higher version replaces a lower one; an older one is ignored."""

    version: int
    peers: list[Peer]


class Shutdown(Message, frozen=True):
    """Controller -> instance: leave the loop and exit 0."""


AnyMessage = (
    Encode
    | Submit
    | Abort
    | Embedded
    | Prefilled
    | Release
    | Tokens
    | Located
    | Failed
    | Load
    | Ready
    | Table
    | Shutdown
)

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(AnyMessage).decode
