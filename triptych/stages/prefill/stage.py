"""The prefill stage: takes requests in, starts them in their order, and says which chunks run next."""

from collections import Counter

from triptych.core import (
    Chunk,
    EncodeUnit,
    InstanceId,
    RequestId,
    SampledToken,
    Sequence,
    Status,
    UnitHash,
    distinct,
    units_behind,
)
from triptych.memory.embedding_cache import EmbeddingShare
from triptych.memory.kv_cache import KVCache
from triptych.memory.leases import Leases
from triptych.messages import Embedded, Share, Submit, Wanted
from triptych.stages.base import Surroundings, announce, token_update, turn_away
from triptych.stages.prefill.chunks import Chunks
from triptych.stages.prefill.hand_over import HandOver
from triptych.stages.prefill.intake import Intake
from triptych.stages.prefill.jobs import Jobs, PrefillJob
from triptych.stages.prefill.prompt_blocks import PromptBlocks


class PrefillStage:
    """FCFS. A request starts when it holds space for all embeddings that it needs; then it takes KV blocks for its
    whole prompt. Both in arrival order, the order of the encode instances too: what the oldest request waits for is
    never held by one that waits for it. Requests that miss embeddings give their KV up to decodes of this instance and
    to older requests that miss none; those that wait for space for them are passed by text.

    What a prefix that is here covers is neither computed nor encoded nor transferred: a request that begins with one
    takes all its blocks when it starts.
    """

    def __init__(
        self,
        near: Surroundings,
        kv: KVCache,
        embeddings: EmbeddingShare,
        leases: Leases,
        *,
        max_num_seqs: int,
        streamed: bool = True,
        chunked_transfer: bool = True,
        whole_spans: bool = False,
    ) -> None:
        """`streamed`: prefill starts on the prefix that is ready; else it waits for all embeddings of a request.
        `chunked_transfer`: KV is announced to decode after every chunk; else as a whole at the end.
        `whole_spans`: the model looks at an image as a whole (gemma3), so a chunk never ends inside one."""
        self._near = near
        self._kv = kv
        self._embeddings = embeddings
        self._leases = leases
        self._max_num_seqs = max_num_seqs
        self._jobs = Jobs()
        self._intake = Intake(near, embeddings, self._jobs)
        self._blocks = PromptBlocks(kv, self._jobs, self._intake, streamed=streamed)
        self._chunks = Chunks(embeddings.cache, self._intake, streamed=streamed, whole_spans=whole_spans)
        self._hand_over = HandOver(near, kv, leases, chunked=chunked_transfer)
        self.num_units: Counter[str] = Counter()  # of prefilled requests: cached, transferred, prefix
        self.num_prompt_tokens = 0  # of prefilled requests
        self.num_cached_tokens = 0  # of those: found in the KV cache

    @property
    def queues(self) -> dict[str, int]:
        return {"prefill_waiting": len(self._jobs.waiting), "prefill_running": len(self._jobs.started)}

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be done here and nothing is being written. What was handed on counts among the
        leases."""
        return not self._jobs.waiting and not self._jobs.started and not self._intake.pulling

    @property
    def awaits_embeddings(self) -> bool:
        """Whether a request here waits for what is being encoded."""
        return any(job.coming for job in self._jobs)

    @property
    def queued_tokens(self) -> int:
        return sum(len(job.sequence.token_ids) - job.sequence.num_computed for job in self._jobs)

    # ---- what arrives

    def admit(self, order: Submit) -> None:
        if self._jobs.find(order.request_id) is not None:
            return
        if self._jobs.is_leaving or order.request_id in self._near.gone_from_prefill:
            # In the second case what came before it was given back meanwhile.
            self._intake.forget_early(order.request_id)
            turn_away(self._near, order)
            return
        sequence = Sequence(
            order.request_id,
            order.token_ids,
            order.num_prompt_tokens,
            order.sampling,
            order.units,
            order.spans,
            order.position_arguments,
            order.prompt_hashes,
        )
        refusal = self._never_fits(sequence)
        if refusal is not None:
            self._near.out.fail(order.request_id, refusal, status=400, code="request_too_large")
            self._intake.forget_early(order.request_id)
            return
        self._jobs.waiting.append(PrefillJob(sequence, set(order.ordered), dict(order.held)))
        self._intake.take_early(order.request_id)

    def embedded(self, message: Embedded) -> None:
        """A unit can be pulled."""
        self._intake.take(message)

    def wanted(self, message: Wanted) -> None:
        """Who was told to encode these units will not: the request asks for them in its turn."""
        self._intake.take(message)

    def share(self, order: Share) -> None:
        """Another instance needs a unit that was seen here."""
        unit, reader, embeddings = order.unit, order.prefill, self._embeddings
        if self._jobs.is_leaving or not (embeddings.cache.is_ready(unit.hash) and embeddings.can_hold([unit])):
            turn_away(self._near, order)
        else:
            announce(self._near, embeddings, self._leases, unit, order.request_id, reader, computed=False)

    def pulled(self, unit: UnitHash, error: Exception | None) -> None:
        """A pull settled. What cannot go on without it is tried elsewhere."""
        for job in self._intake.pulled(unit, error):
            text = f"an embedding of the request could not be fetched: {error}"
            self._near.out.retry(job.request_id, text, "transfer_failed")
            self.abort(job.request_id)

    def abort(self, request_id: RequestId) -> None:
        self._intake.forget_early(request_id)
        job = self._jobs.started.pop(request_id, None)
        if job is not None:
            self._intake.let_go(job)
            self._kv.free(job.sequence)
        else:
            job = self._jobs.find_waiting(request_id)
            if job is None:
                return
            self._jobs.waiting.remove(job)
        self._intake.give_back(job, list(job.tickets))
        job.sequence.status = Status.FINISHED

    def lost(self, instance: InstanceId) -> None:
        """An instance that was asked to share something is gone."""
        self._intake.lost(instance)

    def leave(self) -> None:
        """Gives the requests back of which nothing is computed yet; the others go on to their end."""
        self._jobs.is_leaving = True
        for request_id in list(self._intake.early):
            self._intake.forget_early(request_id)
        self._move_queued()

    def stay(self) -> None:
        """Takes requests again."""
        self._jobs.is_leaving = False

    # ---- schedule, commit

    def schedule(self, budget: int) -> list[Chunk]:
        """Chunks of at most `budget` tokens together, oldest request first. Commit them before the next schedule."""
        if self._jobs.is_leaving:  # some may have lost meanwhile what was computed of them
            self._move_queued()
        self._start_waiting()
        self._blocks.give_to_started()
        return self._chunks.next(self._jobs.started.values(), budget)

    def commit(self, chunks: list[Chunk], sampled: list[SampledToken]) -> None:
        """`sampled` has one token for each chunk that samples, in order. An aborted sequence's chunk is dropped."""
        tokens = iter(sampled)
        for chunk in chunks:
            sequence = chunk.sequence
            token = next(tokens) if chunk.samples else None
            if sequence.status is Status.FINISHED:
                continue
            sequence.num_computed += chunk.length
            self._kv.seal(sequence)
            if token is not None:
                self._complete(self._jobs.started.pop(sequence.request_id), token)
            else:
                self._hand_over.send_ahead(self._jobs.started[sequence.request_id])

    def _complete(self, job: PrefillJob, token: SampledToken) -> None:
        """The prompt is computed and its first token sampled: report it, and hand the KV on unless this was all."""
        sequence = job.sequence
        self._near.gone_from_prefill.add(sequence.request_id)
        self._intake.let_go(job)
        self._intake.give_back(job, list(job.tickets))
        for unit in distinct(sequence.units):
            self.num_units[job.sources.get(unit.hash, "cached")] += 1
        self.num_prompt_tokens += len(sequence.token_ids)
        self.num_cached_tokens += job.num_cached
        sequence.token_ids.append(token.token_id)
        finish = self._near.finish_of(sequence)
        self._near.out.tokens.append(token_update(sequence, finish, token.logprobs, job.num_cached))
        if finish is None:
            self._hand_over.hand_on(job)
        else:
            self._hand_over.finish(job)

    def _move_queued(self) -> None:
        """Of an instance that leaves: what waits, and what has started and waits for embeddings, goes elsewhere."""
        started = self._jobs.started.values()
        idle = [job for job in started if job.is_untouched and self._intake.misses_any(job)]
        for job in [*self._jobs.waiting, *idle]:
            self._near.out.retry(job.request_id, f"instance {self._near.instance} leaves its role", "moved")
            self.abort(job.request_id)

    # ---- starting

    def _never_fits(self, sequence: Sequence) -> str | None:
        needed, there = len(sequence.token_ids) + 1, self._kv.max_tokens
        if needed > there:
            return f"the request needs KV space for {needed} tokens, the pool has {there}"
        blocks = sum(self._embeddings.cache.num_blocks_of(unit) for unit in distinct(sequence.units))
        if blocks > self._embeddings.max_blocks:
            return f"the request's media need {blocks} embedding blocks, the pool has {self._embeddings.max_blocks}"
        return None

    def _start_waiting(self) -> None:
        """In arrival order, but those without media pass those that wait for space for embeddings: they wait for no
        encoder, so that whoever waits for them does not wait for ever."""
        waiting, blocks = self._jobs.waiting, self._blocks
        while waiting and len(self._jobs.started) < self._max_num_seqs:
            blocks.give_to_started()  # first: it may put a started request back to the front
            job = waiting[0]
            found = blocks.found_prefix(job.sequence)
            if not blocks.make_room_behind(found, job):
                break
            needed = units_behind(job.sequence.units, job.sequence.spans, len(found) * self._kv.block_tokens)
            if not self._embeddings.can_hold(list(needed.values())):
                passing = next((other for other in waiting if not other.sequence.units), None)
                if passing is None:
                    break
                job, found, needed = passing, blocks.found_prefix(passing.sequence), {}
                if not blocks.make_room_behind(found, job):
                    break
            waiting.remove(job)
            if found:
                blocks.take(job, found)
            self._start(job, needed)

    def _start(self, job: PrefillJob, needed: dict[UnitHash, EncodeUnit]) -> None:
        sequence = job.sequence
        job.needed = needed
        for unit in needed.values():
            self._embeddings.hold(unit)
        hashes = {sequence.units[span.unit].hash for span in sequence.spans}
        job.sources = dict.fromkeys(hashes - needed.keys(), "prefix")
        sequence.status = Status.RUNNING
        self._jobs.started[sequence.request_id] = job
        self._intake.give_back(job, [unit for unit in job.tickets if unit not in needed])
        self._embeddings.cache.num_hits += sum(map(self._embeddings.cache.is_ready, needed))
        self._intake.bring_all(job)
