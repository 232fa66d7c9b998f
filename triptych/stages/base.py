"""What the stages have in common: where their effects go, and what they are told about their surroundings."""

from collections import OrderedDict
from dataclasses import dataclass, field

from triptych.core import (
    EncodeUnit,
    FinishReason,
    InstanceId,
    LeaseId,
    RequestId,
    SamplingParams,
    Sequence,
    Stage,
    TokenLogprobs,
    UnitHash,
)
from triptych.memory.embedding_cache import EmbeddingShare
from triptych.memory.leases import Leases
from triptych.messages import (
    FRONTEND,
    AnyMessage,
    Declined,
    Embedded,
    Encode,
    Failed,
    Load,
    Located,
    Prefilled,
    Prefilling,
    Release,
    Share,
    Submit,
    Ticket,
    TokenUpdate,
    Wanted,
)
from triptych.routing import RoutingTable

USUAL_ANSWER_TOKENS = 256
GUESSED_PACE_S = 1e-3  # of a decoded token, until an instance has said: what counts is that work is shared out at once


@dataclass(frozen=True, slots=True)
class Pull:
    """Read the ticket's blocks into own blocks of the same region. `key` comes back when no byte lands any more."""

    key: UnitHash | RequestId
    ticket: Ticket
    blocks: list[int]


@dataclass(slots=True)
class Outbox:
    """What a stage wants to happen. The engine carries it out after each step, the simulator on its own time."""

    messages: list[tuple[InstanceId, AnyMessage]] = field(default_factory=list)
    pulls: list[Pull] = field(default_factory=list)
    tokens: list[TokenUpdate] = field(default_factory=list)

    def send(self, to: InstanceId, message: AnyMessage) -> None:
        self.messages.append((to, message))

    def release(self, ticket: Ticket) -> None:
        self.send(ticket.holder, Release(ticket.lease))

    def decline(self, ticket: Ticket) -> None:
        self.send(ticket.holder, Declined(ticket.lease))

    def fail(self, request_id: RequestId, message: str, status: int, code: str) -> None:
        self.send(FRONTEND, Failed(request_id, message, status, code))

    def retry(self, request_id: RequestId, message: str, code: str) -> None:
        """It cannot go on here, through no fault of its own."""
        self.send(FRONTEND, Failed(request_id, message, 503, code, retry=True))


class Gone:
    """Requests that left a stage, so that what arrives late for them is given back. Forgets the oldest."""

    MAX_REMEMBERED = 10_000  # far more than can have something on its way

    def __init__(self) -> None:
        self._ids: OrderedDict[RequestId, None] = OrderedDict()

    def add(self, request_id: RequestId) -> None:
        self._ids[request_id] = None
        if len(self._ids) > self.MAX_REMEMBERED:
            self._ids.popitem(last=False)

    def __contains__(self, request_id: RequestId) -> bool:
        return request_id in self._ids


@dataclass(slots=True)
class Surroundings:
    """What the stages of one instance share: its name, its incarnation, the newest routing table, the outbox."""

    instance: InstanceId
    epoch: str
    eos_token_ids: frozenset[int] = frozenset()
    max_model_len: int = 1 << 30
    table: RoutingTable = field(default_factory=RoutingTable)
    decode_loads: dict[InstanceId, float] = field(default_factory=dict)  # seconds of work; last report + sent since
    decode_pace_s: float = GUESSED_PACE_S  # predicted seconds per decoded token, as the decode instances report it
    out: Outbox = field(default_factory=Outbox)
    gone_from_prefill: Gone = field(default_factory=Gone)  # also while it has another role: much comes late
    gone_from_decode: Gone = field(default_factory=Gone)

    def take_load(self, load: Load) -> None:
        """What an instance that decodes says of itself, this one among them."""
        if Stage.DECODE in load.work_s:
            self.decode_loads[load.instance] = load.work_s[Stage.DECODE]
            self.decode_pace_s = load.pace_s[Stage.DECODE] or self.decode_pace_s  # 0: it has not decoded yet

    def serves_here(self, stage: Stage) -> bool:
        """Whether this instance itself does, also while it leaves that role."""
        own = self.table.peers.get(self.instance)
        return own is not None and stage in own.role.stages

    def ticket(self, lease: LeaseId, region: str, blocks: list[int], num_tokens: int) -> Ticket:
        return Ticket(self.instance, self.epoch, lease, region, blocks, num_tokens)

    def located(self, request_id: RequestId, decode: InstanceId) -> Located:
        """To tell the frontend that the request goes on to that instance, as this one knows it."""
        peer = self.table.peers.get(decode)
        return Located(request_id, decode, peer.epoch if peer is not None else "")

    def is_stale(self, ticket: Ticket) -> bool:
        """Whether the holder died or was restarted since: pulling from it is pointless."""
        if ticket.holder == self.instance:
            return ticket.epoch != self.epoch
        peer = self.table.peers.get(ticket.holder)
        return peer is not None and peer.epoch != ticket.epoch

    def finish_of(self, sequence: Sequence) -> FinishReason | None:
        """Whether the newest token ends the sequence. Stop strings are the frontend's business."""
        sampling, num_tokens = sequence.sampling, len(sequence.token_ids)
        num_output = num_tokens - sequence.num_prompt_tokens
        if num_output >= sampling.min_tokens:
            token = sequence.token_ids[-1]
            if token in self.eos_token_ids and not sampling.ignore_eos:
                return FinishReason.STOP
            if token in sampling.stop_token_ids:
                return FinishReason.STOP
        full = num_tokens >= self.max_model_len
        return FinishReason.LENGTH if full or num_output >= sampling.max_tokens else None


