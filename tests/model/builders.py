"""Requests and runners for the tests of the model runtime: tiny checkpoints, real forwards, no server around them."""

import io
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from tests.checkpoints import make_checkpoint
from tests.reference import Messages, reference
from triptych.config import ModelConfig
from triptych.core import (
    Chunk,
    EncodeUnit,
    EncodeWork,
    Media,
    PositionArguments,
    RequestId,
    SamplingParams,
    Sequence,
    Span,
)
from triptych.model.caches import EmbeddingRegion, KVRegion
from triptych.model.encoder import EncodeRunner
from triptych.model.families import Family, family_for
from triptych.model.headers import ImageHeader
from triptych.model.language import LanguageRunner
from triptych.model.loading import Half, load_config, load_half
from triptych.model.probe import embedding_layout, kv_layout
from triptych.model.processor import Item, Processor

BLOCK = 16
WORDS = ["What colour is the circle?", "How many triangles are there in the picture?", "Describe it.", "Hello 0 1 2"]
SIZES = [(64, 48), (40, 88), (96, 96), (33, 50)]


@dataclass
class Request:
    """A conversation, expanded, and its greedy answer by plain transformers."""

    token_ids: list[int]
    units: tuple[EncodeUnit, ...]
    spans: tuple[Span, ...]
    position_arguments: PositionArguments
    media: list[Media]  # per unit
    expected: list[int]

    def sequence(self, name: str = "r", **sampling: Any) -> Sequence:
        params = SamplingParams(**({"max_tokens": 64, "seed": 0, "temperature": 0.0} | sampling))
        ids = list(self.token_ids)
        return Sequence(RequestId(name), ids, len(ids), params, self.units, self.spans, self.position_arguments)


@cache
def checkpoint(family: str) -> Path:
    import tempfile

    return make_checkpoint(family, Path(tempfile.mkdtemp(prefix=f"checkpoint-{family}-")))


def model_config(folder: Path, **changes: Any) -> ModelConfig:
    return ModelConfig(**({"path": str(folder), "name": "tiny", "dtype": "float32"} | changes))


@cache
def processor_of(folder: Path) -> Processor:
    return Processor.load(folder)


def make_request(family: str, index: int, new_tokens: int = 10) -> Request:
    """Request `index` has 2, 0, 3, 1, 2, ... pictures of different sizes and its own text."""
    folder = checkpoint(family)
    shapes = [SIZES[(index + k) % len(SIZES)] for k in range([2, 0, 3, 1][index % 4])]
    pictures = [make_picture(width, height, seed=10 * index + i) for i, (width, height) in enumerate(shapes)]
    text = WORDS[index % len(WORDS)] + " Please." * (index // 2)
    parts = [{"type": "image", "image": picture} for picture in pictures] + [{"type": "text", "text": text}]
    items: list[Item] = [("image", ImageHeader(*shape)) for shape in shapes]
    return expand(folder, [{"role": "user", "content": parts}], items, pictures, new_tokens)


def expand(folder: Path, messages: Messages, items: list[Item], files: list[bytes], new_tokens: int = 10) -> Request:
    """A conversation with media in it. `items` and `files` are those of its parts, in order."""
    processor = processor_of(folder)
    answer = reference(folder, messages, new_tokens)
    prompt = processor.expand(processor.render(_without_media(messages)), items)
    assert prompt.token_ids == answer.prompt_ids
    media = processor.media(items, [(data, blake2b(data, digest_size=16).digest()) for data in files])
    units = processor.encode_units(prompt, media)
    return Request(
        prompt.token_ids,
        tuple(unit for unit, _ in units),
        prompt.spans,
        prompt.position_arguments,
        [item for _, item in units],
        answer.token_ids,
    )


def make_picture(width: int, height: int, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _without_media(messages: Messages) -> Messages:
    def parts(content: Any) -> Any:
        if isinstance(content, str):
            return content
        return [part if part["type"] == "text" else {"type": part["type"]} for part in content]

    return [message | {"content": parts(message["content"])} for message in messages]


@dataclass
class Blocks:
    """Hands out block ids in a scattered order."""

    num_blocks: int
    seed: int = 0
    state_blocks: int = 0  # of every sequence, before those of its tokens

    def __post_init__(self) -> None:
        self.free = np.random.default_rng(self.seed).permutation(self.num_blocks).tolist()

    def take(self, tokens: int) -> list[int]:
        return [self.free.pop() for _ in range(-(-tokens // BLOCK))]

    def grow(self, sequence: Sequence, tokens: int) -> None:
        while (len(sequence.block_table) - self.state_blocks) * BLOCK < tokens:
            sequence.block_table.append(self.free.pop())


def family_of(folder: Path) -> Family:
    return family_for(load_config(folder))


def make_encoder(
    folder: Path, num_blocks: int = 256, model: PreTrainedModel | None = None, device: str = "cpu"
) -> tuple[EncodeRunner, EmbeddingRegion]:
    model = model or load_half(model_config(folder, device=device), Half.ENCODE)
    region = EmbeddingRegion.allocate(embedding_layout(model.config, torch.float32), num_blocks, device)
    return EncodeRunner(model, processor_of(folder), region), region


def make_language(
    folder: Path, embeddings: EmbeddingRegion | None, num_blocks: int = 128, device: str = "cpu"
) -> LanguageRunner:
    model = load_half(model_config(folder, device=device), Half.LANGUAGE)
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


def encode_request(encoder: EncodeRunner, blocks: Blocks, request: Request) -> dict[int, list[int]]:
    """Unit index -> blocks with its rows."""
    works = [
        EncodeWork(unit, media, blocks.take(unit.num_tokens))
        for unit, media in zip(request.units, request.media, strict=True)
    ]
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
