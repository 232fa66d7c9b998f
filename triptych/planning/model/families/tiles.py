"""Families whose pictures become grids of tiles: InternVL, Aya Vision, Ovis2, Idefics3, and MiniCPM-V's slices."""

from dataclasses import replace

from triptych.errors import ConfigError
from triptych.planning.model import towers
from triptych.planning.model.configs import MOST_TILES, Fields
from triptych.planning.model.families.reading import NAMELESS, images_of, patches_of, read_language
from triptych.planning.model.grids import ClosestGrid, CoveringGrid, TaggedTiles
from triptych.planning.model.language import Language
from triptych.planning.model.pictures import Slices
from triptych.planning.model.shape import ModelShape
from triptych.planning.model.tower import Tower, linear
from triptych.planning.model.towers import read_tower
from triptych.planning.model.units import Unit
from triptych.planning.model.videos import FramesAsPictures


def internvl(config: Fields, processor: Fields) -> ModelShape:
    tower, vision = read_tower(config, "vision_config", "internvl_vision")
    language = read_language(config, "qwen2", tied=True)
    ratio = config.number("downsample_ratio", 0.5, least=1 / 64, most=1)
    unit = Unit(int((patches_of(vision) * ratio) ** 2), patches_of(vision) ** 2 + 1)
    return _internvl_shape(tower, language, vision, ratio, unit, _grid(processor, vision, unit))


def internvl_chat(config: Fields, processor: Fields) -> ModelShape:
    """InternVL2 with the code of its checkpoints."""
    tower, vision = read_tower(config, "vision_config", "intern_vit_6b")
    language = read_language(config, "internlm2", key="llm_config")
    ratio = config.number("downsample_ratio", 0.5, least=1 / 64, most=1)
    side = config.integer("force_image_size", vision.square("image_size"))
    patches = side // vision.square("patch_size")
    unit = Unit(int((patches * ratio) ** 2), patches**2 + 1)
    least = config.integer("min_dynamic_patch", 1, most=MOST_TILES)
    most = config.integer("max_dynamic_patch", 12, most=MOST_TILES) if config.flag("dynamic_image_size") else 1
    grid = ClosestGrid(side, unit, least, most)
    return _internvl_shape(tower, language, vision, ratio, unit, grid)


def _internvl_shape(
    tower: Tower, language: Language, vision: Fields, ratio: float, unit: Unit, grid: ClosestGrid
) -> ModelShape:
    merged = int(tower.hidden / ratio**2)
    projector = 2 * merged + linear(merged, language.hidden) + linear(language.hidden, language.hidden)
    return ModelShape(
        name=NAMELESS,
        language=language,
        vision=replace(tower, projector=projector),
        pictures=grid,
        videos=FramesAsPictures(unit),
    )


def _grid(processor: Fields, vision: Fields, unit: Unit) -> ClosestGrid:
    arguments = images_of(processor, {"min_patches": 1, "max_patches": 12})
    tiles = arguments.integer("min_patches", most=MOST_TILES), arguments.integer("max_patches", most=MOST_TILES)
    return ClosestGrid(vision.square("image_size"), unit, *tiles)


def aya_vision(config: Fields, processor: Fields) -> ModelShape:
    absent = towers.SO400M | {"num_attention_heads": 14, "image_size": 384, "patch_size": 14, "vision_use_head": False}
    tower, vision = read_tower(config, "vision_config", "siglip_vision_model", absent)
    language = read_language(config, "cohere2", tied=True)
    factor = config.integer("downsample_factor", 2)
    merged = tower.hidden * factor**2
    inner = config.integer("alignment_intermediate_size", language.hidden)
    projector = 2 * merged + linear(merged, inner) + linear(inner // 2, language.hidden)
    unit = Unit((patches_of(vision) // factor) ** 2, patches_of(vision) ** 2)
    return ModelShape(
        name=NAMELESS,
        language=language,
        vision=replace(tower, projector=projector),
        pictures=_grid(processor, vision, unit),
        marks_of_unit=1,
    )


def ovis2(config: Fields, processor: Fields) -> ModelShape:
    tower, vision = read_tower(config, "vision_config", "ovis2_vision")
    language = read_language(config, "qwen2", tied=True)
    stride, indicators = vision.integer("hidden_stride"), vision.integer("num_visual_indicator_tokens")
    unit = Unit((patches_of(vision) // stride) ** 2 + indicators, patches_of(vision) ** 2)
    arguments = images_of(processor, {"max_patches": 12, "use_covering_area_grid": True})
    most = arguments.integer("max_patches", most=MOST_TILES) if arguments.flag("crop_to_patches") else 1
    grid = CoveringGrid(vision.square("image_size"), unit, 1, most, covers=arguments.flag("use_covering_area_grid"))
    table = vision.integer("vocab_size") * config.integer("hidden_size", 1536)
    return ModelShape(name=NAMELESS, language=language, vision=tower, connector=table, pictures=grid, marks_of_item=0)


def idefics3(config: Fields, processor: Fields) -> ModelShape:
    kind = "smolvlm_vision" if config.text("model_type") == "smolvlm" else "idefics3_vision"
    tower, vision = read_tower(config, "vision_config", kind)
    language = read_language(config, "llama")
    scale = config.integer("scale_factor", 2)
    patches = patches_of(vision) ** 2
    arguments = images_of(processor, {"do_image_splitting": True})
    longest = arguments.part("size", {"longest_edge": 1456}).integer("longest_edge")
    tile = arguments.part("max_image_size", {"longest_edge": 364}).integer("longest_edge")
    splits = arguments.flag("do_image_splitting")
    return ModelShape(
        name=NAMELESS,
        language=language,
        vision=replace(tower, projector=tower.hidden * scale**2 * language.hidden),
        pictures=TaggedTiles(Unit(patches // scale**2, patches), tile, longest, splits),
        marks_of_unit=2,
    )


def minicpm_v(config: Fields, processor: Fields) -> ModelShape:
    """MiniCPM-V 2.6 with the code of its checkpoint: a SigLIP of any shape, and 64 queries for each slice."""
    version = config.number("version", 2.6)
    if version != 2.6:
        raise ConfigError(f"{config.path('version')}: {version:g} is not known; known is 2.6")
    vision = config.part("vision_config", towers.SO400M | {"vision_use_head": False})
    vision = Fields(vision.given | {"vision_use_head": False}, towers.SO400M, name=vision.name)
    tower = towers.READERS["siglip_vision_model"](vision)
    language = read_language(config, "qwen2")
    queries, width = config.integer("query_num"), language.hidden
    resampler = queries * width + tower.hidden * width + linear(width, 3 * width) + linear(width, width)
    resampler += 6 * width + width * width
    cut = config.part("slice_config")
    side = cut.integer("scale_resolution")
    unit = Unit(queries, (side // cut.integer("patch_size")) ** 2)
    return ModelShape(
        name=NAMELESS,
        language=language,
        # vLLM 0.5 and 0.6, on which the paper's system stands, run this tower with eager attention: it knows no sdpa.
        vision=replace(tower, projector=resampler, eager=True),
        pictures=Slices(side, unit, cut.integer("max_slice_nums", most=MOST_TILES)),
        videos=FramesAsPictures(unit),
        marks_of_item=0,
        marks_of_unit=2,
    )
