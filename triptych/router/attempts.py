"""A sequence is tried as often as it takes: what is asked of the instances each time, and who they are."""

from dataclasses import dataclass, field

from triptych.core import BlockHashes, InstanceId, RequestId, UnitHash
from triptych.router.clock import Timer
from triptych.router.generation import Generation, PreparedPrompt
from triptych.router.output import Output
from triptych.router.waiting import Kind, Waiter, Work


@dataclass(slots=True, eq=False)
class Task:
    """One sequence that is being answered: what was asked, what was said so far, and where it stands.

    It is with the instances (`attempt`), or it waits: in a line (`waiter`), for a moment (`timer`), or in quarantine.
    """

    output: Output
    generation: Generation
    prompt: PreparedPrompt
    hashes: BlockHashes
    kind: Kind
    attempt: "Attempt | None" = None
    waiter: "Waiter[list[Task]] | None" = None
    timer: Timer | None = None
    num_attempts: int = 0
    num_failures: int = 0  # attempts that failed in a row without a new token
    num_blames: int = 0  # crashes while it was computed, since it last got past such a point
    num_losses: int = 0  # instances that it lost in a row, without a decoded token in between
    suspected_at: float | None = None  # when it came into quarantine

    @property
    def num_tokens(self) -> int:
        return len(self.prompt.token_ids) + self.output.num_tokens

    def begin(self, prefill: InstanceId, serial: int) -> "Attempt":
        """The next attempt, under an id of its own: what arrives late for an older one is about an unknown request."""
        self.num_attempts += 1
        id = RequestId(f"{self.output.request_id}.{self.num_attempts}")
        self.attempt = Attempt(id, self, prefill, serial, self.output.num_tokens, {prefill}, {prefill})
        return self.attempt


@dataclass(slots=True, eq=False)
class Attempt:
    """A sequence on its way through the instances."""

    request_id: RequestId
    task: Task
    prefill: InstanceId
    serial: int  # in the order in which attempts were sent
    start: int  # index of its first token: prefill samples that one, decode the others
    holders: set[InstanceId]  # may know something of it: where an abort goes
    needs: set[InstanceId]  # those of them without which it does not go on
    decoders: set[InstanceId] = field(default_factory=set)  # it was handed to, or says it was
    decoder: InstanceId | None = None  # whose tokens come
    num_cached: int = 0  # leading tokens whose KV prefill seemed to have
    ordered: set[UnitHash] = field(default_factory=set)  # units that somebody was told to encode for it
    wanted: set[UnitHash] = field(default_factory=set)  # that it misses while nobody is there to encode
    work: Work | None = None  # that it was sent with, as long as it counts for the window of its kind

    @property
    def has_answered(self) -> bool:
        return self.task.output.num_tokens > self.start

    def order(self, encoders: dict[UnitHash, InstanceId]) -> None:
        """These units are encoded for it, by these."""
        self.ordered.update(encoders)
        self.holders.update(encoders.values())
        self.needs.update(encoders.values())

    def prefilled(self) -> None:
        """Its first token is here: it has all embeddings. Who encoded may still have an order for one it had cached."""
        self.needs = {self.prefill} | self.decoders

    def handed_to(self, decode: InstanceId) -> None:
        """It may be there from now on, or soon."""
        self.holders.add(decode)
        self.needs.add(decode)
        self.decoders.add(decode)
        self.decoder = None

    def decodes_at(self, decode: InstanceId) -> None:
        """Whoever decodes has pulled everything: nobody else holds anything."""
        self.holders = {decode}
        self.needs = {decode}
        self.decoders = {decode}
        self.decoder = decode
