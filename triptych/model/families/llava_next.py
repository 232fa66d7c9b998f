"""LLaVA-NeXT and LLaVA-OneVision: the picture as one small square, then the tiles of a larger copy of it.

The features of the tiles are read as one grid, line by line over all tiles of a line, without the lines or columns that
are padding, and with a newline row behind each line.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor, select_best_resolution
from transformers.models.llava.modeling_llava import LlavaModel

from triptych.core import Media
from triptych.errors import ConfigError
from triptych.model.families.base import (
    Family,
    ImageModality,
    ItemLayout,
    Modality,
    Parts,
    Rows,
    Tensors,
    edge,
    flatten,
    require_equal,
    square,
)
from triptych.model.families.llava import refuse_other_towers, rows_of_square
from triptych.model.families.llava_onevision_video import OnevisionVideo
from triptych.model.families.video import video_token
from triptych.model.headers import ImageHeader
from triptych.model.images import decode_image

_SHRINKS_FROM = 1.1  # times the side that a grid of features may have; as the models' own function has it


class LlavaNext(Family):
    model_types = ("llava_next",)

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        refuse_other_towers(config)

    def modalities(self, parts: Parts) -> Sequence[Modality]:
        sizes = _sizes(self.config, parts)
        return [Lines(parts.image_processor, parts.token(self.config.image_token_id), sizes)]


class LlavaOnevision(LlavaNext):
    model_types = ("llava_onevision",)

    def modalities(self, parts: Parts) -> Sequence[Modality]:
        sizes, arguments = _sizes(self.config, parts), parts.arguments
        require_equal("num_image_tokens", arguments.get("num_image_tokens", sizes.patches**2), sizes.patches**2)
        aspect = self.config.vision_aspect_ratio
        require_equal("vision_aspect_ratio", arguments.get("vision_aspect_ratio", "anyres_max_9"), aspect)
        max_tiles = aspect.removeprefix("anyres_max_")
        if not max_tiles.isdecimal():
            raise ConfigError(f"a vision_aspect_ratio of anyres_max_N is needed, not {aspect}")
        token = parts.token(self.config.image_token_id)
        picture = LoneLines(parts.image_processor, token, sizes, max_tiles=int(max_tiles))
        placeholder = video_token(self.config, parts.tokenizer)
        if placeholder is None:
            return [picture]
        return [picture, OnevisionVideo.read(parts, placeholder, side=sizes.side, patches=sizes.patches)]


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Of one checkpoint: the side of a tile in pixels and in features, and the (height, width) of the larger copies."""

    side: int
    patches: int
    resolutions: list[tuple[int, int]]


def _sizes(config: PreTrainedConfig, parts: Parts) -> _Sizes:
    """Raises ConfigError where the processor's tiles are not those of the model."""
    processor, vision = parts.image_processor, config.vision_config
    side, patch_size = square(vision.image_size), square(vision.patch_size)
    require_equal("tile side", _tile_side(processor), side)
    pixels = processor.crop_size if processor.do_center_crop else processor.size
    require_equal("tile height", edge(pixels, "height") or edge(pixels, "shortest_edge"), side)
    require_equal("tile width", edge(pixels, "width") or edge(pixels, "shortest_edge"), side)
    resolutions = _pairs(processor.image_grid_pinpoints)
    require_equal("image_grid_pinpoints", resolutions, _pairs(config.image_grid_pinpoints))
    if not resolutions or any(height % side or width % side for height, width in resolutions):
        raise ConfigError(f"image_grid_pinpoints must be multiples of {side}, the side of a tile: {resolutions}")
    patches = side // patch_size
    require_equal("features of a tile", rows_of_square(config, parts), patches**2)
    return _Sizes(side, patches, resolutions)


def _tile_side(processor: Any) -> int | None:
    """That to which the processor cuts the larger copy."""
    cropped = processor.crop_size and edge(processor.crop_size, "height")
    return cropped or edge(processor.size, "height") or edge(processor.size, "shortest_edge")


def _pairs(resolutions: Any) -> list[tuple[int, int]]:
    return [(int(height), int(width)) for height, width in resolutions or ()]


