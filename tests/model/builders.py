"""Requests and runners for the tests of the model runtime: tiny checkpoints, real forwards, no server around them.

Pictures go through the family's own processor one by one, so nothing here knows how a family expands placeholders.
"""

import itertools
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from tests.checkpoints import make_checkpoint
from tests.reference import reference, reference_inputs
from triptych.config import ModelConfig
from triptych.core import Chunk, EncodeUnit, EncodeWork, RequestId, Role, SamplingParams, Sequence, Span, UnitHash
from triptych.model.caches import EmbeddingRegion, KVRegion
from triptych.model.encoder import EncodeRunner
from triptych.model.language import LanguageRunner
from triptych.model.loading import load_config, load_model
from triptych.model.probe import embedding_layout, kv_layout

BLOCK = 16
WORDS = ["What colour is the circle?", "How many triangles are there in the picture?", "Describe it.", "Hello 0 1 2"]
SIZES = [(64, 48), (40, 88), (96, 96), (33, 50)]


@dataclass
class Request:
    """A conversation, expanded by the reference's processor, and its greedy answer."""

    token_ids: list[int]
    units: tuple[EncodeUnit, ...]
    spans: tuple[Span, ...]
    pixels: list[dict[str, torch.Tensor]]  # per unit
    expected: list[int]

    def sequence(self, name: str = "r", **sampling: Any) -> Sequence:
        params = SamplingParams(**({"max_tokens": 64, "seed": 0, "temperature": 0.0} | sampling))
        ids = list(self.token_ids)
        return Sequence(RequestId(name), ids, len(ids), params, units=self.units, spans=self.spans)


@cache
def checkpoint(family: str) -> Path:
    import tempfile

    return make_checkpoint(family, Path(tempfile.mkdtemp(prefix=f"triptych-{family}-")))


def model_config(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(**({"path": str(folder), "name": "tiny", "dtype": "float32"} | changes))


def make_request(family: str, index: int, new_tokens: int = 10) -> Request:
    """Request `index` has 2, 0, 3, 1, 2, ... pictures of different sizes and its own text."""
    folder = checkpoint(family)
    random = np.random.default_rng(index)
    shapes = [SIZES[(index + k) % len(SIZES)] for k in range([2, 0, 3, 1][index % 4])]
    images = [Image.fromarray(random.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in shapes]
    text = WORDS[index % len(WORDS)] + " Please." * (index // 2)
    parts = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    messages = [{"role": "user", "content": parts}]
    answer = reference(folder, messages, new_tokens)
    config = load_config(folder)
    singles = [reference_inputs(folder, [_only(image)]) for image in images]
    counts = [int((single["input_ids"] == config.image_token_id).sum()) for single in singles]
    units = tuple(
        _unit(single, count, index * 10 + i) for i, (single, count) in enumerate(zip(singles, counts, strict=True))
    )
    pixels = [
        {k: v for k, v in s.items() if k in ("pixel_values", "image_grid_thw", "pixel_attention_mask")} for s in singles
    ]
    spans = find_spans(answer.prompt_ids, config.image_token_id, counts)
    return Request(answer.prompt_ids, units, spans, pixels, answer.token_ids)


def find_spans(token_ids: list[int], placeholder: int, counts: list[int]) -> tuple[Span, ...]:
    """Runs of the placeholder, dealt out to units in order."""
    spans, unit, offset, place = [], 0, 0, 0
    for is_placeholder, run in itertools.groupby(token_ids, lambda token: token == placeholder):
        left = len(list(run))
        while is_placeholder and left:
            length = min(left, counts[unit] - offset)
            spans.append(Span(place, length, unit, offset))
            place, left, offset = place + length, left - length, offset + length
            if offset == counts[unit]:
                unit, offset = unit + 1, 0
        place += left
    return tuple(spans)


def _only(image: Image.Image) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "x"}]}


