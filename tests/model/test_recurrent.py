"""A hybrid model in any chunks, batches and blocks gives the tokens of `generate` and keeps the states of its cache."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.cache_utils import Cache
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.qwen3_5 import modeling_qwen3_5

from tests.checkpoints import make_checkpoint
from tests.reference import reference, reference_inputs, reference_model
from triptych.config import ModelConfig
from triptych.core import Chunk, EncodeUnit, RequestId, SamplingParams, Sequence, Span, UnitHash
from triptych.model import recurrent
from triptych.model.caches import EmbeddingRegion, KVLayout, KVRegion, LayerState
from triptych.model.language import LanguageRunner
from triptych.model.loading import Half, load_config, load_half
from triptych.model.probe import embedding_layout, kv_layout
from triptych.model.recurrent import StateBatch, StateRows

torch.set_num_threads(1)
FAMILY = "qwen3_5"
BLOCK = 16
NUM_BLOCKS = 96
NEW_TOKENS = 12
TEXTS = ["What colour is the circle in picture 2?", "Hello", "How many triangles are there?" * 5, "Describe it. 😀"]


@cache
def checkpoint() -> Path:
    import tempfile

    return make_checkpoint(FAMILY, Path(tempfile.mkdtemp(prefix="checkpoint-hybrid-")), text_layers=5)


@dataclass
class Prompt:
    """A conversation as the family's own processor makes it, the rows of its pictures, and the greedy answer."""

    inputs: Any
    rows: torch.Tensor | None  # of all pictures
    expected: list[int]
    blocks: dict[int, list[int]] = field(default_factory=dict)  # of the embedding region

    @property
    def token_ids(self) -> list[int]:
        return self.inputs["input_ids"][0].tolist()

    def sequence(self, name: str = "r") -> Sequence:
        ids = self.token_ids
        image = load_config(checkpoint()).image_token_id
        units, spans = [], []
        for index, start in enumerate(i for i, t in enumerate(ids) if t == image and ids[i - 1] != image):
            length = next(i for i, token in enumerate([*ids[start:], -1]) if token != image)
            units.append(EncodeUnit(UnitHash(bytes(16)), "image", length, index))
            spans.append(Span(start, length, index, 0))
        arguments = {"image_grid_thw": self.inputs["image_grid_thw"].tolist()} if units else {}
        params = SamplingParams(max_tokens=64, seed=0, temperature=0.0)
        return Sequence(RequestId(name), ids, len(ids), params, tuple(units), tuple(spans), arguments)


@cache
def prompt(num_pictures: int) -> Prompt:
    random = np.random.default_rng(num_pictures)
    sizes = [(64, 48), (40, 88), (96, 96)][:num_pictures]
    pictures = [Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]
    parts = [{"type": "image", "image": picture} for picture in pictures]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": TEXTS[num_pictures]}]}]
    answer, inputs = reference(checkpoint(), messages, NEW_TOKENS), reference_inputs(checkpoint(), messages)
    assert min(answer.gaps) > 1e-3, "the reference's own choice hangs on rounding"
    rows = None
    if pictures:
        with torch.inference_mode():
            model = reference_model(checkpoint()).model
            rows = torch.cat(model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output)
    return Prompt(inputs, rows, answer.token_ids)


@cache
def layout() -> KVLayout:
    return kv_layout(load_config(checkpoint()), torch.float32)


