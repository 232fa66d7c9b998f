"""Ovis2: tiles between indicator tokens, whose rows come from the table of visual embeddings on encode instances."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.image_processing_utils import BaseImageProcessor

from triptych.errors import ConfigError
from triptych.model.families.base import (
    Family,
    ItemLayout,
    Modality,
    Parts,
    Rows,
    Run,
    Tensors,
    edge,
    flatten,
    require_equal,
    square,
)
from triptych.model.families.tiles import ClosestGrid
from triptych.model.headers import ImageHeader

_PLACEHOLDER = "<image>"  # what chat templates write, whatever the tokenizer's own image token is
_START, _GRID, _COLUMN, _ROW, _END = range(5)  # the indicators, in the order of the config
_COVERED = 0.9  # of the picture's area, by tiles that keep its details


class Ovis2(Family):
    model_types = ("ovis2",)

    def modalities(self, parts: Parts) -> Sequence[Modality]:
        processor, vision = parts.image_processor, self.config.vision_config
        indicators = [parts.token(token_id) for token_id in self.config.visual_indicator_token_ids]
        if len(indicators) != 5 or vision.num_visual_indicator_tokens != 5:
            raise ConfigError(f"expected five visual indicator tokens, got {len(indicators)}")
        if vision.tokenize_function == "gumbel_argmax":
            raise ConfigError("tokenize_function gumbel_argmax draws at random: no picture has the same features twice")
        side = square(vision.image_size)
        require_equal("tile height", edge(processor.size, "height"), side)
        require_equal("tile width", edge(processor.size, "width"), side)
        patches = side // square(vision.patch_size)
        if patches % vision.hidden_stride:
            raise ConfigError(f"{patches} x {patches} patches of a tile do not divide by {vision.hidden_stride}")
        rows_per_tile = int(patches // vision.hidden_stride) ** 2
        require_equal("image_seq_length", parts.arguments.get("image_seq_length", rows_per_tile), rows_per_tile)
        token = parts.token(self.config.image_token_id)
        return [_IndicatedTiles(processor, token, indicators, side=side, rows_per_tile=rows_per_tile)]

    def reserved_texts(self, tokenizer: Tokenizer) -> frozenset[str]:
        indicators = tokenizer.convert_ids_to_tokens(list(self.config.visual_indicator_token_ids))
        return super().reserved_texts(tokenizer) | frozenset(indicators)


class _IndicatedTiles(ClosestGrid):
    """The whole picture, then its tiles line by line. Each of them carries the rows of all indicators behind its own,
    so that a tile and the indicator next to it wait for the same unit."""

    options: ClassVar[Mapping[str, object]] = {}  # here the checkpoint says whether pictures are cut

    def __init__(
        self, processor: BaseImageProcessor, token: str, indicators: Sequence[str], *, side: int, rows_per_tile: int
    ) -> None:
        super().__init__(processor, token, side=side, tokens_per_tile=rows_per_tile, placeholder=_PLACEHOLDER)
        self._indicators = indicators
        choices: Any = processor
        self._cuts: bool = choices.crop_to_patches and choices.max_patches > 1
        self._keeps_area: bool = choices.use_covering_area_grid
        sides = range(1, choices.max_patches + 1)
        grids = [(first, second) for first in sides for second in sides if first * second <= choices.max_patches]
        self._all_grids = sorted(grids, key=math.prod)

    def _lay_out(self, header: ImageHeader, num_items: int) -> ItemLayout:
        order: list[tuple[int, int | None]] = [(0, _START), (0, None), (0, _GRID)]  # unit; an indicator or its tile
        columns, rows = self._grid(header.width, header.height) if self._cuts else (1, 1)
        num_tiles = rows * columns if rows * columns > 1 else 0
        for unit in range(1, num_tiles + 1):
            order += [(unit, None), (unit, _COLUMN if unit % columns else _ROW)]
        if num_tiles:
            order.pop()
        order.append((num_tiles, _END))
        length = self._tokens_per_tile
        return self.item(
            [length if what is None else Run(self._indicators[what], 1) for _, what in order],
            [length + len(self._indicators)] * (1 + num_tiles),
            [Rows(unit, 0, length) if what is None else Rows(unit, length + what, 1) for unit, what in order],
        )

    def features(self, model: PreTrainedModel, inputs: Tensors) -> Tensor:
        output = model.base_model.get_image_features(**inputs, return_dict=True)
        tiles, indicators = output.pooler_output, output.visual_indicator_features  # [tiles, rows, width], [5, width]
        return flatten(torch.cat([tiles, indicators.expand(len(tiles), -1, -1)], dim=1))

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """(columns, rows) of tiles beside the whole picture."""
        return self._covering_grid(width, height) if self._keeps_area else super()._grid(width, height)

    def _covering_grid(self, width: int, height: int) -> tuple[int, int]:
        """The fewest tiles that keep most of the picture's area; where none do, those that keep the most of it.

        The family judges grids as (rows, columns) and then takes them as (columns, rows); so do we.
        """
        kept = {grid: self._kept_area(width, height, grid) for grid in self._all_grids}
        enough = [grid for grid, share in kept.items() if share > _COVERED]
        if enough:
            return min(enough, key=lambda grid: (grid[0] * grid[1], -kept[grid]))
        return min(kept, key=lambda grid: (-kept[grid], grid[0] * grid[1]))

    def _kept_area(self, width: int, height: int, grid: tuple[int, int]) -> float:
        """The share of the picture that is left once every cell is shrunk until its longer side fits a tile."""
        area = 0.0
        for cell_height in _cells(height, grid[0]):
            for cell_width in _cells(width, grid[1]):
                longer, shorter = max(cell_width, cell_height), min(cell_width, cell_height)
                area += self._side * (shorter / longer * self._side) if longer > self._side else longer * shorter
        return area / (width * height)


def _cells(length: int, count: int) -> list[int]:
    """Lengths of equal parts; the last one gets what is left over."""
    part = length // count
    return [part] * (count - 1) + [length - part * (count - 1)]
