"""What a family says about a picture from its size alone is what transformers' own processor makes of its pixels."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tests.checkpoints import FAMILIES, make_checkpoint
from tests.reference import reference_model, reference_processor
from triptych.core import Span
from triptych.errors import ConfigError, RequestError
from triptych.model.families import ImageLayout, ItemLayout, UnitLayout, family_for
from triptych.model.processor import Processor

torch.set_num_threads(1)

SIZES = st.tuples(st.integers(1, 300), st.integers(1, 300)).filter(lambda size: max(size) <= 200 * min(size))

# Processor arguments that move the numbers of tokens, beside the checkpoint's own.
ARGUMENTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("qwen2_vl", {"size": {"shortest_edge": 256, "longest_edge": 256 * 100}}),
    ("qwen3_vl", {"size": {"shortest_edge": 16 * 256, "longest_edge": 20 * 256}}),
    ("internvl", {"max_patches": 12}),
    ("internvl", {"min_patches": 3, "max_patches": 5}),
    ("internvl", {"max_patches": 1}),
    ("idefics3", {"size": {"longest_edge": 190}}),
    ("smolvlm", {"size": {"longest_edge": 31}}),
    ("smolvlm", {"do_image_splitting": False}),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: make_checkpoint(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def layout_of(folder: Path, arguments: dict[str, Any]) -> ImageLayout:
    return family_for(transformers.AutoConfig.from_pretrained(folder)).image_layout(
        AutoImageProcessor.from_pretrained(folder, backend="pil", **arguments),
        transformers.AutoTokenizer.from_pretrained(folder),
        json.loads((folder / "processor_config.json").read_text()),
    )


def written_out(item: ItemLayout, image_token: str) -> str:
    """The replacement word for word."""
    first, *rest = item.compact.split(image_token)
    return first + "".join(image_token * run + piece for run, piece in zip(item.runs, rest, strict=True))


@pytest.mark.parametrize(("family", "arguments"), ARGUMENTS, ids=str)
def test_replacement_text_from_the_size_is_what_the_processor_writes(
    checkpoints: dict[str, Path], family: str, arguments: dict[str, Any]
) -> None:
    layout = layout_of(checkpoints[family], arguments)
    theirs = reference_processor(checkpoints[family])
    theirs_arguments = getattr(theirs, "images_kwargs", {}) | arguments

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(SIZES)
    def check(size: tuple[int, int]) -> None:
        _, replacements = theirs._process_images([Image.new("RGB", size)], **theirs_arguments)
        assert written_out(layout.lay_out(*size), layout.image_token) == replacements[0]

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_model_has_as_many_features_as_the_units_have_rows(checkpoints: dict[str, Path], family: str) -> None:
    model, layout = reference_model(checkpoints[family]), layout_of(checkpoints[family], {})
    processor = Processor.load(checkpoints[family])
    for size in [(40, 40), (200, 30), (61, 190)]:
        tensors = processor._image_processor(
            images=[Image.new("RGB", size, "red")], return_tensors="pt", **processor.family.image_arguments
        )
        with torch.inference_mode():
            features = model.base_model.get_image_features(
                **{name: tensors[name] for name in processor.family.tensors}, return_dict=True
            ).pooler_output
        rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in features])
        units = layout.lay_out(*size).units
        assert len(rows) == sum(unit.num_tokens for unit in units)
        if "image_grid_thw" in processor.family.tensors:
            assert [list(unit.grid or ()) for unit in units] == tensors["image_grid_thw"].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_are_computed_once_per_size(checkpoints: dict[str, Path], family: str) -> None:
    layout = layout_of(checkpoints[family], {})
    assert layout.lay_out(50, 60) is layout.lay_out(50, 60)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "smolvlm"])
def test_pictures_of_different_shapes_take_different_numbers_of_tokens(
    checkpoints: dict[str, Path], family: str
) -> None:
    layout = layout_of(checkpoints[family], {})
    counts = {sum(layout.lay_out(*size).runs) for size in [(64, 64), (200, 40), (40, 90)]}
    assert len(counts) > 1


def test_picture_that_is_too_narrow_is_refused_by_every_family(checkpoints: dict[str, Path]) -> None:
    for folder in checkpoints.values():
        layout = layout_of(folder, {})
        layout.lay_out(200, 1)
        with pytest.raises(RequestError, match="200 times"):
            layout.lay_out(1, 201)


def test_only_gemma3_asks_for_whole_images(checkpoints: dict[str, Path]) -> None:
    configs = {family: transformers.AutoConfig.from_pretrained(folder) for family, folder in checkpoints.items()}
    assert [family for family, config in configs.items() if family_for(config).image_groups] == ["gemma3"]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.LlamaConfig(), "supported are gemma3"),
        (transformers.MllamaConfig(), "cross-attention"),
        (transformers.Qwen3_5Config(), "recurrent state"),
        (transformers.PaliGemmaConfig(), "both directions"),
        (transformers.LlavaConfig(vision_config={"model_type": "pixtral"}), "vision tower of type pixtral"),
        (transformers.LlavaConfig(text_config={"model_type": "qwen3_next"}), "recurrent state"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_family_that_cannot_be_served_is_refused_with_the_reason(config: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        family_for(config)


def test_layers_that_keep_no_paged_cache_are_refused(checkpoints: dict[str, Path]) -> None:
    config = transformers.AutoConfig.from_pretrained(checkpoints["qwen2_vl"])
    config.get_text_config().layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(ConfigError, match="chunked_attention"):
        family_for(config)


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
    ],
)
def test_processor_that_does_not_fit_its_model_is_refused(
    tmp_path: Path, family: str, file: str, change: dict[str, Any], field: str
) -> None:
    folder = make_checkpoint(family, tmp_path / family)
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | change))
    with pytest.raises(ConfigError, match=field):
        Processor.load(folder)


def test_item_layout_refuses_runs_that_do_not_hold_the_rows_of_its_units() -> None:
    with pytest.raises(AssertionError, match="runs of 3 tokens for units of 4 rows"):
        ItemLayout.of("<image>", ["a", 3], (UnitLayout(4),))


def test_units_may_share_a_run_and_runs_may_share_a_unit(checkpoints: dict[str, Path]) -> None:
    processor = Processor.load(checkpoints["llava"])
    item = ItemLayout.of("<image>", ["x", 4, "y", 4, "z", 2], (UnitLayout(3), UnitLayout(7)))
    processor._images._lay_out_cached = lambda width, height: item  # type: ignore[assignment]
    prompt = processor.expand("<image><image>", [(1, 1), (1, 1)], add_special_tokens=False)
    assert [(span.length, span.unit, span.offset) for span in prompt.spans] == [
        *[(3, 0, 0), (1, 1, 0), (4, 1, 1), (2, 1, 5)],
        *[(3, 2, 0), (1, 3, 0), (4, 3, 1), (2, 3, 5)],
    ]
    image_token_id = processor.family.image_token_id
    covered = [at for span in prompt.spans for at in range(span.start, span.start + span.length)]
    assert covered == [at for at, token_id in enumerate(prompt.token_ids) if token_id == image_token_id]
    assert isinstance(prompt.spans[0], Span)
