"""The stages of one instance together: made for a role, told what arrives, and asked as one."""

from collections.abc import Callable, Iterator

from triptych.config import SchedulingConfig
from triptych.core import EncodeWork, InstanceId, RequestId, Role, Stage
from triptych.errors import InstanceError
from triptych.memory.embedding_cache import EmbeddingShare
from triptych.memory.pools import Pools
from triptych.messages import (
    FRONTEND,
    Abort,
    AnyMessage,
    Declined,
    Embedded,
    Encode,
    Prefilled,
    Prefilling,
    Release,
    Share,
    Submit,
    Wanted,
)
from triptych.routing import RoutingTable
from triptych.stages.base import Surroundings, reader_lost, turn_away
from triptych.stages.decode import DecodeStage
from triptych.stages.encode import EncodeStage
from triptych.stages.prefill import PrefillStage

SHORT_ENCODE_STEP_S = 0.02
ENCODE_SHARE = 0.5  # of an embedding cache that encode and prefill use together


class StageGroup:
    """The state machines of a role, in the order of the data; one that it does not serve is None."""

    def __init__(
        self,
        role: Role,
        near: Surroundings,
        pools: Pools,
        scheduling: SchedulingConfig,
        *,
        whole_spans: bool = False,
    ) -> None:
        """`whole_spans`: as prefill's. `pools` has what the role needs."""
        self.encode: EncodeStage | None = None
        self.prefill: PrefillStage | None = None
        self.decode: DecodeStage | None = None
        self._near = near
        self._leases = pools.leases
        self._handlers: dict[type, Callable[..., None]] = {
            Abort: self._abort,
            Release: lambda message: pools.leases.release(message.lease),
            Declined: lambda message: pools.leases.decline(message.lease),
        }
        if role.encodes:
            self._add_encode(role, pools)
        if Stage.PREFILL in role.stages:
            self._add_prefill(role, pools, scheduling, whole_spans)
        if Stage.DECODE in role.stages:
            self._add_decode(pools, scheduling)
        self.by_stage = self._served()  # in the order of the data

    def __iter__(self) -> Iterator[EncodeStage | PrefillStage | DecodeStage]:
        """Those that are served."""
        return iter(self.by_stage.values())

    def _served(self) -> dict[Stage, EncodeStage | PrefillStage | DecodeStage]:
        machines = {Stage.ENCODE: self.encode, Stage.PREFILL: self.prefill, Stage.DECODE: self.decode}
        return {stage: machine for stage, machine in machines.items() if machine is not None}

    @property
    def is_empty(self) -> bool:
        """Whether nobody relies on this instance in its role: no work, no lease. Pulls and what is unsaid come on
        top."""
        return not len(self._leases) and all(stage.is_empty for stage in self)

    def schedule_encode(self, row_s: float, max_tokens: int) -> list[EncodeWork]:
        """The next encode step: as many rows, at `row_s` seconds each, as take a quarter of the time that all that
        waits takes.

        With little to do steps are short, so that prefill gets the first unit early; with much they are long, because
        large batches use the device better. Where sequences decode on the same instance, they wait for every step.
        """
        if self.encode is None:
            return []
        step_s = SHORT_ENCODE_STEP_S
        if self.decode is None or not self.decode.num_running:
            step_s = max(step_s, 0.25 * self.encode.queued_tokens * row_s)
        return self.encode.schedule(min(max_tokens, int(step_s / max(row_s, 1e-9))))

    # ---- what arrives

    def take(self, message: AnyMessage) -> bool:
        """What is about a stage that is not served here is given back. False for what is about none."""
        handler = self._handlers.get(type(message))
        if handler is None:
            return turn_away(self._near, message)
        handler(message)
        return True

    def pulled(self, key: object, error: InstanceError | None) -> None:
        """A pull is done, or failed. Units have hashes as keys, sequences their ids."""
        if isinstance(key, bytes):
            assert self.prefill is not None, f"embedding {key.hex()} was pulled, and nobody prefills here"
            self.prefill.pulled(key, error)  # type: ignore[arg-type]
        else:
            assert self.decode is not None, f"KV of {key} was pulled, and nobody decodes here"
            self.decode.pulled(key, error)  # type: ignore[arg-type]

    def undelivered(self, message: AnyMessage) -> list[tuple[InstanceId, AnyMessage]]:
        """Whom it was for is gone: what it promised is free again. Returns what is to be sent instead."""
        if isinstance(message, Prefilled):
            self._leases.decline(message.ticket.lease)
        elif isinstance(message, (Embedded, Prefilling)):
            self._leases.release(message.ticket.lease)
        elif isinstance(message, Share):
            return [(FRONTEND, Wanted(message.request_id, (message.unit.hash,)))]
        return []

    def lost(self, instance: InstanceId) -> None:
        """It is gone. Say this once the new table is here: what was its goes to somebody of that one."""
        reader_lost(self._near, self._leases, instance)
        for stage in self:
            stage.lost(instance)

    def table_changed(self, before: RoutingTable) -> None:
        """Whoever waits here for space may go to an instance that decodes since the new table."""
        near, stage = self._near, Stage.DECODE
        known = {peer.id for peer in before.serving(stage)} | {near.instance}
        if self.decode is not None and any(peer.id not in known for peer in near.table.serving(stage)):
            self.decode.give_up_waiting()

    # ---- a change of role

    def leave(self, room: dict[InstanceId, int]) -> None:
        """Gives back what it has not begun; sequences go to others that decode as far as they have room, in blocks."""
        if self.encode is not None:
            self.encode.leave()
        if self.prefill is not None:
            self.prefill.leave()
        if self.decode is not None:
            self.decode.leave(room)

    def stay(self) -> None:
        """It does not leave after all."""
        for stage in self:
            stage.stay()

    # ---- inside

    def _abort(self, message: Abort) -> None:
        request_id: RequestId = message.request_id
        for stage in self:
            stage.abort(request_id)

    def _add_encode(self, role: Role, pools: Pools) -> None:
        self.encode = EncodeStage(self._near, _share(role, pools, Stage.ENCODE), pools.leases)
        self._handlers[Encode] = self.encode.admit

    def _add_prefill(self, role: Role, pools: Pools, scheduling: SchedulingConfig, whole_spans: bool) -> None:
        assert pools.kv is not None, f"{role} without a KV cache"
        self.prefill = PrefillStage(
            self._near,
            pools.kv,
            _share(role, pools, Stage.PREFILL),
            pools.leases,
            max_num_seqs=scheduling.max_num_seqs,
            # While this very instance encodes the rest, an early chunk would only delay it.
            streamed=scheduling.streamed_prefill and not role.encodes,
            chunked_transfer=scheduling.chunked_kv_transfer,
            whole_spans=whole_spans,
        )
        self._handlers |= {
            Submit: self.prefill.admit,
            Embedded: self.prefill.embedded,
            Wanted: self.prefill.wanted,
            Share: self.prefill.share,
        }

    def _add_decode(self, pools: Pools, scheduling: SchedulingConfig) -> None:
        assert pools.kv is not None, "decode without a KV cache"
        self.decode = DecodeStage(self._near, pools.kv, pools.leases, max_num_seqs=scheduling.max_num_seqs)
        self._handlers |= {Prefilled: self.decode.admit, Prefilling: self.decode.prefilling}


def _share(role: Role, pools: Pools, stage: Stage) -> EmbeddingShare:
    """All of the embedding cache, or the part of one stage where two of them use it."""
    assert pools.embeddings is not None, f"{role} without an embedding cache"
    num_blocks = pools.embeddings.num_blocks
    if role.encodes and Stage.PREFILL in role.stages:
        encode = int(num_blocks * ENCODE_SHARE)
        num_blocks = encode if stage is Stage.ENCODE else num_blocks - encode
    return EmbeddingShare(pools.embeddings, num_blocks)
