"""Videos in a prompt: laid out, cut into slices and encoded so that the model sees what it sees unsplit.

transformers' own video processors need torchvision. Where it is installed they are compared with; what they gave once
is written down here. Everything around them (the text of a video, types, positions, `generate`) is the families' own.
"""

import importlib
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer
from transformers.video_utils import VideoMetadata

from tests.model.builders import Blocks, checkpoint
from tests.model.clips import clip
from tests.model.video_prompts import (
    Videos,
    answered,
    encoded,
    encoder_of,
    expanded,
    language_of,
    moving,
    processed,
    processor_of,
    sequence_of,
    unit_inputs,
)
from tests.reference import reference_model
from triptych.core import EncodeWork, Media
from triptych.errors import ConfigError, RequestError
from triptych.model.caches import EmbeddingRegion
from triptych.model.encoder import EncodeRunner
from triptych.model.families.base import Modality, Parts, flatten
from triptych.model.families.glm4v import Glm4vVideo
from triptych.model.families.qwen_video import Qwen2Video, Qwen3Video
from triptych.model.families.video import Slices
from triptych.model.headers import VideoHeader
from triptych.model.loading import load_config
from triptych.model.positions import Positions
from triptych.model.probe import embedding_layout
from triptych.model.videos import read_video_header

torch.set_num_threads(1)

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "glm4v"]

# the videos of a prompt, each with the frames that are looked at
PROMPTS: list[Videos] = [
    [(moving(12, 64, 48), 32)],
    [(moving(30, 96, 64, fps=25), 5), (moving(9, 40, 80), 3)],
    [(moving(7, 64, 64, fps=3), 6)],
]


# ---- pixels


def pattern(num_frames: int, height: int, width: int) -> NDArray[np.uint8]:
    t, y, x, c = np.meshgrid(*(np.arange(size) for size in (num_frames, height, width, 3)), indexing="ij")
    return ((t * 41 + y * y * 3 + x * 5 + c * 97) % 256).astype(np.uint8)


def modality_of(family: str, folder: Path, patch_size: int) -> Slices:
    """With the arguments that lie in the folder."""
    parts = Parts(folder, AutoTokenizer.from_pretrained(checkpoint(family)))
    vision = SimpleNamespace(patch_size=patch_size, spatial_merge_size=2, temporal_patch_size=2)
    if family == "glm4v":
        return Glm4vVideo.read(parts, vision, "<i>", placeholder="<v>", markup="[<v>]", start="<s>", end="<e>")
    video_class = Qwen2Video if family == "qwen2_vl" else Qwen3Video
    return video_class.read(parts, vision, "<v>", start="<s>", end="<e>")