def _unit(inputs: Any, count: int, number: int) -> EncodeUnit:
    grid = tuple(inputs["image_grid_thw"][0].tolist()) if "image_grid_thw" in inputs else None
    return EncodeUnit(UnitHash(number.to_bytes(16, "big")), "image", count, grid)


@dataclass
class Pixels:
    """A processor whose media bytes are keys of tensors made beforehand."""

    tensors: dict[bytes, dict[str, torch.Tensor]] = field(default_factory=dict)

    def pixels(self, data: bytes) -> dict[str, torch.Tensor]:
        return self.tensors[data]


@dataclass
class Blocks:
    """Hands out block ids in a scattered order."""

    num_blocks: int
    seed: int = 0

    def __post_init__(self) -> None:
        self.free = np.random.default_rng(self.seed).permutation(self.num_blocks).tolist()

    def take(self, tokens: int) -> list[int]:
        return [self.free.pop() for _ in range(-(-tokens // BLOCK))]

    def grow(self, sequence: Sequence, tokens: int) -> None:
        while len(sequence.block_table) * BLOCK < tokens:
            sequence.block_table.append(self.free.pop())


def family_of(folder: Path) -> Any:
    return SimpleNamespace(image_groups=load_config(folder).model_type == "gemma3")


def make_encoder(
    folder: Path, num_blocks: int = 64, model: PreTrainedModel | None = None, device: str = "cpu"
) -> tuple[EncodeRunner, EmbeddingRegion, Pixels]:
    model = model or load_model(model_config(folder, device=device), Role.E)
    region = EmbeddingRegion.allocate(embedding_layout(model.config, torch.float32), num_blocks, device)
    pixels = Pixels()
    return EncodeRunner(model, pixels, region), region, pixels


def make_language(
    folder: Path, embeddings: EmbeddingRegion | None, num_blocks: int = 128, device: str = "cpu"
) -> LanguageRunner:
    model = load_model(model_config(folder, device=device), Role.P if embeddings is not None else Role.D)
    return language_runner(model, folder, embeddings, num_blocks, device)


def language_runner(
    model: PreTrainedModel,
    folder: Path,
    embeddings: EmbeddingRegion | None,
    num_blocks: int = 128,
    device: str = "cpu",
) -> LanguageRunner:
    region = KVRegion.allocate(kv_layout(load_config(folder), torch.float32), num_blocks, device)
    return LanguageRunner(model, family_of(folder), region, embeddings, eos_token_ids=())


def encode_request(encoder: EncodeRunner, pixels: Pixels, blocks: Blocks, request: Request) -> dict[int, list[int]]:
    """Unit index -> blocks with its rows."""
    works = []
    for unit, tensors in zip(request.units, request.pixels, strict=True):
        pixels.tensors[unit.hash] = tensors
        works.append(EncodeWork(unit, unit.hash, blocks.take(unit.num_tokens)))
    assert encoder.run(works) == [None] * len(works)
    return {index: work.blocks for index, work in enumerate(works)}


def next_chunk(
    sequence: Sequence, limit: int, embedding_blocks: dict[int, list[int]], whole_spans: bool = False
) -> Chunk:
    """At most `limit` tokens; a picture that may not be cut is taken whole."""
    end = min(sequence.num_computed + limit, len(sequence.token_ids))
    if whole_spans:
        end = max([end, *(s.start + s.length for s in sequence.spans if s.start < end < s.start + s.length)])
    return Chunk(sequence, sequence.num_computed, end - sequence.num_computed, embedding_blocks)


def run_step(runner: LanguageRunner, chunks: list[Chunk]) -> None:
    """Runs, then commits as a stage would."""
    tokens = iter(runner.run(chunks))
    for chunk in chunks:
        samples = chunk.samples
        chunk.sequence.num_computed = chunk.start + chunk.length
        if samples:
            chunk.sequence.token_ids.append(next(tokens).token_id)
    assert next(tokens, None) is None
