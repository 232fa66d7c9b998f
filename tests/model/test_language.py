"""The encode-only and the language-only half of every family, fed like in a server, give the tokens of `generate`."""

from collections.abc import Callable

import pytest
import torch

from tests.checkpoints import IMAGE_FAMILIES
from tests.model.builders import (
    Blocks,
    Request,
    checkpoint,
    encode_request,
    make_encoder,
    make_language,
    make_request,
    next_chunk,
    run_step,
)
from tests.model.halves import Halves
from triptych.core import Chunk, Sequence
from triptych.model.language import LanguageRunner

torch.set_num_threads(1)


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_halves_of_a_model_with_mixed_chunked_batches_give_the_tokens_of_generate(family: str) -> None:
    requests = [make_request(family, index) for index in range(5)]
    halves = Halves(checkpoint(family))
    answers = halves.answer(requests, output_tokens=10)
    assert halves.num_mixed_steps > 0
    for answer, request in zip(answers, requests, strict=True):
        assert answer[: len(request.expected)] == request.expected


def prepare(family: str, index: int = 2) -> tuple[Request, LanguageRunner, dict[int, list[int]]]:
    """A request whose pictures are encoded, and a runner to prefill it."""
    folder, request = checkpoint(family), make_request(family, index)
    encoder, embeddings = make_encoder(folder)
    runner = make_language(folder, embeddings)
    return request, runner, encode_request(encoder, Blocks(64), request)


def answer_alone(
    runner: LanguageRunner, sequence: Sequence, embedding_blocks: dict[int, list[int]], count: int, limit: int = 1000
) -> list[int]:
    """Runs a sequence alone until it has `count` output tokens."""
    blocks = Blocks(128, 3, runner._kv.layout.state_blocks)
    while sequence.num_output_tokens < count:
        chunk = next_chunk(sequence, limit, embedding_blocks)
        blocks.grow(sequence, chunk.start + chunk.length)
        run_step(runner, [chunk])
    return sequence.token_ids[sequence.num_prompt_tokens :]


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_a_request_alone_gives_the_tokens_of_generate(family: str) -> None:
    request, runner, blocks = prepare(family)
    assert answer_alone(runner, request.sequence(), blocks, len(request.expected)) == request.expected


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_request_that_is_taken_up_again_behind_its_output_goes_on_with_the_same_tokens(family: str) -> None:
    request, runner, blocks = prepare(family)
    again = request.sequence()
    again.token_ids += request.expected[:4]
    assert answer_alone(runner, again, blocks, len(request.expected)) == request.expected


def test_a_chunk_that_starts_behind_cached_blocks_needs_only_the_pictures_in_it() -> None:
    request, runner, blocks = prepare("qwen3_vl")
    first = request.sequence()
    expected = answer_alone(runner, first, blocks, 3)
    second = request.sequence()
    second.num_computed = (len(second.token_ids) - 1) // 16 * 16
    second.block_table = list(first.block_table[: second.num_computed // 16])
    needed = {span.unit for span in request.spans if span.start + span.length > second.num_computed}
    assert needed < set(blocks)
    own = Blocks(128)
    own.free = [block for block in range(128) if block not in first.block_table]
    own.grow(second, len(second.token_ids))
    run_step(runner, [next_chunk(second, 1000, {unit: blocks[unit] for unit in needed})])
    assert second.token_ids[second.num_prompt_tokens :] == expected[:1]
    assert second.rope_delta == first.rope_delta


def test_chunks_that_do_not_sample_give_no_token_and_results_keep_the_order_of_the_chunks() -> None:
    request, runner, _ = prepare("llava", index=1)
    assert not request.units
    long, short = request.sequence("long"), request.sequence("short", logprobs=0)
    short.token_ids = [*short.token_ids[:5], 3]
    short.num_prompt_tokens = 5
    blocks = Blocks(128)
    for sequence in (long, short):
        blocks.grow(sequence, 32)
    assert runner.run([Chunk(long, 0, 4)]) == []
    first, second = runner.run([Chunk(short, 0, 6), Chunk(long, 4, len(long.token_ids) - 4)])
    assert first.logprobs is not None
    assert second.logprobs is None
    assert second.token_id == request.expected[0]


def test_offloaded_blocks_come_back_as_they_were() -> None:
    request, runner, blocks = prepare("llava")
    sequence = request.sequence()
    answer_alone(runner, sequence, blocks, 2)
    saved = runner.offload(sequence.block_table)
    moved = [block for block in range(128) if block not in sequence.block_table][: len(sequence.block_table)]
    runner.restore(saved, moved)
    assert torch.equal(runner.offload(moved), saved)


def test_a_picture_cut_in_two_is_a_bug_where_its_tokens_see_each_other() -> None:
    request, runner, blocks = prepare("gemma3")
    sequence = request.sequence()
    Blocks(128).grow(sequence, len(sequence.token_ids))
    with pytest.raises(AssertionError, match="cuts a picture"):
        runner.run([Chunk(sequence, 0, request.spans[0].start + 2, blocks)])


def test_warming_up_works_in_a_region_of_two_blocks() -> None:
    make_language(checkpoint("qwen3_vl"), None, num_blocks=2).warm_up()


def _one_axis(runner: LanguageRunner) -> None:
    runner._positions.of_prompt = lambda s: (torch.arange(s.num_prompt_tokens).expand(3, -1).numpy(), 0)  # type: ignore[method-assign]


def _no_groups(runner: LanguageRunner) -> None:
    runner._image_groups = False


def _no_deepstack(runner: LanguageRunner) -> None:
    runner._deepstack = 0


def _no_windows(runner: LanguageRunner) -> None:
    for module in runner._decoder.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("family", "break_it"),
    [
        ("qwen2_5_vl", _one_axis),
        ("gemma3", _no_groups),
        ("gemma3", _no_windows),
        ("qwen3_vl", _no_deepstack),
    ],
)
def test_the_comparison_notices_a_mechanism_that_is_missing(
    family: str, break_it: Callable[[LanguageRunner], None]
) -> None:
    notices = 0
    for index in (2, 3, 6, 7):
        request, runner, blocks = prepare(family, index)
        break_it(runner)
        notices += answer_alone(runner, request.sequence(), blocks, len(request.expected)) != request.expected
    assert notices