@dataclass(frozen=True, slots=True)
class _Grid:
    """The larger copy of one picture: how many columns of tiles it has, and which of its features are no padding."""

    columns: int
    lines: range
    places: range  # within a line

    def tiles(self, patches: int) -> list[tuple[int, int]]:
        """(row, column) of those that show anything of the picture."""
        if not self.lines or not self.places:
            return []
        return [
            (row, column)
            for row in range(self.lines.start // patches, (self.lines.stop - 1) // patches + 1)
            for column in range(self.places.start // patches, (self.places.stop - 1) // patches + 1)
        ]


class Lines(ImageModality):
    """Units: the small square, and every tile that shows anything of the picture; each ends with a newline row."""

    tensors: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")

    def __init__(self, processor: BaseImageProcessor, token: str, sizes: _Sizes) -> None:
        super().__init__(processor, token)
        self._sizes = sizes

    def _lay_out(self, header: ImageHeader, num_items: int) -> ItemLayout:
        grid, patches = self._grid(header.width, header.height), self._sizes.patches
        units = {tile: unit for unit, tile in enumerate(grid.tiles(patches), 1)}
        columns = sorted({column for _, column in units})
        newline = patches**2
        rows = [Rows(0, 0, patches**2)]
        for line in grid.lines:
            row, line_of_tile = divmod(line, patches)
            unit = 0  # has a newline row for lines that are all padding
            for column in columns:
                unit, left = units[row, column], column * patches
                first, end = max(grid.places.start, left), min(grid.places.stop, left + patches)
                rows.append(Rows(unit, line_of_tile * patches + first - left, end - first))
            rows.append(Rows(unit, newline, 1))
        return self.item([sum(part.length for part in rows)], [patches**2 + 1] * (1 + len(units)), rows)

    def _grid(self, width: int, height: int) -> _Grid:
        best = select_best_resolution((height, width), self._sizes.resolutions)
        side, patches = self._sizes.side, self._sizes.patches
        num_lines, num_places = best[0] // side * patches, best[1] // side * patches
        if width / height > num_places / num_lines:
            used = int(round(height * (num_places / width), 7))
            return _Grid(best[1] // side, _middle(num_lines, used), range(num_places))
        used = int(round(width * (num_lines / height), 7))
        return _Grid(best[1] // side, range(num_lines), _middle(num_places, used))

    def prepare(self, media: Media) -> Tensors:
        return self._units(super().prepare(media))

    def _units(self, outputs: Tensors) -> Tensors:
        grid = self._grid_of(outputs)
        tiles = [1 + row * grid.columns + column for row, column in grid.tiles(self._sizes.patches)]
        return {"pixel_values": outputs["pixel_values"][0, [0, *tiles]]}

    def _grid_of(self, outputs: Tensors) -> _Grid:
        height, width = outputs["image_sizes"][0].tolist()
        return self._grid(width, height)

    def inputs(self, prepared: Tensors, index: int) -> Tensors:
        return {"pixel_values": prepared["pixel_values"][index : index + 1]}

    def features(self, model: PreTrainedModel, inputs: Tensors) -> Tensor:
        # These models' own function goes on to put whole pictures together; that of LLaVA stops before that.
        body: Any = model.base_model
        output = LlavaModel.get_image_features(body, **inputs, return_dict=True)
        tiles = flatten(output.pooler_output).view(len(inputs["pixel_values"]), self._sizes.patches**2, -1)
        newlines = body.image_newline.to(tiles).expand(len(tiles), 1, -1)
        return flatten(torch.cat([tiles, newlines], 1))


class LoneLines(Lines):
    """As `Lines` where the picture is the only one of a prompt; else it is the small square only, and a newline row.

    A grid with far more features than `max_tiles` tiles have is shrunk over all its tiles: such a picture is one unit.
    """

    depends_on_num_items = True

    def __init__(self, processor: BaseImageProcessor, token: str, sizes: _Sizes, *, max_tiles: int) -> None:
        super().__init__(processor, token, sizes)
        self._most_features = max_tiles * sizes.patches**2

    def _lay_out(self, header: ImageHeader, num_items: int) -> ItemLayout:
        small_square = self._sizes.patches**2
        if num_items > 1:
            return self.item([small_square + 1], [small_square + 1])
        shrunk = self._shrunk(self._grid(header.width, header.height))
        if shrunk is None:
            return super()._lay_out(header, num_items)
        num_lines, num_places = shrunk
        num_tokens = small_square + num_lines * (num_places + 1)
        return self.item([num_tokens], [num_tokens])

    def _shrunk(self, grid: _Grid) -> tuple[int, int] | None:
        """(lines, places in a line) of a grid that is too large, else None."""
        num_lines, num_places = len(grid.lines), len(grid.places)
        ratio = math.sqrt(num_lines * num_places / self._most_features)
        return (int(num_lines // ratio), int(num_places // ratio)) if ratio > _SHRINKS_FROM else None

    def prepare(self, media: Media) -> Tensors:
        if media.num_items == 1:
            return super().prepare(media)
        prompt = [decode_image(media.data), Image.new("RGB", (2, 2))]  # the processor counts the pictures of a prompt
        outputs = self.processor(images=[prompt], return_tensors="pt", **self.options)
        return {"pixel_values": outputs["pixel_values"][0]}

    def _units(self, outputs: Tensors) -> Tensors:
        return outputs if self._shrunk(self._grid_of(outputs)) else super()._units(outputs)

    def inputs(self, prepared: Tensors, index: int) -> Tensors:
        if "image_sizes" not in prepared:
            return super().inputs(prepared, index)
        assert index == 0, f"unit {index} of a picture that is encoded whole"
        return prepared

    def features(self, model: PreTrainedModel, inputs: Tensors) -> Tensor:
        whole = "image_sizes" in inputs
        return ImageModality.features(self, model, inputs) if whole else super().features(model, inputs)


def _middle(num: int, used: int) -> range:
    """What is left of a length when half of what is not used goes off either end, rounded down."""
    padding = (num - used) // 2
    return range(padding, num - padding)
