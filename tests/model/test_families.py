"""What a family says about a picture from its size alone is what transformers' own processor makes of its pixels."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tests.checkpoints import FAMILIES, IMAGE_FAMILIES, make_checkpoint
from tests.model.builders import checkpoint
from tests.reference import reference_processor
from triptych.core import Span
from triptych.errors import ConfigError, RequestError
from triptych.model.families import ItemLayout, Modality, Parts, Rows, Run, family_for
from triptych.model.families.base import ImageModality
from triptych.model.headers import ImageHeader
from triptych.model.processor import Processor

torch.set_num_threads(1)

SIZES = st.tuples(st.integers(1, 300), st.integers(1, 300)).filter(lambda size: max(size) <= 200 * min(size))

# Processor arguments that move the numbers of tokens, beside the checkpoint's own.
ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in IMAGE_FAMILIES),
    ("qwen2_vl", {"size": {"shortest_edge": 256, "longest_edge": 256 * 100}}),
    ("qwen3_vl", {"size": {"shortest_edge": 16 * 256, "longest_edge": 20 * 256}}),
    ("internvl", {"max_patches": 12}),
    ("internvl", {"min_patches": 3, "max_patches": 5}),
    ("internvl", {"max_patches": 1}),
    ("aya_vision", {"min_patches": 2, "max_patches": 9}),
    ("idefics3", {"size": {"longest_edge": 190}}),
    ("smolvlm", {"size": {"longest_edge": 31}}),
    ("smolvlm", {"do_image_splitting": False}),
    ("mistral3", {"size": {"longest_edge": 50}}),
    ("pixtral", {"size": {"height": 70, "width": 30}}),
]


def picture_modality(folder: Path, arguments: dict[str, Any] | None = None) -> Modality:
    parts = Parts(folder, transformers.AutoTokenizer.from_pretrained(folder))
    if arguments:
        parts.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil", **arguments)
    modalities = family_for(transformers.AutoConfig.from_pretrained(folder)).modalities(parts)
    return next(modality for modality in modalities if modality.name == "image")


@cache
def modality_of(family: str) -> Modality:
    return picture_modality(checkpoint(family))


def written_out(item: ItemLayout) -> str:
    """The replacement word for word."""
    text, rest = "", item.compact
    for run in item.runs:
        before, token, rest = rest.partition(run.token)
        text += before + token * run.length
    return text + rest


def num_tokens(item: ItemLayout) -> int:
    return sum(run.length for run in item.runs)


def change_json(file: Path, change: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.mark.parametrize(("family", "arguments"), ARGUMENTS, ids=str)
def test_replacement_text_from_the_size_is_what_the_processor_writes(family: str, arguments: dict[str, Any]) -> None:
    modality = picture_modality(checkpoint(family), arguments)
    theirs = reference_processor(checkpoint(family))
    theirs_arguments = getattr(theirs, "images_kwargs", {}) | {"return_tensors": "pt"} | arguments

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(SIZES, st.integers(1, 2))
    def check(size: tuple[int, int], num_items: int) -> None:
        pictures = [[Image.new("RGB", size)] * num_items]  # of one prompt
        try:
            item = modality.lay_out(ImageHeader(*size), num_items)
        except RequestError:
            with pytest.raises((TypeError, ValueError, IndexError, ZeroDivisionError)):
                theirs._process_images(pictures, **theirs_arguments)
            return
        _, replacements = theirs._process_images(pictures, **theirs_arguments)
        assert written_out(item) == replacements[0]
        assert {row.unit for row in item.rows} == set(range(len(item.units)))

    check()


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_layouts_are_computed_once_per_size(family: str) -> None:
    modality = modality_of(family)
    assert modality.lay_out(ImageHeader(50, 60), 1) is modality.lay_out(ImageHeader(50, 60), 1)
    same = modality.lay_out(ImageHeader(50, 60), 1) is modality.lay_out(ImageHeader(50, 60), 2)
    assert same is not modality.depends_on_num_items


@pytest.mark.parametrize("family", [family for family in IMAGE_FAMILIES if family not in ("llava", "gemma3")])
def test_pictures_of_different_shapes_take_different_numbers_of_tokens(family: str) -> None:
    modality = modality_of(family)
    counts = {num_tokens(modality.lay_out(ImageHeader(*size), 1)) for size in [(64, 64), (200, 40), (40, 90)]}
    assert len(counts) > 1


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_picture_that_is_too_narrow_is_refused_by_every_family(family: str) -> None:
    modality = modality_of(family)
    modality.lay_out(ImageHeader(200, 4), 1)
    with pytest.raises(RequestError, match="200 times"):
        modality.lay_out(ImageHeader(1, 201), 1)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"])
@pytest.mark.parametrize("size", [(1, 200), (1, 201), (3, 600), (601, 3), (13, 2600), (13, 2601)])
def test_picture_is_refused_exactly_where_the_familys_own_processor_refuses_it(
    family: str, size: tuple[int, int]
) -> None:
    modality, refused = modality_of(family), max(size) > 200 * min(size)
    assert isinstance(modality, ImageModality)
    with pytest.raises(RequestError, match="200 times") if refused else nullcontext():
        modality.lay_out(ImageHeader(*size), 1)
    with pytest.raises(ValueError, match="aspect ratio") if refused else nullcontext():
        modality.processor(images=[Image.new("RGB", size)], return_tensors="pt")


@pytest.mark.parametrize("family", ["pixtral", "mistral3"])
def test_picture_of_which_the_largest_size_leaves_nothing_is_refused(family: str) -> None:
    with pytest.raises(RequestError, match="too narrow") as caught:
        modality_of(family).lay_out(ImageHeader(190, 1), 1)
    assert (caught.value.status, caught.value.code) == (400, "invalid_image")


def test_only_gemma3_asks_for_whole_images() -> None:
    configs = {family: transformers.AutoConfig.from_pretrained(checkpoint(family)) for family in FAMILIES}
    assert [family for family, config in configs.items() if family_for(config).image_groups] == ["gemma3"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.LlamaConfig(), "supported are audioflamingo3, aya_vision"),
        (transformers.MllamaConfig(), "cross-attention"),
        (transformers.MiniCPMV4_6Config(), "recurrent state"),
        (transformers.PaliGemmaConfig(), "both directions"),
        (transformers.LlavaConfig(vision_config={"model_type": "dinov2"}), "vision tower of type dinov2"),
        (transformers.LlavaNextConfig(vision_config={"model_type": "dinov2"}), "llava_next with a vision tower of"),
        (transformers.LlavaConfig(text_config={"model_type": "qwen3_next"}), "recurrent state"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_family_that_cannot_be_served_is_refused_with_the_reason(config: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        family_for(config)


def test_layers_that_keep_no_paged_cache_are_refused() -> None:
    config = transformers.AutoConfig.from_pretrained(checkpoint("qwen2_vl"))
    config.get_text_config().layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(ConfigError, match="chunked_attention"):
        family_for(config)


def test_llava_is_served_by_the_family_of_its_tower() -> None:
    classes = [
        type(family_for(transformers.AutoConfig.from_pretrained(checkpoint(each)))) for each in ("llava", "pixtral")
    ]
    assert [each.__name__ for each in classes] == ["Llava", "Pixtral"]


@pytest.mark.parametrize(
    ("family", "file", "change", "field"),
    [
        ("internvl", "processor_config.json", {"image_seq_length": 5}, "image_seq_length"),
        ("internvl", "preprocessor_config.json", {"size": {"height": 48, "width": 48}}, "tile height"),
        ("gemma3", "processor_config.json", {"image_seq_length": 16}, "image_seq_length"),
        ("llava", "processor_config.json", {"num_additional_image_tokens": 0}, "num_additional_image_tokens"),
        ("llava", "preprocessor_config.json", {"crop_size": {"height": 40, "width": 40}}, "picture height"),
        ("idefics3", "processor_config.json", {"image_seq_len": 3}, "image_seq_len"),
        ("qwen2_vl", "preprocessor_config.json", {"merge_size": 1}, "merge_size"),
        ("aya_vision", "processor_config.json", {"patch_size": 16}, "patch_size times downsample_factor"),
        ("aya_vision", "processor_config.json", {"img_size": 64}, "img_size"),
        ("aya_vision", "processor_config.json", {"img_patch_token": "<|END_OF_IMG|>"}, "img_patch_token"),
        ("aya_vision", "preprocessor_config.json", {"size": {"height": 48, "width": 48}}, "tile height"),
        ("aya_vision", "config.json", {"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy"),
        ("llava_next", "processor_config.json", {"num_additional_image_tokens": 0}, "num_additional_image_tokens"),
        ("llava_next", "preprocessor_config.json", {"crop_size": {"height": 48, "width": 48}}, "tile side"),
        ("llava_next", "preprocessor_config.json", {"image_grid_pinpoints": [[24, 48]]}, "image_grid_pinpoints"),
        ("llava_next", "config.json", {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ("llava_onevision", "processor_config.json", {"num_image_tokens": 16}, "num_image_tokens"),
        ("llava_onevision", "processor_config.json", {"vision_aspect_ratio": "anyres_max_9"}, "vision_aspect_ratio"),
        ("llava_onevision", "preprocessor_config.json", {"size": {"height": 24, "width": 48}}, "tile width"),
        ("pixtral", "processor_config.json", {"patch_size": 8}, "patch_size"),
        ("pixtral", "config.json", {"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy"),
        ("pixtral", "preprocessor_config.json", {"do_resize": False}, "must resize"),
        ("mistral3", "processor_config.json", {"spatial_merge_size": 1}, "spatial_merge_size"),
        ("mistral3", "processor_config.json", {"image_token": "[IMG_END]"}, "image_token"),
    ],
)
def test_processor_that_does_not_fit_its_model_is_refused(
    tmp_path: Path, family: str, file: str, change: dict[str, Any], field: str
) -> None:
    folder = make_checkpoint(family, tmp_path / family)
    change_json(folder / file, change)
    with pytest.raises(ConfigError, match=field):
        Processor.load(folder)


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("llava_next", {"image_grid_pinpoints": [[24, 48], [30, 48]]}, "multiples of 24"),
        ("llava_next", {"image_grid_pinpoints": []}, "multiples of 24"),
        ("llava_onevision", {"vision_aspect_ratio": "square"}, "anyres_max_N"),
    ],
)
def test_tiles_that_cannot_be_counted_are_refused_although_processor_and_model_agree(
    tmp_path: Path, family: str, change: dict[str, Any], reason: str
) -> None:
    folder = make_checkpoint(family, tmp_path / family)
    for file in ("config.json", "preprocessor_config.json", "processor_config.json"):
        change_json(folder / file, change)
    with pytest.raises(ConfigError, match=reason):
        Processor.load(folder)


# ---- items


@pytest.fixture
def item() -> Callable[..., ItemLayout]:
    return modality_of("llava").item


def test_item_refuses_runs_that_do_not_hold_its_rows(item: Callable[..., ItemLayout]) -> None:
    with pytest.raises(AssertionError, match="runs of 3 tokens for 4 rows"):
        item(["a", 3], [4])
    with pytest.raises(AssertionError, match="offset=2"):
        item(["a", 3], [4], [Rows(0, 2, 3)])


def test_rows_of_units_fill_the_runs_in_the_order_that_the_layout_says(item: Callable[..., ItemLayout]) -> None:
    processor = Processor.load(checkpoint("llava"))
    end = Run("</s>", 1)
    rows = [Rows(1, 0, 4), Rows(0, 1, 2), Rows(1, 0, 1), Rows(0, 0, 3)]
    layout = item(["x", 5, "y", 3, end, "z", 1], [3, 7], rows)
    processor.modalities["image"]._lay_out = lambda header, num_items: layout
    header = ("image", ImageHeader(1, 1))
    prompt = processor.expand("<image><image>", [header, header], add_special_tokens=False)
    first = [(4, 1, 0), (1, 0, 1), (1, 0, 2), (1, 1, 0), (1, 0, 0), (1, 0, 1), (1, 0, 2)]
    assert [(span.length, span.unit, span.offset) for span in prompt.spans] == [
        *first,
        *((length, unit + 2, offset) for length, unit, offset in first),
    ]
    covered = [at for span in prompt.spans for at in range(span.start, span.start + span.length)]
    stand_ins = {processor.tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "</s>")}
    assert covered == [at for at, token_id in enumerate(prompt.token_ids) if token_id in stand_ins]
    assert isinstance(prompt.spans[0], Span)
