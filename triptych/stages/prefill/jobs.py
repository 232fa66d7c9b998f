"""The requests that prefill has: those that wait, and those that have started."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from triptych.core import EncodeUnit, InstanceId, RequestId, Sequence, UnitHash
from triptych.messages import Embedded


@dataclass(slots=True)
class PrefillJob:
    """A sequence on its way through prefill, and what is known about the embeddings that it needs."""

    sequence: Sequence
    coming: set[UnitHash]  # somebody was told to announce them, and did not yet
    held: dict[UnitHash, InstanceId]  # who seems to have others
    tickets: dict[UnitHash, Embedded] = field(default_factory=dict)  # announced, and nobody began to pull them for it
    announced: set[UnitHash] = field(default_factory=set)  # units whose ticket came, used since or not
    asked: dict[UnitHash, InstanceId] = field(default_factory=dict)  # asked for since the request started, and whom
    needed: dict[UnitHash, EncodeUnit] = field(default_factory=dict)  # referenced: a part of the prompt looks at them
    sources: dict[UnitHash, str] = field(default_factory=dict)  # where units came from, if not from the cache
    num_ready_spans: int = 0  # leading spans whose embeddings are here, or not needed
    num_cached: int = 0  # leading tokens whose KV was found
    decode: InstanceId | None = None  # where the KV goes, once that is decided
    num_sent_ahead: int = 0  # leading blocks that it was told of
    told: set[InstanceId] = field(default_factory=set)  # who was told of any, also those that leave their role since

    @property
    def request_id(self) -> RequestId:
        return self.sequence.request_id

    @property
    def is_untouched(self) -> bool:
        """Whether nothing of it is computed yet."""
        return self.sequence.num_computed == self.num_cached


class Jobs:
    """Both in arrival order. `is_leaving`: no more are taken in."""

    def __init__(self) -> None:
        self.waiting: deque[PrefillJob] = deque()
        self.started: dict[RequestId, PrefillJob] = {}
        self.is_leaving = False

    def __iter__(self) -> Iterator[PrefillJob]:
        yield from self.waiting
        yield from self.started.values()

    def find(self, request_id: RequestId) -> PrefillJob | None:
        return self.started.get(request_id) or self.find_waiting(request_id)

    def find_waiting(self, request_id: RequestId) -> PrefillJob | None:
        return next((job for job in self.waiting if job.request_id == request_id), None)
