"""Videos and sounds through a whole server, by a client's usual means, get the answers of plain transformers."""

import asyncio
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata

from tests.flows.questions import (
    Question,
    ask_all,
    differences,
    encoded_units,
    picture,
    unit_sources,
    wait_until,
)
from tests.flows.servers import running, wait_until_idle
from tests.model.builders import checkpoint, processor_of
from tests.model.sounds import Samples, encoded, float_wav, noise
from tests.model.video_prompts import moving
from tests.reference import Reference, Video, reference
from triptych.core import Media
from triptych.model.videos import read_video_header

torch.set_num_threads(1)

# The kinds of media that prompts hold, the one that this is about first.
TAKEN: dict[str, tuple[str, ...]] = {
    "qwen2_audio": ("audio",),
    "voxtral": ("audio",),
    "audioflamingo3": ("audio",),
    "qwen2_5_omni": ("video", "audio", "image"),
    "qwen2_vl": ("video", "image"),
    "qwen2_5_vl": ("video", "image"),
    "qwen3_vl": ("video", "image"),
    "qwen3_5": ("video", "image"),
    "glm4v": ("video",),  # whose `generate` takes no pictures beside a video: both have the same token
    "internvl": ("video", "image"),
    "llava_onevision": ("video", "image"),
}
ONE_UNIT = ("qwen2_audio",)  # families whose items are one unit each
RATE = 16_000
NUM_FRAMES = 5  # of each video that are looked at: three slices, the last of them half empty
FRAMES = {"media_io_kwargs": {"video": {"num_frames": NUM_FRAMES}}}
NUM_QUESTIONS = 8
TEXTS = ["what is this", "how many of them are there and which is the loudest", "tell me", "and now this one please"]


@pytest.mark.parametrize("placement", ["2e1p1d", "1epd"])
@pytest.mark.parametrize("family", TAKEN)
def test_greedy_answers_equal_generate(family: str, placement: str) -> None:
    folder, (first, *others) = checkpoint(family), questions(family)
    with running(folder, placement) as url:
        assert not differences(folder, ask(url, [first]), expected(family)[:1])
        assert wait_until(lambda: all(encoded_units(url).values())), f"units by instance: {encoded_units(url)}"
        assert not differences(folder, ask(url, others), expected(family)[1:])
        wait_until_idle(url, timeout_s=2)
        assert_repeated_items_are_not_encoded_again(url, first)


def assert_repeated_items_are_not_encoded_again(url: str, question: Question) -> None:
    before = unit_sources(url)
    (message,) = question.messages
    greeting = {"type": "text", "text": "hello again"}
    ask(url, [Question([message | {"content": [greeting, *message["content"]]}], max_tokens=2)])
    after = unit_sources(url)
    assert after.total() > before.total()
    assert after["computed"] == before["computed"] > 0


def ask(url: str, asked: list[Question]) -> list[Any]:
    return asyncio.run(ask_all(url, asked, extra_body=FRAMES))


@cache
def expected(family: str) -> list[Reference]:
    return [reference(checkpoint(family), each.messages, each.max_tokens) for each in questions(family)]


@cache
def questions(family: str) -> list[Question]:
    """The first is about several units of one kind, the second about an item of each kind; the others differ."""
    rng, kinds = random.Random(family), TAKEN[family]
    # The processor of Qwen2.5-Omni takes one rate for all videos of a prompt.
    most = {kind: 1 if kind == "video" and "audio" in kinds else 2 for kind in kinds}
    counts = [{kinds[0]: 2 if family in ONE_UNIT else 1}, dict.fromkeys(kinds, 1)]
    counts += [{kind: rng.randint(0, most[kind]) for kind in kinds} for _ in range(NUM_QUESTIONS - len(counts))]
    return [question(rng, checkpoint(family), each, lone=index == 0) for index, each in enumerate(counts)]


def question(rng: random.Random, folder: Path, counts: dict[str, int], *, lone: bool) -> Question:
    makers = {"video": video, "audio": long_sound if lone else sound, "image": image}
    parts = [makers[kind](rng, folder) for kind, count in counts.items() for _ in range(count)]
    rng.shuffle(parts)
    parts.insert(rng.randint(0, len(parts)), {"type": "text", "text": rng.choice(TEXTS)})
    return Question([{"role": "user", "content": parts}], max_tokens=rng.randint(4, 10))


def image(rng: random.Random, folder: Path) -> dict[str, Any]:
    return {"type": "image", "image": picture(rng, rng.randint(20, 120), rng.randint(20, 120))}


def long_sound(rng: random.Random, folder: Path) -> dict[str, Any]:
    return {"type": "audio", "audio": (samples := hum(rng, 40_000)), "file": float_wav(samples, RATE)}


def sound(rng: random.Random, folder: Path) -> dict[str, Any]:
    """In one of the forms that lose nothing."""
    samples = hum(rng, rng.randint(4_000, 50_000))
    form = rng.choice(["float", "wav", "flac"])
    file = float_wav(samples, RATE) if form == "float" else encoded(form, samples, RATE)
    return {"type": "audio", "audio": samples, "file": file} | ({} if form == "float" else {"format": form})


def hum(rng: random.Random, num_samples: int) -> Samples:
    """Of 16 bits a sample."""
    return np.round(noise(num_samples, rng.randint(0, 1 << 30)) * 32767).astype(np.int16).astype(np.float32) / 32768


def video(rng: random.Random, folder: Path) -> dict[str, Any]:
    data = moving(rng.randint(6, 20), 16 * rng.randint(2, 5), 16 * rng.randint(2, 5), rng.choice([3, 10, 25]))
    return {"type": "video", "video": as_the_encoder_takes_it(folder, data), "file": data}


def as_the_encoder_takes_it(folder: Path, data: bytes) -> Video:
    """Pixels as Triptych makes them, which tests of the model compare with those of the family's own processor, of all
    slices or frames together."""
    processor, header = processor_of(folder), read_video_header(data, num_frames=NUM_FRAMES)
    media = Media(b"", "video", data, header.frames)
    prepared = processor.prepare(media)
    num_units = len(processor.modalities["video"].lay_out(header, 1).units)
    units = [processor.inputs(media, prepared, index) for index in range(num_units)]
    metadata = VideoMetadata(header.num_frames, fps=header.fps, frames_indices=list(header.frames))
    if "video_grid_thw" in units[0]:
        grid = units[0]["video_grid_thw"] * torch.tensor([num_units, 1, 1])
        pixels = torch.cat([each["pixel_values_videos"] for each in units])
        return Video({"pixel_values_videos": pixels, "video_grid_thw": grid}, metadata)
    pixels = torch.cat([next(iter(each.values())) for each in units])
    return Video({"pixel_values_videos": pixels.reshape(1, num_units, *pixels.shape[-3:])}, metadata)
