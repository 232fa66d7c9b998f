"""From prefill to whoever decodes: which instance that is, what it is told on the way, and the KV at the end."""

from triptych.core import InstanceId, Sequence, Stage, Status
from triptych.errors import RequestError
from triptych.memory.kv_cache import KVCache
from triptych.memory.leases import Leases
from triptych.messages import FRONTEND, Abort, Prefilling
from triptych.routing import pick_decode
from triptych.stages.base import Surroundings, foreseen_tokens, prefilled
from triptych.stages.prefill.jobs import PrefillJob


class HandOver:
    """Leases KV to an instance that decodes, picked from the newest table; to this one, if no other is less loaded."""

    def __init__(self, near: Surroundings, kv: KVCache, leases: Leases, *, chunked: bool) -> None:
        """`chunked`: decode is told of full blocks after every chunk."""
        self._near = near
        self._kv = kv
        self._leases = leases
        self._chunked = chunked and not kv.state_blocks

    def send_ahead(self, job: PrefillJob) -> None:
        """Tells decode of the blocks that are full by now: only the tail is left to move after the last chunk."""
        sequence, near = job.sequence, self._near
        num_full = sequence.num_computed // self._kv.block_tokens
        if not self._chunked or foreseen_tokens(sequence) <= 1 or num_full == job.num_sent_ahead:
            return
        if self._decode_of(job) in (None, near.instance):
            return
        assert job.decode is not None
        if not job.num_sent_ahead:
            near.out.send(FRONTEND, near.located(sequence.request_id, job.decode))
        job.num_sent_ahead = num_full
        job.told.add(job.decode)
        blocks = sequence.block_table[:num_full]
        self._kv.refer(blocks)  # the reader's: an abort must not free what is being read
        lease = self._leases.grant(job.decode, sequence.request_id, lambda: self._kv.give_back(blocks))
        ticket = near.ticket(lease, "kv", blocks, num_full * self._kv.block_tokens)
        num_tokens = len(sequence.token_ids)
        near.out.send(job.decode, Prefilling(sequence.request_id, num_tokens, sequence.prompt_hashes, ticket))

    def finish(self, job: PrefillJob) -> None:
        """Nobody decodes it."""
        self._recall(job, None)
        self._kv.free(job.sequence)
        job.sequence.status = Status.FINISHED

    def hand_on(self, job: PrefillJob) -> None:
        """The prompt is computed, and its first token sampled."""
        near, sequence = self._near, job.sequence
        decode = self._decode_of(job)
        if decode is None:
            near.out.retry(sequence.request_id, "no instance serves decode at the moment", "unavailable")
            self.finish(job)
            return
        self._recall(job, decode)
        sequence.status = Status.LEASED
        lease = self._leases.grant(decode, sequence, lambda: self._kv.free(sequence), lambda: self._take_back(sequence))
        ticket = near.ticket(lease, "kv", sequence.block_table, sequence.num_computed)
        if not job.num_sent_ahead:
            near.out.send(FRONTEND, near.located(sequence.request_id, decode))
        near.out.send(decode, prefilled(sequence, ticket))

    def _recall(self, job: PrefillJob, decode: InstanceId | None) -> None:
        """All but `decode` have no use for what they were sent ahead. Not said before the end: who encodes, too, would
        take it for the end of the request."""
        for instance in sorted(job.told & self._near.table.peers.keys() - {decode}):
            self._near.out.send(instance, Abort(job.request_id))

    def _decode_of(self, job: PrefillJob) -> InstanceId | None:
        """Who decodes it: picked once, again if that one is gone or leaves. None where there is nobody."""
        near, loads = self._near, self._near.decode_loads
        peer = None if job.decode is None else near.table.peers.get(job.decode)
        if peer is None or (peer.leaving and peer.id != near.instance):
            try:
                job.decode = pick_decode(near.table, loads, near.instance, job.request_id).id
            except RequestError:
                if not near.serves_here(Stage.DECODE):
                    return None
                job.decode = near.instance  # leaves, too, but not before this is done
            loads[job.decode] = loads.get(job.decode, 0.0) + foreseen_tokens(job.sequence) * near.decode_pace_s
            job.num_sent_ahead = 0
        return job.decode

    def _take_back(self, sequence: Sequence) -> None:
        """Who was to decode it leaves its role or is gone. It goes to another; where that may be this instance, there
        at once, because it is never declined here."""
        here = self._near.instance if self._near.serves_here(Stage.DECODE) else None
        self.hand_on(PrefillJob(sequence, coming=set(), held={}, decode=here))
