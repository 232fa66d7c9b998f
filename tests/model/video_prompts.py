"""Conversations about videos: expanded, encoded unit by unit, and answered by runners, for any family."""

import copy
import hashlib
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from tests.model.builders import BLOCK, Blocks, checkpoint, language_runner, model_config, next_chunk, run_step
from tests.model.clips import write
from tests.reference import reference_processor
from triptych.core import EncodeUnit, EncodeWork, Media, RequestId, SamplingParams, Sequence
from triptych.model.caches import EmbeddingRegion
from triptych.model.encoder import EncodeRunner
from triptych.model.loading import Half, load_config, load_half
from triptych.model.probe import embedding_layout, kv_layout
from triptych.model.processor import Processor, Prompt
from triptych.model.videos import read_video_header

NUM_BLOCKS = 128

Videos = list[tuple[bytes, int]]  # of a prompt: files, and at most how many frames of each are looked at


@cache
def moving(num_frames: int, width: int, height: int, fps: int = 10) -> bytes:
    rng = np.random.default_rng(num_frames * width)
    noise = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    return write([np.roll(noise, 5 * shift, 1)[:height, :width] for shift in range(num_frames)], fps=fps)


@cache
def processor_of(family: str) -> Processor:
    return Processor.load(checkpoint(family))


@cache
def encoder_of(family: str) -> PreTrainedModel:
    return load_half(model_config(checkpoint(family)), Half.ENCODE)


@cache
def language_of(family: str) -> PreTrainedModel:
    return load_half(model_config(checkpoint(family)), Half.LANGUAGE)


def conversation(num_videos: int) -> list[dict[str, Any]]:
    videos = [{"type": "video_url", "video_url": {"url": "data:"}} for _ in range(num_videos)]
    return [{"role": "user", "content": [*videos, {"type": "text", "text": "What is this?"}]}]


def expanded(family: str, videos: Videos) -> tuple[Prompt, list[tuple[EncodeUnit, Media]]]:
    processor = processor_of(family)
    items = [("video", read_video_header(data, num_frames=num_frames)) for data, num_frames in videos]
    prompt = processor.expand(processor.render(conversation(len(videos))), items)
    files = [(data, hashlib.blake2b(data, digest_size=16).digest()) for data, _ in videos]
    return prompt, processor.encode_units(prompt, processor.media(items, files))


def unit_inputs(family: str, units: list[tuple[EncodeUnit, Media]]) -> list[dict[str, Tensor]]:
    processor = processor_of(family)
    prepared = {media.hash: processor.prepare(media) for _, media in units}
    return [processor.inputs(media, prepared[media.hash], unit.index) for unit, media in units]


def sequence_of(prompt: Prompt, units: list[tuple[EncodeUnit, Media]]) -> Sequence:
    ids = list(prompt.token_ids)
    return Sequence(
        RequestId("r"),
        ids,
        len(ids),
        SamplingParams(max_tokens=64, seed=0, temperature=0.0),
        units=tuple(unit for unit, _ in units),
        spans=prompt.spans,
        position_arguments=prompt.position_arguments,
    )


@torch.inference_mode()
def encoded(
    family: str, units: list[tuple[EncodeUnit, Media]], inputs: list[dict[str, Tensor]], batches: list[list[int]]
) -> list[Tensor]:
    rows: dict[int, Tensor] = {}
    for batch in batches:
        joined = {name: torch.cat([inputs[index][name] for index in batch]) for name in inputs[0]}
        features = processor_of(family).features("video", encoder_of(family), joined)
        rows.update(zip(batch, features.split([units[index][0].num_tokens for index in batch]), strict=True))
    return [rows[index] for index in range(len(units))]


def answered(family: str, videos: Videos, num_tokens: int) -> list[int]:
    """Units are encoded by one runner, and read by another that prefills in chunks."""
    folder = checkpoint(family)
    prompt, units = expanded(family, videos)
    region = EmbeddingRegion.allocate(embedding_layout(load_config(folder), torch.float32), NUM_BLOCKS, "cpu")
    encoder = EncodeRunner(encoder_of(family), processor_of(family), region)
    free = Blocks(NUM_BLOCKS)
    works = [EncodeWork(unit, media, free.take(unit.num_tokens)) for unit, media in units]
    for start in range(0, len(works), 3):
        assert encoder.run(works[start : start + 3]) == [None] * len(works[start : start + 3])
    language = language_runner(language_of(family), folder, region, NUM_BLOCKS)
    sequence = sequence_of(prompt, units)
    rows = {index: work.blocks for index, work in enumerate(works)}
    blocks = Blocks(NUM_BLOCKS, seed=1)
    state_tokens = BLOCK * kv_layout(load_config(folder), torch.float32).state_blocks
    while sequence.num_output_tokens < num_tokens:
        chunk = next_chunk(sequence, 37, rows)
        blocks.grow(sequence, state_tokens + chunk.start + chunk.length)
        run_step(language, [chunk])
    return sequence.token_ids[sequence.num_prompt_tokens :]


def processed(family: str, num_videos: int, video_processor: Any) -> Any:
    """What the family's own processor makes of the conversation, if this one makes the pixel values."""
    processor: Any = copy.copy(reference_processor(checkpoint(family)))
    processor.video_processor = video_processor
    parts = [*({"type": "video"} for _ in range(num_videos)), {"type": "text", "text": "What is this?"}]
    text = ProcessorMixin.apply_chat_template(
        processor, [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
    )
    frames = [np.zeros((2, 8, 8, 3), np.uint8)] * num_videos  # only their number counts
    return processor(text=[text], videos=frames, return_tensors="pt")
