"""Videos whose frames are pictures to the encoder: laid out and encoded so that the model sees what it sees unsplit."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.model.builders import checkpoint
from tests.model.video_prompts import (
    Videos,
    answered,
    encoded,
    expanded,
    moving,
    processed,
    processor_of,
    unit_inputs,
)
from tests.reference import reference_model
from triptych.errors import ConfigError
from triptych.model.families.base import Parts
from triptych.model.families.internvl_video import InternVLVideo
from triptych.model.families.video import FrameArguments
from triptych.model.processor import Processor

torch.set_num_threads(1)

FAMILIES = ["internvl", "llava_onevision"]
PROMPTS: list[Videos] = [
    [(moving(12, 64, 48), 5)],
    [(moving(9, 40, 80), 3), (moving(12, 64, 48), 3)],
    [(moving(9, 40, 80), 1)],
]
DEFAULTS = FrameArguments(height=384, width=384, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))


class WholeVideos:
    """In the place of a video processor: pixel values that Triptych made, [videos, frames, 3, height, width]."""

    def __init__(self, family: str, videos: Videos) -> None:
        _, units = expanded(family, videos)
        frames = [next(iter(each.values())) for each in unit_inputs(family, units)]
        self.pixels = torch.cat(frames).reshape(len(videos), -1, *frames[0].shape[-3:])

    def __call__(self, videos: object, **arguments: object) -> dict[str, Any]:
        return {"pixel_values_videos": self.pixels}


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_has_the_tokens_of_the_families_own_processor(family: str) -> None:
    for videos in PROMPTS:
        prompt, _ = expanded(family, videos)
        theirs = processed(family, len(videos), WholeVideos(family, videos))
        assert prompt.token_ids == theirs["input_ids"][0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answer_is_that_of_the_unsplit_model(family: str) -> None:
    for videos in PROMPTS:
        inputs = processed(family, len(videos), WholeVideos(family, videos))
        expected = reference_model(checkpoint(family)).generate(**inputs, max_new_tokens=8, do_sample=False)
        assert answered(family, videos, 8) == expected[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_frames_encoded_in_any_batch_have_the_rows_that_they_have_alone(family: str) -> None:
    _, units = expanded(family, PROMPTS[0])
    inputs = unit_inputs(family, units)
    alone = encoded(family, units, inputs, [[index] for index in range(5)])
    together = encoded(family, units, inputs, [[3, 0, 4], [1, 2]])
    torch.testing.assert_close(torch.cat(alone), torch.cat(together), rtol=1e-5, atol=1e-5)


def test_only_the_last_newline_row_of_a_video_stands_in_the_prompt() -> None:
    prompt, units = expanded("llava_onevision", PROMPTS[0])
    assert [unit.num_tokens for unit, _ in units] == [5] * 5  # 3 x 3 features pooled to 2 x 2, and a newline
    assert [(span.unit, span.offset, span.length) for span in prompt.spans] == [
        *((index, 0, 4) for index in range(4)),
        (4, 0, 5),
    ]


@pytest.mark.parametrize("model", ["internvl", "llava_onevision"])
def test_pixel_values_are_those_of_the_families_own_video_processor(tmp_path: Path, model: str) -> None:
    pytest.importorskip("torchvision")
    module = importlib.import_module(f"transformers.models.{model}.video_processing_{model}")
    name = {"internvl": "InternVLVideoProcessor", "llava_onevision": "LlavaOnevisionVideoProcessor"}[model]
    frames = np.random.default_rng(0).integers(0, 256, (3, 50, 70, 3), dtype=np.uint8)
    for arguments in ({"size": {"height": 32, "width": 32}}, {"size": {"height": 96, "width": 80}, "resample": 2}):
        (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(arguments))
        ours: Any = FrameArguments.read(parts(tmp_path), _with_means_of(module, name))
        values = ours.normalised(torch.stack([ours.resized(each, ours.height, ours.width) for each in frames]))
        theirs = getattr(module, name)(**arguments)(videos=[frames], return_tensors="pt", do_sample_frames=False)
        torch.testing.assert_close(values, theirs["pixel_values_videos"][0], rtol=0, atol=0)


def _with_means_of(module: Any, name: str) -> FrameArguments:
    theirs = getattr(module, name)
    return FrameArguments(height=384, width=384, image_mean=tuple(theirs.image_mean), image_std=tuple(theirs.image_std))


def parts(folder: Path) -> Parts:
    return Parts(folder, AutoTokenizer.from_pretrained(checkpoint("internvl")))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"size": {"shortest_edge": 32}}, "a height and a width"),
        ({"size": {"height": 32, "width": 32}, "do_center_crop": True}, "not cropped"),
        ({"do_rescale": False}, "do_rescale"),
    ],
)
def test_video_processor_that_cannot_be_followed_is_refused(
    tmp_path: Path, arguments: dict[str, Any], reason: str
) -> None:
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(arguments))
    with pytest.raises(ConfigError, match=reason):
        FrameArguments.read(parts(tmp_path), DEFAULTS)


def test_frames_of_another_size_than_the_models_pictures_are_refused(tmp_path: Path) -> None:
    texts = {"placeholder": "<video>", "start": "<img>", "end": "</img>"}
    with pytest.raises(ConfigError, match="height of videos"):
        InternVLVideo.read(parts(tmp_path), "<i>", side=448, tokens_per_frame=4, **texts)


def test_checkpoint_whose_tokenizer_names_no_token_for_videos_is_served_without_them(tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint("internvl"), tmp_path / "internvl")
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text())
    del content["video_token"]
    file.write_text(json.dumps(content))
    assert set(processor_of("internvl").modalities) == {"image", "video"}
    assert set(Processor.load(folder).modalities) == {"image"}
