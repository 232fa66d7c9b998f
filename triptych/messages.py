"""Every message between processes, as one tagged union. Bytes of tensors never ride here, only the files of clients.

Delivery is at most once and ordered per pair of processes; every handler is idempotent, and a message about an
unknown request is answered by giving back what it holds, never by an error. docs/protocol.md has the table.
"""

import msgspec

from triptych.config import InstanceConfig
from triptych.core import (
    BlockHash,
    BlockHashes,
    EncodeUnit,
    FinishReason,
    InstanceId,
    LeaseId,
    Media,
    PositionArguments,
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
    """Frontend -> E: encode these units of one media item and tell `prefill` when each can be pulled."""

    request_id: RequestId
    media: Media
    units: tuple[EncodeUnit, ...]
    prefill: InstanceId


class Submit(Message, frozen=True):
    """Frontend -> P: prefill this prompt; its embeddings arrive as `Embedded`.

    `token_ids` is the expanded prompt followed, for a request that is taken up again, by the output so far. `ordered`
    are the units that somebody was told to encode for this request; `held` names instances that seem to have others.
    What is neither ordered nor in a cache of P is asked for by `Share` or `Wanted` when its turn comes.
    """

    request_id: RequestId
    token_ids: list[int]
    num_prompt_tokens: int
    units: tuple[EncodeUnit, ...]
    spans: tuple[Span, ...]
    sampling: SamplingParams
    position_arguments: PositionArguments = {}
    prompt_hashes: BlockHashes = BlockHashes()
    ordered: tuple[UnitHash, ...] = ()
    held: dict[UnitHash, InstanceId] = {}


class Abort(Message, frozen=True):
    """Frontend -> every instance that may hold a part of the request; P -> D, for what it sent ahead of a request that
    ended. Legal at any time, any number of times."""

    request_id: RequestId


# ---- between instances


class Share(Message, frozen=True):
    """P -> an instance that seems to hold a unit: tell `prefill` that it can be pulled, or the frontend that it is
    `Wanted`. Sent when there is space for it, so that it is pulled at once."""

    request_id: RequestId
    unit: EncodeUnit
    prefill: InstanceId


class Embedded(Message, frozen=True):
    """E, or who was asked to share -> P: a unit's embeddings can be pulled. `computed`: they were encoded for this very
    order."""

    request_id: RequestId
    unit: UnitHash
    ticket: Ticket
    computed: bool = True


class Prefilling(Message, frozen=True):
    """P -> D: the KV of the leading `ticket.num_tokens` tokens of a prompt can be pulled, while the rest is computed.

    A D without room for the whole sequence gives the ticket back: it gets everything with `Prefilled`.
    """

    request_id: RequestId
    num_tokens: int  # of the whole sequence
    prompt_hashes: BlockHashes
    ticket: Ticket


class Prefilled(Message, frozen=True):
    """P -> D: a sequence's KV can be pulled: all blocks of it, of which D reads those that it does not have yet.

    `token_ids` ends with the first token, whose KV does not exist yet.
    """

    request_id: RequestId
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    rope_delta: int
    prompt_hashes: BlockHashes
    ticket: Ticket


class Release(Message, frozen=True):
    """Reader -> holder: the pull is done or will never happen; the blocks may be reused."""

    lease: LeaseId


class Declined(Message, frozen=True):
    """D -> holder: it leaves its role, or has no room where waiting for some could last for ever; nothing was pulled.
    The sequence is the holder's again, which goes on with it or hands it to somebody else."""

    lease: LeaseId


# ---- instances -> frontend


class TokenUpdate(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One more token of one sequence: the one at `index` of its output. `finish` is set on the last one.

    The index is what orders them: the first comes from P, the others from D, and D's may overtake P's.
    """

    request_id: RequestId
    token_id: int
    index: int
    finish: FinishReason | None = None
    logprobs: TokenLogprobs | None = None
    num_cached: int = 0  # with the first token: leading prompt tokens whose KV was there before


class Tokens(Message, frozen=True):
    """P or D -> frontend: what one step sampled, all sequences together."""

    instance: InstanceId
    updates: list[TokenUpdate]


class Located(Message, frozen=True):
    """P, or a D that leaves its role -> frontend: this request went on to that decode instance (where an abort has to
    go from now on)."""

    request_id: RequestId
    decode: InstanceId
    epoch: str = ""  # the incarnation that it was sent to: if that is lost since, so is the request


class Wanted(Message, frozen=True):
    """P, or who was asked by `Share` -> frontend: these units of a request have to be encoded; nobody is about to.

    E that leaves its role -> P: the same, about its orders. P asks the frontend when the request's turn comes, because
    whoever encodes them then does so behind the orders of younger requests.
    """

    request_id: RequestId
    units: tuple[UnitHash, ...]


class Failed(Message, frozen=True):
    """Any instance -> frontend: this request cannot go on, and why. `unit` names the media item to blame, if one is.

    `retry`: the request is not to blame (a peer was lost, a pull failed, the instance leaves its role): it is taken up
    again elsewhere.
    """

    request_id: RequestId
    message: str
    status: int
    code: str | None = None
    unit: UnitHash | None = None
    retry: bool = False


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
    epoch: str = ""  # of which incarnation


class Step(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One forward. Times are those of the monotonic clock, which all processes of a host share."""

    what: str  # encode, prefill, decode, or mixed: the last two at once
    began_s: float
    ended_s: float
    size: int  # units, or sequences


class Steps(Message, frozen=True):
    """Instance -> frontend: what it computed since it last said so; sent with `Load`, where a timeline is written."""

    instance: InstanceId
    steps: list[Step]


class Evicted(Message, frozen=True):
    """Instance -> frontend: what left its caches since it last said so."""

    instance: InstanceId
    units: list[UnitHash]
    blocks: list[BlockHash]


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
    """One row of the routing table. One that is `leaving` its role gets no new work, but can still be read from."""

    id: InstanceId
    role: Role
    epoch: str
    address: str
    slab: SlabDescription
    leaving: bool = False


class Ready(Message, frozen=True):
    """Instance -> controller: loaded, listening, pools registered."""

    peer: Peer
    start_s: float


class Table(Message, frozen=True):
    """Controller -> everyone: who is there. A higher version replaces a lower one; an older one is ignored."""

    version: int
    peers: list[Peer]


class SwitchRole(Message, frozen=True):
    """Controller -> instance: leave the role that it serves, then become what `config` says; None: then exit 0.

    To leave a role: what is queued is given back (`Wanted`, `Failed(retry=True)`), decodes are handed over to instances
    with room, what runs otherwise ends here, and all leases are waited for. A later order replaces one that is not yet
    carried out: so an order for the role that it has makes it stay.
    """

    order: int  # ascending; comes back with `Switched`
    config: InstanceConfig | None
    room: dict[InstanceId, int] = {}  # KV blocks that other instances which decode could still take


class Switched(Message, frozen=True):
    """Instance -> controller: it serves its role, the new one, or after an `error` the old one again."""

    instance: InstanceId
    order: int
    peer: Peer
    steps_s: dict[str, float]  # duration of each step: drain, weights, pools, warm_up
    error: str | None = None


class Alive(Message, frozen=True):
    """Instance -> controller, from a thread of its own, several times a second: the process runs. Its silence is how a
    stopped process is told from one that is busy with a long step."""

    instance: InstanceId
    epoch: str
    turning_s: float  # how long the engine has been in its present turn


class Unreachable(Message, frozen=True):
    """Reader -> controller: a pull from `holder` failed, or did not settle in time."""

    reader: InstanceId
    holder: InstanceId
    epoch: str  # of the holder
    error: str


class Shutdown(Message, frozen=True):
    """Controller -> instance: leave the loop and exit 0."""


AnyMessage = (
    Encode
    | Submit
    | Abort
    | Share
    | Embedded
    | Prefilling
    | Prefilled
    | Release
    | Declined
    | Tokens
    | Located
    | Wanted
    | Failed
    | Load
    | Steps
    | Evicted
    | Ready
    | Table
    | SwitchRole
    | Switched
    | Alive
    | Unreachable
    | Shutdown
)

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(AnyMessage).decode
