"""What runs next of the prompts that have blocks: as much as has its embeddings, within a budget of tokens."""

from collections.abc import Iterable

from triptych.core import Chunk, Sequence
from triptych.memory.embedding_cache import EmbeddingCache
from triptych.stages.prefill.intake import Intake
from triptych.stages.prefill.jobs import PrefillJob


class Chunks:
    """Of started requests, oldest first."""

    def __init__(self, embeddings: EmbeddingCache, intake: Intake, *, streamed: bool, whole_spans: bool) -> None:
        """`streamed`: also of those that miss embeddings, up to the first that is missing. `whole_spans`: none ends
        inside a picture."""
        self._embeddings = embeddings
        self._intake = intake
        self._streamed = streamed
        self._whole_spans = whole_spans

    def next(self, started: Iterable[PrefillJob], budget: int) -> list[Chunk]:
        """Of at most `budget` tokens together."""
        chunks: list[Chunk] = []
        for job in started:
            if budget <= 0:
                break
            length = self._next_length(job, budget)
            if length > 0:
                chunks.append(self._chunk(job.sequence, length))
                budget -= length
        return chunks

    def _next_length(self, job: PrefillJob, budget: int) -> int:
        """How many tokens of a request can run now: up to the first placeholder that has no embedding yet."""
        sequence, spans = job.sequence, job.sequence.spans
        if not sequence.block_table:
            return 0
        complete = self._intake.catch_up(job)
        if not complete and not self._streamed:
            return 0
        ready_end = len(sequence.token_ids) if complete else spans[job.num_ready_spans].start
        end = min(ready_end, sequence.num_computed + budget)
        if self._whole_spans:
            end = _outside_spans(sequence, end)
        return end - sequence.num_computed

    def _chunk(self, sequence: Sequence, length: int) -> Chunk:
        start = sequence.num_computed
        chunk = Chunk(sequence, start, length)
        for span in sequence.spans:
            if span.start < start + length and start < span.start + span.length:
                entry = self._embeddings.find(sequence.units[span.unit].hash)
                assert entry is not None and entry.ready, f"span at {span.start} scheduled without its embedding"
                chunk.embedding_blocks[span.unit] = entry.blocks
        return chunk


def _outside_spans(sequence: Sequence, end: int) -> int:
    """Moves a chunk's end out of a span: back to its start, or, if nothing stands before it, on to its end."""
    for span in sequence.spans:
        if span.start < end < span.start + span.length:
            return span.start if span.start > sequence.num_computed else span.start + span.length
    return end
