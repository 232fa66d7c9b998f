"""A model in its halves: one encodes, one prefills in chunks beside early decodes, one decodes what is moved to it."""

from pathlib import Path

import torch

from tests.model.builders import (
    Blocks,
    Request,
    encode_request,
    family_of,
    make_encoder,
    make_language,
    next_chunk,
    run_step,
)
from triptych.core import Sequence
from triptych.model.loading import load_config
from triptych.model.probe import kv_layout

NUM_BLOCKS = 256
TOKENS_BEFORE_MOVE = 3  # the prefill half decodes a little, so that its batches mix decodes and chunks


class Halves:
    """Three runners that share nothing but copies of blocks."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.encoder, self.embeddings = make_encoder(folder, NUM_BLOCKS, device=device)
        self.prefill = make_language(folder, self.embeddings, NUM_BLOCKS, device)
        self.decode = make_language(folder, None, NUM_BLOCKS, device)
        self.whole_spans = family_of(folder).image_groups
        self.state_blocks = kv_layout(load_config(folder), torch.float32).state_blocks
        self.num_mixed_steps = 0

    def answer(self, requests: list[Request], output_tokens: int, chunk_tokens: int = 11) -> list[list[int]]:
        """Greedy output tokens of each request."""
        embedding_blocks = Blocks(NUM_BLOCKS)
        waiting = [
            (request.sequence(str(i)), encode_request(self.encoder, embedding_blocks, request))
            for i, request in enumerate(requests)
        ]
        sequences = [sequence for sequence, _ in waiting]
        self._prefill_all(waiting, chunk_tokens)
        self._decode_all(sequences, output_tokens)
        return [sequence.token_ids[sequence.num_prompt_tokens :] for sequence in sequences]

    def _prefill_all(self, waiting: list[tuple[Sequence, dict[int, list[int]]]], chunk_tokens: int) -> None:
        waiting, running, blocks = list(waiting), [], Blocks(NUM_BLOCKS, 1, self.state_blocks)
        while waiting or running:
            if waiting and len(running) < 3:
                running.append(waiting.pop(0))
            chunks = [next_chunk(s, chunk_tokens, units, self.whole_spans) for s, units in running]
            for chunk in chunks:
                blocks.grow(chunk.sequence, chunk.start + chunk.length)
            self.num_mixed_steps += len({chunk.length == 1 for chunk in chunks}) == 2
            run_step(self.prefill, chunks)
            running = [pair for pair in running if pair[0].num_output_tokens < TOKENS_BEFORE_MOVE]

    def _decode_all(self, sequences: list[Sequence], output_tokens: int) -> None:
        """Sequences arrive one per step, in other blocks, with nothing but their tokens and `rope_delta`."""
        waiting, active, blocks = list(sequences), [], Blocks(NUM_BLOCKS, 2, self.state_blocks)
        while waiting or active:
            if waiting:
                sequence = waiting.pop(0)
                table = [blocks.free.pop() for _ in sequence.block_table]
                self.decode.restore(self.prefill.offload(sequence.block_table), table)
                sequence.block_table, sequence.scratch = table, None
                active.append(sequence)
            for sequence in active:
                blocks.grow(sequence, len(sequence.token_ids))
            run_step(self.decode, [next_chunk(sequence, 1, {}) for sequence in active])
            active = [sequence for sequence in active if sequence.num_output_tokens < output_tokens]