def made_of(modality: Slices, frames: NDArray[np.uint8]) -> tuple[Tensor, tuple[int, int, int]]:
    """Pixel values of all slices, and the grid that the layout announced for them."""
    num_frames, height, width = frames.shape[:3]
    layout = modality.lay_out(VideoHeader(width, height, tuple(range(num_frames)), num_frames, 10.0), 1)
    prepared = modality.resized(frames, num_frames)
    inputs = [modality.inputs(prepared, index) for index in range(len(layout.units))]
    slices, rows, columns = layout.positions["video_grid_thw"]
    assert {tuple(each["video_grid_thw"][0].tolist()) for each in inputs} == {(1, rows, columns)}
    assert [len(each["pixel_values_videos"]) // 4 for each in inputs] == list(layout.units)
    return torch.cat([each["pixel_values_videos"] for each in inputs]), (slices, rows, columns)


SMALL: dict[str, Any] = {"patch_size": 8, "size": {"shortest_edge": 2048, "longest_edge": 9000}}
TIGHT: dict[str, Any] = {"patch_size": 8, "size": {"shortest_edge": 256, "longest_edge": 65536}}

# What transformers 5.23 with torchvision 0.28 makes of `pattern`: family, arguments, frames, their height and width;
# then the grid, mean and standard deviation of the pixel values, and five of them.
EXPECTED: list[tuple[str, dict[str, Any], tuple[int, int, int], tuple[int, int, int], list[float]]] = [
    (
        "qwen2_vl",
        {"patch_size": 8, "size": {"shortest_edge": 1024, "longest_edge": 2560}},
        (5, 40, 70),
        (3, 4, 8),
        [0.190052, 0.850168, -1.22292, -1.01855, 0.33398, 0.69417, -0.05821],
    ),
    (
        "qwen2_vl",
        {"min_pixels": 3136, "max_pixels": 9408},
        (3, 50, 90),
        (2, 4, 6),
        [0.185945, 0.973886, -1.23752, 1.30949, 1.44859, -0.99674, -0.26633],
    ),
    (
        "qwen2_vl",
        {},
        (2, 30, 40),
        (1, 20, 28),
        [0.187177, 0.945571, -1.77766, -0.42001, 0.3829, 0.76246, 0.14933],
    ),
    (
        "qwen2_vl",
        TIGHT | {"cap_pixels_per_frame": True, "max_video_tokens": 20},
        (6, 64, 80),
        (3, 4, 4),
        [0.188714, 0.672807, -0.44921, 1.57963, -0.08425, 1.64819, -0.38639],
    ),
    (
        "qwen3_vl",
        SMALL,
        (5, 40, 70),
        (3, 4, 8),
        [0.001242, 0.452661, -0.69412, -0.58431, 0.0902, 0.27843, -0.21569],
    ),
    (
        "qwen3_vl",
        {},
        (4, 20, 200),
        (2, 4, 36),
        [7.2e-05, 0.525113, -0.91373, 0.5451, -0.39608, 0.5451, 0.41176],
    ),
    (
        "qwen3_vl",
        TIGHT | {"cap_pixels_per_frame": True, "max_video_tokens": 6},
        (6, 64, 80),
        (3, 4, 4),
        [0.000509, 0.356338, -0.27843, 0.74118, -0.08235, 0.72549, -0.28627],
    ),
    (
        "glm4v",
        SMALL,
        (5, 40, 70),
        (3, 4, 8),
        [0.190052, 0.850168, -1.22292, -1.01855, 0.33398, 0.69417, -0.05821],
    ),
    (
        "glm4v",
        {"resample": 2, "image_mean": [0.5, 0.4, 0.3]},
        (2, 30, 40),
        (1, 6, 8),
        [0.368113, 0.887473, -1.70072, -0.82543, -0.21168, 0.98829, -0.82543],
    ),
]


@pytest.mark.parametrize(("family", "arguments", "shape", "grid", "numbers"), EXPECTED)
def test_pixel_values_are_those_that_the_families_own_video_processor_gave(
    tmp_path: Path,
    family: str,
    arguments: dict[str, Any],
    shape: tuple[int, int, int],
    grid: tuple[int, int, int],
    numbers: list[float],
) -> None:
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(arguments))
    modality = modality_of(family, tmp_path, arguments.get("patch_size", 16 if family == "qwen3_vl" else 14))
    values, our_grid = made_of(modality, pattern(*shape))
    flat = values.flatten().tolist()
    picked = [flat[part * len(flat) // 5 + 7] for part in range(5)]
    assert our_grid == grid
    assert [values.double().mean().item(), values.double().std().item(), *picked] == pytest.approx(numbers, abs=1e-5)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_pixel_values_are_those_of_the_families_own_video_processor(tmp_path: Path, family: str) -> None:
    pytest.importorskip("torchvision")
    module = importlib.import_module(f"transformers.models.{family}.video_processing_{family}")
    names = {"qwen2_vl": "Qwen2VLVideoProcessor", "qwen3_vl": "Qwen3VLVideoProcessor", "glm4v": "Glm4vVideoProcessor"}
    rng = np.random.default_rng(0)
    for patch_size in (8, 14, 16) * 8:
        least = int(rng.integers(1, 8)) * (patch_size * 2) ** 2
        size = {"shortest_edge": least, "longest_edge": least * int(rng.integers(2, 30))}
        arguments: dict[str, Any] = {"patch_size": patch_size, "size": size, "resample": int(rng.integers(2, 4))}
        if family != "glm4v" and rng.integers(2):
            arguments |= {"cap_pixels_per_frame": True, "max_video_tokens": int(rng.integers(2, 40))}
        frames = pattern(*(int(side) for side in rng.integers((2, 4, 4), (9, 150, 150))))
        theirs = getattr(module, names[family])(**arguments)(
            videos=[frames], return_tensors="pt", do_sample_frames=False, input_data_format="channels_last"
        )
        (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(arguments))
        values, grid = made_of(modality_of(family, tmp_path, patch_size), frames)
        assert list(grid) == theirs["video_grid_thw"][0].tolist()
        torch.testing.assert_close(values, theirs["pixel_values_videos"], rtol=0, atol=0)


def test_last_frame_is_repeated_where_frames_do_not_make_whole_slices() -> None:
    modality: Any = processor_of("qwen2_vl").modalities["video"]
    frames = pattern(3, 48, 64)
    assert torch.equal(modality.resized(frames, 3), modality.resized(np.concatenate([frames, frames[2:]]), 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_video_of_one_frame_is_one_slice(family: str) -> None:
    prompt, units = expanded(family, [(clip(num_frames=1), 32)])
    rows = encoded(family, units, unit_inputs(family, units), [[0]])
    assert [len(each) for each in rows] == [unit.num_tokens for unit, _ in units] == [prompt.spans[0].length]


# ---- arguments of the video processor


def test_nested_arguments_go_before_those_of_files_and_files_before_defaults(tmp_path: Path) -> None:
    assert modality_of("qwen3_vl", tmp_path, 16).settings.max_pixels == 32 * 32 * 768
    files = ["preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"]
    for number, name in enumerate(files, 1):
        size = {"size": {"shortest_edge": 4096, "longest_edge": 4096 * number}}
        (tmp_path / name).write_text(json.dumps({"video_processor": size} if number == 3 else size))
        assert modality_of("qwen3_vl", tmp_path, 16).settings.max_pixels == 4096 * number


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"do_resize": False}, "do_resize"),
        ({"do_normalize": False}, "do_normalize"),
        ({"resample": 1}, "resample: 1"),
        ({"patch_size": 8}, "patch_size of videos"),
        ({"temporal_patch_size": 4}, "temporal_patch_size of videos"),
    ],
)
def test_video_processor_that_cannot_be_followed_is_refused(
    tmp_path: Path, arguments: dict[str, Any], reason: str
) -> None:
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(arguments))
    with pytest.raises(ConfigError, match=reason):
        modality_of("qwen3_vl", tmp_path, 16)


