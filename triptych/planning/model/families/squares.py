"""Families whose pictures become one square, or tiles of one and its copy: the LLaVAs and Gemma 3."""

from dataclasses import replace
from typing import Any

from triptych.errors import ConfigError
from triptych.planning.model import towers
from triptych.planning.model.configs import Fields
from triptych.planning.model.families.reading import NAMELESS, patches_of, read_language, two_layers
from triptych.planning.model.lines import LinesOfTiles
from triptych.planning.model.pictures import Square
from triptych.planning.model.shape import ModelShape
from triptych.planning.model.tower import Tower
from triptych.planning.model.towers import read_tower
from triptych.planning.model.units import Unit
from triptych.planning.model.videos import FramesAsPictures


def llava(config: Fields, processor: Fields) -> ModelShape:
    tower, vision = read_tower(config, "vision_config", "clip_vision_model", towers.CLIP_L)
    rows, positions = _rows_of_square(config, tower, vision)
    language = read_language(config, "llama")
    return ModelShape(
        name=NAMELESS,
        language=language,
        vision=replace(tower, projector=two_layers(config, tower, language)),
        pictures=Square(Unit(rows, positions)),
        marks_of_item=0,
    )


def _rows_of_square(config: Fields, tower: Tower, vision: Fields, usual: str = "default") -> tuple[int, int]:
    patches = patches_of(vision) ** 2
    drops_class = (config.text("vision_feature_select_strategy") or usual) == "default"
    return patches + tower.class_positions - drops_class, patches + tower.class_positions


def gemma3(config: Fields, processor: Fields) -> ModelShape:
    tower, vision = read_tower(config, "vision_config", "siglip_vision_model")
    language = read_language(config, "gemma3_text", tied=True)
    unit = Unit(config.integer("mm_tokens_per_image", 256), patches_of(vision) ** 2)
    projector = tower.hidden * language.hidden + tower.hidden
    return ModelShape(
        name=NAMELESS,
        language=language,
        vision=replace(tower, projector=projector),
        pictures=Square(unit),
        marks_of_item=4,  # two line breaks on either side are one token each
    )


def llava_next(config: Fields, processor: Fields) -> ModelShape:
    tower, vision = read_tower(config, "vision_config", "clip_vision_model", towers.CLIP_L)
    usual = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return _lines_of_tiles(config, tower, vision, usual, max_tiles=0)


def llava_onevision(config: Fields, processor: Fields) -> ModelShape:
    absent = towers.SO400M | {"image_size": 384, "patch_size": 14, "vision_use_head": False}
    tower, vision = read_tower(config, "vision_config", "siglip_vision_model", absent)
    usual = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
    aspect = config.text("vision_aspect_ratio") or "anyres_max_9"
    max_tiles = aspect.removeprefix("anyres_max_")
    if not max_tiles.isdecimal():
        raise ConfigError(f"{config.path('vision_aspect_ratio')}: {aspect!r} is not anyres_max_N")
    shape = _lines_of_tiles(config, tower, vision, usual, max_tiles=int(max_tiles))
    patches = patches_of(vision)
    frame = Unit((-(-patches // 2)) ** 2 + 1, patches**2)
    return replace(shape, videos=FramesAsPictures(frame))


def _lines_of_tiles(
    config: Fields, tower: Tower, vision: Fields, usual: list[list[int]], *, max_tiles: int
) -> ModelShape:
    language = read_language(config, "qwen2" if max_tiles else "llama")
    side, patches = vision.square("image_size"), patches_of(vision)
    resolutions = _resolutions(config, side, config.items("image_grid_pinpoints") or usual)
    lines = LinesOfTiles(side, patches, patches**2 + tower.class_positions, resolutions, max_tiles)
    return ModelShape(
        name=NAMELESS,
        language=language,
        vision=replace(tower, projector=two_layers(config, tower, language)),
        connector=language.hidden,  # the newline row
        pictures=lines,
        marks_of_item=0,
    )


def _resolutions(config: Fields, side: int, pairs: list[Any]) -> tuple[tuple[int, int], ...]:
    """(height, width) of the larger copies, in whole tiles."""
    for pair in pairs:
        whole = isinstance(pair, list) and len(pair) == 2 and all(isinstance(edge, int) for edge in pair)
        if not whole or any(edge < side or edge % side for edge in pair):
            name = config.path("image_grid_pinpoints")
            raise ConfigError(f"{name}: {pair!r} is no height and width in multiples of {side}")
    return tuple((height, width) for height, width in pairs)
