"""The encode-only and the language-only half of every family, fed like in a server, give the tokens of `generate`."""

import pytest
import torch

from tests.checkpoints import FAMILIES
from tests.model.builders import (
    Blocks,
    checkpoint,
    encode_request,
    make_encoder,
    make_language,
    make_request,
    next_chunk,
    run_step,
)

torch.set_num_threads(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_halves_of_a_model_with_mixed_chunked_batches_give_the_tokens_of_generate(family: str) -> None:
    folder = checkpoint(family)
    requests = [make_request(family, index) for index in range(5)]
    encoder, embeddings, pixels = make_encoder(folder, 128)
    prefill, decode = make_language(folder, embeddings), make_language(folder, None)
    embedding_blocks = Blocks(128)
    prefill_blocks, decode_blocks = Blocks(128, seed=1), Blocks(128, seed=2)
    waiting = [
        (request.sequence(str(i)), encode_request(encoder, pixels, embedding_blocks, request))
        for i, request in enumerate(requests)
    ]
    sequences = [sequence for sequence, _ in waiting]
    running, moved, kinds = [], [], set()
    while waiting or running:
        if waiting and len(running) < 3:
            running.append(waiting.pop(0))
        chunks = [next_chunk(s, 11, blocks, whole_spans=family == "gemma3") for s, blocks in running]
        for chunk in chunks:
            prefill_blocks.grow(chunk.sequence, chunk.start + chunk.length)
        kinds.add((any(c.length == 1 for c in chunks), any(c.length > 1 for c in chunks)))
        run_step(prefill, chunks)
        done = [s for s, _ in running if s.num_output_tokens == 3]
        running = [pair for pair in running if pair[0] not in done]
        for (
            sequence
        ) in done:  # to other blocks of another instance, which learns nothing else than tokens and rope_delta
            table = decode_blocks.take(sequence.num_computed)
            decode.restore(prefill.offload(sequence.block_table), table)
            sequence.block_table, sequence.scratch = table, None
            moved.append(sequence)
    active = []
    while moved or active:
        if moved:
            active.append(moved.pop(0))
        for sequence in active:
            decode_blocks.grow(sequence, len(sequence.token_ids))
        run_step(decode, [next_chunk(s, 1, {}) for s in active])
        active = [s for s in active if s.num_output_tokens < 10]
    assert (True, True) in kinds, "no step mixed decodes and chunks"
    for sequence, request in zip(sequences, requests, strict=True):
        answer = sequence.token_ids[sequence.num_prompt_tokens :]
        assert answer[: len(request.expected)] == request.expected