# ---- layouts


def written(modality: Modality, header: VideoHeader) -> str:
    """The replacement word for word, with runs as their lengths."""
    layout = modality.lay_out(header, 1)
    texts = layout.compact.split(modality.token)
    return texts[0] + "".join(f"({run.length}){text}" for run, text in zip(layout.runs, texts[1:], strict=True))


def test_text_of_a_video_is_that_of_its_family() -> None:
    header = VideoHeader(64, 64, (0, 7, 14, 21, 29), 30, 10.0)
    modalities = {family: processor_of(family).modalities["video"] for family in FAMILIES}
    tokens = {family: modality.lay_out(header, 1).units[0] for family, modality in modalities.items()}
    qwen3 = tokens["qwen3_vl"]
    assert written(modalities["qwen2_vl"], header) == f"({3 * tokens['qwen2_vl']})"
    assert written(modalities["qwen3_vl"], header) == (
        f"<0.3 seconds><|vision_start|>({qwen3})<|vision_end|><1.8 seconds><|vision_start|>({qwen3})<|vision_end|>"
        f"<2.9 seconds><|vision_start|>({qwen3})<|vision_end|>"
    )
    assert written(modalities["glm4v"], header) == "".join(
        f"<|begin_of_image|>({tokens['glm4v']})<|end_of_image|>{second}" for second in (0, 1, 2)
    )
    assert modalities["qwen2_5_vl"].lay_out(header, 1).positions["second_per_grid_ts"] == 2 / (5 / 30 * 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_video_that_is_too_narrow_is_refused(family: str) -> None:
    modality = processor_of(family).modalities["video"]
    modality.lay_out(VideoHeader(400, 2, (0, 1), 2, 10.0), 1)
    with pytest.raises(RequestError, match="200 times"):
        modality.lay_out(VideoHeader(2, 401, (0, 1), 2, 10.0), 1)


def test_other_frames_or_another_rate_make_other_hashes() -> None:
    data = moving(12, 64, 48)
    _, some = expanded("qwen3_vl", [(data, 4)])
    _, others = expanded("qwen3_vl", [(data, 6)])
    _, again = expanded("qwen3_vl", [(data, 4)])
    assert {unit.hash for unit, _ in some}.isdisjoint(unit.hash for unit, _ in others)
    assert [unit.hash for unit, _ in some] == [unit.hash for unit, _ in again]
    assert len({unit.hash for unit, _ in some}) == 2


def test_broken_video_ends_its_units_and_no_others() -> None:
    _, units = expanded("qwen2_vl", [PROMPTS[0][0]])
    unit, media = units[0]
    short = Media(b"short", "video", media.data[:-9], media.frames)
    late = Media(b"late", "video", media.data, (0, 40))
    region = EmbeddingRegion.allocate(embedding_layout(load_config(checkpoint("qwen2_vl")), torch.float32), 64, "cpu")
    runner = EncodeRunner(encoder_of("qwen2_vl"), processor_of("qwen2_vl"), region)
    free = Blocks(64)
    works = [EncodeWork(unit, each, free.take(unit.num_tokens)) for each in (short, media, late)]
    broken, fine, missing = runner.run(works)
    assert fine is None
    assert broken is not None and "truncated" in str(broken) and broken.status == 400
    assert missing is not None and "frame 40 is missing" in str(missing)


# ---- the unsplit model


class WholeVideos:
    """In the place of a video processor: pixel values that Triptych made, of all slices of each video together."""

    def __init__(self, family: str, videos: Videos) -> None:
        _, units = expanded(family, videos)
        inputs = unit_inputs(family, units)
        self.pixels = torch.cat([each["pixel_values_videos"] for each in inputs])
        headers = [read_video_header(data, num_frames=num_frames) for data, num_frames in videos]
        grids: list[list[int]] = []
        for (unit, _), each in zip(units, inputs, strict=True):
            if unit.index == 0:
                grids.append([0, *each["video_grid_thw"][0, 1:].tolist()])
            grids[-1][0] += 1
        self.grids = torch.tensor(grids)
        self.metadata = [
            VideoMetadata(each.num_frames, fps=each.fps, frames_indices=list(each.frames)) for each in headers
        ]
        self.merge_size = self.temporal_patch_size = 2

    def __call__(self, videos: object, **arguments: object) -> dict[str, Any]:
        return {
            "pixel_values_videos": self.pixels,
            "video_grid_thw": self.grids,
            "video_metadata": self.metadata,
        }


def unsplit_inputs(family: str, videos: Videos) -> Any:
    return processed(family, len(videos), WholeVideos(family, videos))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_has_the_tokens_types_and_positions_of_the_families_own_processor(family: str) -> None:
    for videos in PROMPTS:
        prompt, units = expanded(family, videos)
        theirs = unsplit_inputs(family, videos)
        assert prompt.token_ids == theirs["input_ids"][0].tolist()
        base: Any = reference_model(checkpoint(family)).base_model
        known = {name: value for name, value in theirs.items() if name not in ("input_ids", "pixel_values_videos")}
        positions, delta = base.get_rope_index(theirs["input_ids"], **known)
        ours, our_delta = Positions(language_of(family)).of_prompt(sequence_of(prompt, units))
        assert torch.equal(torch.from_numpy(np.array(ours)), positions[:, 0])
        assert our_delta == int(delta)


# ---- slices


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_encoded_alone_or_in_any_batch_are_the_features_of_the_whole_videos(family: str) -> None:
    for seed, videos in enumerate(PROMPTS):
        prompt, units = expanded(family, videos)
        whole = unsplit_inputs(family, videos)
        with torch.inference_mode():
            base: Any = reference_model(checkpoint(family)).base_model
            grids = {"pixel_values_videos": whole["pixel_values_videos"], "video_grid_thw": whole["video_grid_thw"]}
            output = base.get_video_features(**grids, return_dict=True)
        deepstack = [flatten(layer) for layer in getattr(output, "deepstack_features", None) or ()]
        expected = torch.cat([flatten(output.pooler_output), *deepstack], -1)
        inputs = unit_inputs(family, units)
        for batches in ([[index] for index in range(len(units))], shuffled(len(units), seed)):
            rows = encoded(family, units, inputs, batches)
            assert [len(each) for each in rows] == [unit.num_tokens for unit, _ in units]
            torch.testing.assert_close(torch.cat(rows), expected, rtol=1e-5, atol=1e-5)
        assert len(expected) == sum(span.length for span in prompt.spans)


def shuffled(num_units: int, seed: int) -> list[list[int]]:
    order = random.Random(seed).sample(range(num_units), num_units)
    return [order[start : start + 3] for start in range(0, num_units, 3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answer_is_that_of_the_unsplit_model(family: str) -> None:
    for videos in PROMPTS:
        inputs = unsplit_inputs(family, videos)
        expected = reference_model(checkpoint(family)).generate(**inputs, max_new_tokens=8, do_sample=False)
        assert answered(family, videos, 8) == expected[0, inputs["input_ids"].shape[1] :].tolist()
