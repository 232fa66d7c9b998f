"""Families that take pictures of any size in patches: Qwen, GLM, Pixtral."""

from dataclasses import replace

from triptych.planning.model import towers
from triptych.planning.model.configs import Fields
from triptych.planning.model.families.reading import (
    NAMELESS,
    images_of,
    pixel_bounds,
    read_language,
    square_of,
    two_layers,
)
from triptych.planning.model.language import Language
from triptych.planning.model.pictures import LinesOfPatches, MergedPatches
from triptych.planning.model.shape import ModelShape
from triptych.planning.model.tower import Tower, linear
from triptych.planning.model.towers import read_tower
from triptych.planning.model.videos import TemporalSlices

# The text model where the config says nothing of it.
MISTRAL3 = {"hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "head_dim": 128}
MISTRAL3 |= {"vocab_size": 131072}


def pixtral(config: Fields, processor: Fields) -> ModelShape:
    absent = towers.CLIP_L | {"image_size": 1540}
    tower, vision = read_tower(config, "vision_config", "pixtral", absent)
    mistral3 = config.text("model_type") == "mistral3"
    usual = "mistral" if mistral3 else "llama"
    language = read_language(config, usual, tied=mistral3, absent=MISTRAL3 if mistral3 else None)
    merge = config.integer("spatial_merge_size", 2 if mistral3 else 1)
    side = vision.square("patch_size") * merge
    arguments = images_of(processor)
    size = arguments.part("size")
    longest = size.integer("longest_edge", 1024) if not size.is_given("height") else 0
    most = (longest or size.integer("width"), longest or size.integer("height"))
    projector = _mistral3_projector(config, tower, language, merge) if mistral3 else two_layers(config, tower, language)
    return ModelShape(
        name=NAMELESS,
        language=language,
        vision=replace(tower, projector=projector),
        pictures=LinesOfPatches(side, merge**2, *most),
        marks_of_item=vision.square("image_size") // side,  # a token behind each line, of a square of the largest size
    )


def _mistral3_projector(config: Fields, tower: Tower, language: Language, merge: int) -> int:
    bias = config.flag("multimodal_projector_bias")
    merging = tower.hidden + tower.hidden * merge**2 * tower.hidden
    return merging + linear(tower.hidden, language.hidden, bias) + linear(language.hidden, language.hidden, bias)


def qwen_vl(config: Fields, processor: Fields) -> ModelShape:
    kind = config.text("model_type")
    old = kind in ("qwen2_vl", "qwen2_5_vl")
    tower, vision = read_tower(config, "vision_config", towers.ALIASES[kind])
    language = read_language(config, f"{kind}_text")
    side, merged = square_of(vision)
    bounds = pixel_bounds(images_of(processor), 56 * 56, 28 * 28 * 1280)
    deepstack = 0 if old or kind.startswith("qwen3_5") else len(vision.items("deepstack_visual_indexes"))
    return ModelShape(
        name=NAMELESS,
        language=language,
        vision=tower,
        pictures=MergedPatches(side, merged, *bounds),
        videos=_qwen_videos(processor, side, merged, vision.integer("temporal_patch_size"), old=old),
        deepstack=deepstack,
    )


def _qwen_videos(processor: Fields, side: int, merged: int, length: int, *, old: bool) -> TemporalSlices:
    given = processor.part("video_processor").given or processor.given
    usual = 28 if old else 32
    if not old:  # which know bounds within `size` only
        given = {key: value for key, value in given.items() if key not in ("min_pixels", "max_pixels")}
    arguments = Fields(given, name=processor.name)
    least, most = pixel_bounds(arguments, 128 * usual * usual, 768 * usual * usual)
    capped = arguments.integer("max_video_tokens", 128000 if old else 768)
    return TemporalSlices(
        side,
        merged,
        length,
        least,
        most,
        by_volume=not old,
        capped_tokens=capped if arguments.flag("cap_pixels_per_frame") else 0,
    )


def glm4v(config: Fields, processor: Fields) -> ModelShape:
    kind = config.text("model_type")
    tower, vision = read_tower(config, "vision_config", "glm4v_vision")
    side, merged = square_of(vision)
    length = vision.integer("temporal_patch_size")
    bounds = pixel_bounds(images_of(processor), 112 * 112, 28 * 28 * 15000)
    given = processor.part("video_processor").given or processor.given
    least, most = pixel_bounds(Fields({"size": given.get("size")}), 112 * 112, 28 * 28 * 2 * 30000)
    return ModelShape(
        name=NAMELESS,
        language=read_language(config, f"{kind}_text"),
        vision=tower,
        pictures=MergedPatches(side, merged, *bounds, slice_length=length),
        videos=TemporalSlices(side, merged, length, least, most, by_volume=True),
    )