class Instance:
    """A runner whose region holds no number where nothing was stored, and the blocks that are free in it."""

    def __init__(self, seed: int = 0, dtype: str = "float32") -> None:
        config, kind = load_config(checkpoint()), getattr(torch, dtype)
        self.region = KVRegion.allocate(kv_layout(config, kind), NUM_BLOCKS)
        self.region.blocks.fill_(torch.nan)
        self.embeddings = EmbeddingRegion.allocate(embedding_layout(config, kind), 64)
        model = load_half(ModelConfig(path=str(checkpoint()), name="tiny", dtype=dtype), Half.LANGUAGE)
        family = SimpleNamespace(image_groups=False)
        self.runner = LanguageRunner(model, family, self.region, self.embeddings, eos_token_ids=())
        self.free: list[int] = np.random.default_rng(seed).permutation(NUM_BLOCKS).tolist()
        self.free_rows = list(range(64))

    def load(self, request: Prompt) -> dict[int, list[int]]:
        """Puts the rows of the pictures of a prompt into the embedding region: unit -> blocks."""
        blocks, row = {}, 0
        for unit in request.sequence().units:
            blocks[unit.index] = [self.free_rows.pop() for _ in range(-(-unit.num_tokens // BLOCK))]
            for offset in range(unit.num_tokens):
                place = blocks[unit.index][offset // BLOCK] * BLOCK + offset % BLOCK
                self.embeddings.rows[place] = request.rows[row]
                row += 1
        return blocks

    def chunk(self, sequence: Sequence, limit: int, blocks: dict[int, list[int]] | None = None) -> Chunk:
        start = sequence.num_computed
        length = min(limit, len(sequence.token_ids) - start)
        while len(sequence.block_table) < self.region.layout.state_blocks - (-(start + length) // BLOCK):
            sequence.block_table.append(self.free.pop())
        return Chunk(sequence, start, length, blocks or {})

    def run(self, chunks: list[Chunk]) -> None:
        tokens = iter(self.runner.run(chunks))
        for chunk in chunks:
            samples = chunk.samples
            chunk.sequence.num_computed = chunk.start + chunk.length
            if samples:
                chunk.sequence.token_ids.append(next(tokens).token_id)

    def free_of(self, sequence: Sequence) -> None:
        self.free += sequence.block_table
        sequence.block_table = []


@pytest.fixture(scope="module")
def shared() -> Instance:
    return Instance()


@pytest.fixture
def instance(shared: Instance) -> Iterator[Instance]:
    """A region in which nothing stands that a test could lean on."""
    shared.region.blocks.fill_(torch.nan)
    shared.free = np.random.default_rng(0).permutation(NUM_BLOCKS).tolist()
    shared.free_rows = list(range(64))
    return shared


def answer_of(sequence: Sequence) -> list[int]:
    return sequence.token_ids[sequence.num_prompt_tokens :]


def finish(instance: Instance, sequence: Sequence, blocks: dict[int, list[int]] | None = None) -> list[int]:
    while sequence.num_output_tokens < NEW_TOKENS:
        instance.run([instance.chunk(sequence, 1000, blocks)])
    return answer_of(sequence)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 1000])
@pytest.mark.parametrize("num_pictures", [0, 1, 2, 3])
def test_a_prompt_in_chunks_of_any_size_gives_the_tokens_of_generate(
    instance: Instance, num_pictures: int, chunk_tokens: int
) -> None:
    request = prompt(num_pictures)
    sequence, blocks = request.sequence(), instance.load(request)
    while not sequence.num_output_tokens:
        instance.run([instance.chunk(sequence, chunk_tokens, blocks)])
    assert finish(instance, sequence) == request.expected


@pytest.mark.parametrize("chunk_tokens", [1, 5, 1000])
def test_the_states_after_a_prompt_are_those_of_transformers_cache(instance: Instance, chunk_tokens: int) -> None:
    request = prompt(2)
    with torch.inference_mode():
        kept = reference_model(checkpoint())(**request.inputs, use_cache=True).past_key_values
    sequence, blocks = request.sequence(), instance.load(request)
    while not sequence.num_output_tokens:
        instance.run([instance.chunk(sequence, chunk_tokens, blocks)])
    table = sequence.block_table[: layout().state_blocks]
    pages = instance.region.blocks[table].view(-1, layout().page_bytes // 4)
    assert {state.layer for state in layout().states} == {0, 2, 4}
    for state, place in layout().state_pages.items():
        ours = pages[place.start : place.stop].flatten()[: state.num_elements].view(state.shape)
        states = getattr(kept.layers[state.layer], f"{state.name}_states")
        torch.testing.assert_close(ours, states[0][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bytes_together", [64 << 20, 8 << 10])
def test_chunks_and_decodes_of_several_sequences_run_together(
    instance: Instance, monkeypatch: pytest.MonkeyPatch, bytes_together: int
) -> None:
    monkeypatch.setattr(recurrent, "_BYTES_TOGETHER", bytes_together)
    requests = [prompt(index) for index in (0, 1, 2, 3, 0, 1)]
    sequences = [request.sequence() for request in requests]
    blocks = [instance.load(request) for request in requests]
    num_mixed = 0
    for step in range(1000):
        started = [index for index in range(len(requests)) if step >= 2 * index]
        active = [index for index in started if sequences[index].num_output_tokens < NEW_TOKENS]
        if not active:
            break
        chunks = [instance.chunk(sequences[index], 3 + 4 * index, blocks[index]) for index in active]
        num_mixed += len({chunk.length for chunk in chunks}) > 1
        instance.run(chunks)
        for index in active:  # those that leave hand their blocks on as they are
            if sequences[index].num_output_tokens == NEW_TOKENS:
                instance.free_of(sequences[index])
    assert num_mixed > 5
    assert [answer_of(sequence) for sequence in sequences] == [request.expected for request in requests]


def test_first_tokens_of_several_prompts_alone_in_their_chunks_start_without_states(instance: Instance) -> None:
    requests = [prompt(0), prompt(0), prompt(1)]
    sequences = [request.sequence() for request in requests]
    blocks = [instance.load(request) for request in requests]
    instance.run([instance.chunk(sequences[0], 1000)])
    instance.run([instance.chunk(s, 1, b) for s, b in zip(sequences, blocks, strict=True)])
    assert [finish(instance, s, b) for s, b in zip(sequences, blocks, strict=True)] == [r.expected for r in requests]


def test_another_instance_goes_on_from_copied_blocks(instance: Instance) -> None:
    request = prompt(3)
    sequence = request.sequence()
    instance.run([instance.chunk(sequence, 1000, instance.load(request))])
    decode = Instance(seed=5)
    decode.runner.warm_up()
    moved = [decode.free.pop() for _ in sequence.block_table]
    decode.region.blocks[moved] = instance.region.blocks[sequence.block_table]
    there = Sequence(
        sequence.request_id,
        list(sequence.token_ids),
        sequence.num_prompt_tokens,
        sequence.sampling,
        num_computed=sequence.num_computed,
        block_table=moved,
        rope_delta=sequence.rope_delta,
    )
    assert finish(decode, there) == request.expected


def test_an_offloaded_sequence_goes_on_in_other_blocks(instance: Instance) -> None:
    request = prompt(1)
    sequence, blocks = request.sequence(), instance.load(request)
    for _ in range(4):
        instance.run([instance.chunk(sequence, 1000, blocks)])
    saved, count = instance.runner.offload(sequence.block_table), len(sequence.block_table)
    instance.region.blocks.fill_(torch.nan)
    sequence.block_table = [instance.free.pop() for _ in range(count)]
    instance.runner.restore(saved, sequence.block_table)
    assert finish(instance, sequence) == request.expected


def test_a_prompt_that_is_taken_up_again_starts_anew_in_the_same_blocks(instance: Instance) -> None:
    request = prompt(1)
    sequence, blocks = request.sequence(), instance.load(request)
    for _ in range(5):
        instance.run([instance.chunk(sequence, 9, blocks)])
    again = request.sequence()
    again.block_table = sequence.block_table
    again.token_ids += request.expected[:4]
    assert finish(instance, again, blocks) == request.expected


def test_a_token_that_would_enter_the_states_twice_is_a_bug(instance: Instance) -> None:
    sequence = prompt(0).sequence()
    instance.run([instance.chunk(sequence, 5)])
    with pytest.raises(AssertionError, match="starts at 4, the states are those of 5"):
        instance.runner.run([Chunk(sequence, 4, 2)])


@pytest.mark.parametrize("conv_channels", [32, 23], ids=["whole pages", "padded pages"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_of_any_bits_come_back_as_they_were(dtype: torch.dtype, conv_channels: int) -> None:
    states = (
        LayerState(1, "conv", (conv_channels, 4), dtype),
        LayerState(1, "recurrent", (4, 8, conv_channels), torch.float32),
    )
    region = KVRegion.allocate(KVLayout(1, 2, 8, dtype, states), 40)
    region.blocks.fill_(torch.nan)
    bits = torch.Generator().manual_seed(0)
    kept: list[torch.Tensor] = []

    def layer(rows: torch.Tensor, cache_params: Cache) -> torch.Tensor:
        """Puts random bits into its states, and notes what was there before."""
        states = cache_params.layers[1]
        for tensors in (states.conv_states, states.recurrent_states):
            kept.append(tensors[0].clone())
            whole = torch.randint(-128, 128, (tensors[0].numel() * tensors[0].itemsize,), generator=bits).to(torch.int8)
            tensors[0].copy_(whole.view(tensors[0].dtype).view(tensors[0].shape))
            kept.append(tensors[0].clone())
        return rows

    tables = np.random.default_rng(0).permutation(40)[: 3 * region.layout.state_blocks].reshape(3, -1).tolist()
    for start in (0, 1, 2):
        batch = StateBatch(region, [StateRows(start, start + 1, blocks) for blocks in tables])
        batch.run(1, layer, torch.zeros(1, 3, 8))
    conv, new_conv, recurrent, new_recurrent = (kept[index::4] for index in range(4))
    assert not conv[0].any()
    assert not recurrent[0].any()
    for found, left in zip(conv[1:] + recurrent[1:], new_conv[:-1] + new_recurrent[:-1], strict=True):
        assert torch.equal(found.view(torch.uint8), left.view(torch.uint8))


def test_what_blocks_held_before_leaves_no_trace_though_half_of_a_float32_may_be_no_number_in_bfloat16() -> None:
    instance = Instance(dtype="bfloat16")
    answers = []
    for before in (0.0, torch.nan):
        instance.region.blocks.fill_(before)
        sequences = [prompt(0).sequence(), prompt(2).sequence()]
        blocks = [instance.load(prompt(0)), instance.load(prompt(2))]
        while sequences[1].num_output_tokens < NEW_TOKENS:
            instance.run([instance.chunk(s, limit, b) for s, limit, b in zip(sequences, (9, 13), blocks, strict=True)])
        answers.append([answer_of(sequence) for sequence in sequences])
        for sequence in sequences:
            instance.free_of(sequence)
    assert answers[0] == answers[1]
    assert all(len(set(answer)) > NEW_TOKENS // 2 for answer in answers[0])


def test_the_layout_is_found_where_a_package_of_kernels_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(**_: object) -> None:
        raise AssertionError("a kernel needs data")

    expected = layout()
    monkeypatch.setitem(sys.modules, "kernels_for_test", SimpleNamespace(rule=kernel, __name__="kernels_for_test"))
    decorate = use_kernel_func_from_hub_with_fallback("rule", "kernels_for_test")
    decorated = decorate(modeling_qwen3_5.torch_chunk_gated_delta_rule)
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", decorated)
    with pytest.raises(AssertionError, match="needs data"):
        decorated()
    assert kv_layout(load_config(checkpoint()), torch.float32) == expected


def test_decodes_are_stacked_as_long_as_their_states_fit(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    run = StateBatch.run

    def counted(self: StateBatch, layer: int, forward: Any, hidden: torch.Tensor) -> torch.Tensor:
        def noted(rows: torch.Tensor, **arguments: Any) -> torch.Tensor:
            calls.append(tuple(rows.shape[:2]))
            return forward(rows, **arguments)

        return run(self, layer, noted, hidden)

    monkeypatch.setattr(StateBatch, "run", counted)
    sequences = [prompt(0).sequence() for _ in range(5)]
    instance.run([instance.chunk(sequence, 1000) for sequence in sequences])
    late = prompt(2).sequence()
    instance.run([*(instance.chunk(s, 1) for s in sequences), instance.chunk(late, 6)])
    assert calls == [(5, sequences[0].num_prompt_tokens)] * 3 + [(5, 1), (1, 6)] * 3
    calls.clear()
    monkeypatch.setattr(recurrent, "_BYTES_TOGETHER", 2 * 4 * layout().page_bytes)
    instance.run([instance.chunk(s, 1) for s in sequences])
    assert calls == [(2, 1), (2, 1), (1, 1)] * 3


def test_the_comparison_notices_states_that_are_not_kept(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StateBatch, "_store", lambda *_: None)
    instance.region.blocks.zero_()
    assert finish(instance, prompt(0).sequence()) != prompt(0).expected