def turn_away(near: Surroundings, message: AnyMessage) -> bool:
    """Gives back what a message is about that nobody does here (any more), so that somebody else does it. False for a
    message that is about nothing of that kind."""
    match message:
        case Encode():
            near.out.send(message.prefill, Wanted(message.request_id, tuple(unit.hash for unit in message.units)))
        case Submit():
            near.out.retry(message.request_id, f"instance {near.instance} does not prefill any more", "moved")
        case Share():
            near.out.send(FRONTEND, Wanted(message.request_id, (message.unit.hash,)))
        case Embedded() | Prefilling():
            near.out.release(message.ticket)
        case Prefilled():
            near.out.decline(message.ticket)
        case Wanted():  # about a request that has left
            pass
        case _:
            return False
    return True


def reader_lost(near: Surroundings, leases: Leases, reader: InstanceId) -> None:
    """An instance is gone, with all that it was to go on with. The frontend may not know that it had been handed on."""
    for content in leases.release_reader(reader):
        if isinstance(content, Sequence):
            near.out.retry(content.request_id, f"instance {reader} was lost", "instance_lost")


def foreseen_tokens(sequence: Sequence) -> int:
    return foreseen(sequence.sampling, len(sequence.token_ids) - sequence.num_prompt_tokens)


def foreseen(sampling: SamplingParams, num_output: int) -> int:
    """Tokens that are expected behind the first `num_output`: as many as may be, but never more than a usual answer,
    because most requests leave `max_tokens` at the rest of the model's length and stop long before. What is certain
    counts."""
    allowed = sampling.max_tokens - num_output
    if sampling.ignore_eos and not sampling.stop_token_ids:
        return allowed
    return min(allowed, max(sampling.min_tokens - num_output, USUAL_ANSWER_TOKENS))


def announce(
    near: Surroundings,
    embeddings: EmbeddingShare,
    leases: Leases,
    unit: EncodeUnit,
    request_id: RequestId,
    reader: InstanceId,
    *,
    computed: bool,
) -> None:
    """Pins a ready embedding under a lease for `reader` and sends the ticket: it can be pulled until it is released."""
    entry = embeddings.hold(unit)
    lease = leases.grant(reader, unit.hash, lambda: embeddings.release(unit.hash))
    ticket = near.ticket(lease, "embedding", entry.blocks, unit.num_tokens)
    near.out.send(reader, Embedded(request_id, unit.hash, ticket, computed))


def token_update(
    sequence: Sequence, finish: FinishReason | None, logprobs: TokenLogprobs | None, num_cached: int = 0
) -> TokenUpdate:
    """What the frontend is told about the newest token of a sequence."""
    token_ids = sequence.token_ids
    index = len(token_ids) - sequence.num_prompt_tokens - 1
    return TokenUpdate(sequence.request_id, token_ids[-1], index, finish, logprobs, num_cached)


def prefilled(sequence: Sequence, ticket: Ticket) -> Prefilled:
    """What whoever goes on with a sequence is told of it. The ticket is for its KV."""
    return Prefilled(
        sequence.request_id,
        sequence.token_ids,
        sequence.num_prompt_tokens,
        sequence.sampling,
        sequence.rope_delta,
        sequence.prompt_hashes,
        ticket,
    )
