"""Ovis2: grids of tiles, and the indicator tokens between them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.ovis2 import image_processing_pil_ovis2 as theirs
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

from tests.model.builders import checkpoint, make_picture, processor_of
from tests.reference import reference_inputs
from triptych.errors import ConfigError, RequestError
from triptych.model.families.base import MAX_ASPECT_RATIO, Run
from triptych.model.families.ovis2 import _IndicatedTiles
from triptych.model.headers import ImageHeader
from triptych.model.processor import Processor

torch.set_num_threads(1)

INDICATORS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
ROWS = 9  # of a tile of the tiny model


def changed(tmp_path: Path, file: str, **changes: Any) -> Path:
    """A copy of the checkpoint with other entries in one of its files."""
    folder = shutil.copytree(checkpoint("ovis2"), tmp_path / "ovis2")
    content = json.loads((folder / file).read_text())
    for name, value in changes.items():
        if isinstance(value, dict):
            content[name].update(value)
        else:
            content[name] = value
    (folder / file).write_text(json.dumps(content))
    return folder


def messages_with(picture: Image.Image | bytes | None) -> list[dict[str, Any]]:
    image = {"type": "image"} if picture is None else {"type": "image", "image": picture}
    return [{"role": "user", "content": [image, {"type": "text", "text": "What is this?"}]}]


@settings(max_examples=300, deadline=None)
@given(
    width=st.integers(1, 3_000),
    height=st.integers(1, 3_000),
    max_tiles=st.integers(1, 12),
    min_tiles=st.integers(1, 3),
    covering=st.booleans(),
)
def test_grids_are_those_of_the_familys_own_processor(
    width: int, height: int, max_tiles: int, min_tiles: int, covering: bool
) -> None:
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height) or min_tiles > max_tiles:
        return
    processor = Ovis2ImageProcessorPil(
        size={"height": 448, "width": 448},
        crop_to_patches=True,
        min_patches=min_tiles,
        max_patches=max_tiles,
        use_covering_area_grid=covering,
    )
    ours = _IndicatedTiles(processor, "<IMG_ATOM>", INDICATORS, side=448, rows_per_tile=ROWS)._grid(width, height)
    if covering:
        assert ours == theirs.get_min_tile_covering_grid((height, width), 448, max_tiles)
    else:
        assert ours == theirs.get_optimal_tiled_canvas((height, width), (448, 448), min_tiles, max_tiles)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300))
def test_prompts_have_the_tokens_that_the_familys_own_processor_gives(width: int, height: int) -> None:
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        return
    folder = checkpoint("ovis2")
    processor = processor_of(folder)
    prompt = processor.expand(processor.render(messages_with(None)), [("image", ImageHeader(width, height))])
    expected = reference_inputs(folder, messages_with(Image.new("RGB", (width, height))))
    assert prompt.token_ids == expected["input_ids"][0].tolist()


@pytest.mark.parametrize("changes", [{"crop_to_patches": False}, {"use_covering_area_grid": False}, {"max_patches": 1}])
def test_the_checkpoint_says_how_pictures_are_cut(changes: dict[str, object], tmp_path: Path) -> None:
    folder = changed(tmp_path, "preprocessor_config.json", **changes)
    processor = Processor.load(folder)
    for width, height in [(200, 60), (50, 50), (120, 130)]:
        prompt = processor.expand(processor.render(messages_with(None)), [("image", ImageHeader(width, height))])
        expected = reference_inputs(folder, messages_with(make_picture(width, height, seed=0)))
        assert prompt.token_ids == expected["input_ids"][0].tolist()


def test_every_tile_brings_the_rows_of_the_indicators_beside_it() -> None:
    """2 x 2 tiles and the whole picture: an indicator never waits for another unit than its neighbour."""
    layout = processor_of(checkpoint("ovis2")).modalities["image"].lay_out(ImageHeader(96, 96), 1)
    assert layout.units == (ROWS + 5,) * 5
    start, grid, column, row, end = range(ROWS, ROWS + 5)
    assert [(rows.unit, rows.offset) for rows in layout.rows] == [
        *[(0, start), (0, 0), (0, grid)],
        *[(1, 0), (1, column), (2, 0), (2, row)],
        *[(3, 0), (3, column), (4, 0), (4, end)],
    ]
    assert [run.token for run in layout.runs if run != Run("<IMG_ATOM>", ROWS)] == [
        *INDICATORS[:2],
        *["<IMG_COL>", "<IMG_ROW>", "<IMG_COL>", "<IMG_END>"],
    ]


@pytest.mark.parametrize("token", ["<IMG_ATOM>", "<image>", *INDICATORS])
def test_tokens_that_stand_for_pictures_are_refused_in_a_text(token: str) -> None:
    processor = processor_of(checkpoint("ovis2"))
    with pytest.raises(RequestError, match="stands for media"):
        processor.render([{"role": "user", "content": f"look: {token}"}])


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("config.json", {"vision_config": {"tokenize_function": "gumbel_argmax"}}, "random"),
        ("config.json", {"vision_config": {"hidden_stride": 4}}, "divide"),
        ("config.json", {"vision_config": {"num_visual_indicator_tokens": 4}}, "five"),
        ("config.json", {"visual_indicator_token_ids": [1, 2, 3]}, "five"),
        ("config.json", {"image_token_id": 100_000}, "no token"),
        ("preprocessor_config.json", {"size": {"height": 40, "width": 40}}, "tile height"),
        ("processor_config.json", {"image_seq_length": 10}, "image_seq_length"),
    ],
)
def test_a_checkpoint_that_does_not_fit_together_is_refused(
    file: str, changes: dict[str, object], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        Processor.load(changed(tmp_path, file, **changes))
