"""KV blocks for prompts: who gets them, and who gives them up."""

from triptych.core import Sequence, Status
from triptych.memory.kv_cache import KVCache
from triptych.stages.prefill.intake import Intake
from triptych.stages.prefill.jobs import Jobs, PrefillJob


class PromptBlocks:
    """A started request takes blocks for its whole prompt at once, in arrival order. Those that wait for embeddings
    give theirs up to decodes of this instance and to older requests that miss none."""

    def __init__(self, kv: KVCache, jobs: Jobs, intake: Intake, *, streamed: bool) -> None:
        """`streamed`: also those get blocks that miss embeddings."""
        self._kv = kv
        self._jobs = jobs
        self._intake = intake
        self._streamed = streamed
        kv.reclaim_waiting = self._preempt

    def found_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks that a request may begin with. The prompt's last token is always computed: samples and the positions
        of what is decoded follow from it."""
        return self._kv.find(sequence.prompt_hashes, sequence.num_prompt_tokens - 1)

    def make_room_behind(self, found: list[int], job: PrefillJob) -> bool:
        """Whether a request can take its KV space behind a prefix that is here; without one it is taken later. Who
        waits for it here waits for decodes, for readers, or for requests that started before: they all go on."""
        sequence = job.sequence
        if not found:
            return True
        return not self._is_short and self._kv.make_room_for_new(sequence, len(sequence.token_ids), found)

    def take(self, job: PrefillJob, found: list[int]) -> None:
        """There is room."""
        self._kv.hold(job.sequence, len(job.sequence.token_ids), found)
        job.num_cached = job.sequence.num_computed

    def give_to_started(self) -> None:
        """Oldest first. One whose embeddings are not all here may be passed by younger ones."""
        for job in list(self._jobs.started.values()):
            if job.sequence.block_table or job.sequence.status is Status.WAITING:  # reset for an older one just now
                continue
            complete = self._intake.catch_up(job)
            if (complete or self._streamed) and not self._try_to_take(job, complete) and complete:
                break

    def _try_to_take(self, job: PrefillJob, complete: bool) -> bool:
        """A request that misses embeddings takes only what is free; a complete one also what younger ones wait with."""
        sequence = job.sequence
        found = self.found_prefix(sequence)
        while not self._kv.make_room_for_new(sequence, len(sequence.token_ids), found):
            if not complete or not self._preempt(older=job):
                return False
            found = self.found_prefix(sequence)
        self.take(job, found)
        return True

    @property
    def _is_short(self) -> bool:
        """Whether a started request waits for blocks and nothing else: younger ones must not take them."""
        started = self._jobs.started.values()
        return any(not job.sequence.block_table and self._intake.catch_up(job) for job in started)

    def _preempt(self, older: PrefillJob | None = None) -> bool:
        """Takes the KV of the youngest request that waits for embeddings; with `older`, of one younger than that. It is
        computed again, or found. False where there is none."""
        for job in reversed(self._jobs.started.values()):
            if job is older:
                return False
            if job.sequence.block_table and not self._intake.catch_up(job):
                self._reset(job)
                return True
        return False

    def _reset(self, job: PrefillJob) -> None:
        """As if the request had not begun. If it counted on a prefix for some units, it starts again, as the next."""
        sequence = job.sequence
        self._kv.free(sequence)
        sequence.num_computed, sequence.sealed = 0, []
        job.num_ready_spans = job.num_cached = 0
        if "prefix" in job.sources.values():
            del self._jobs.started[sequence.request_id]
            self._intake.let_go(job)
            job.sources, job.announced = {}, set(job.tickets)  # what it had may be evicted by then
            sequence.status = Status.WAITING
            self._jobs.waiting.appendleft(job)
