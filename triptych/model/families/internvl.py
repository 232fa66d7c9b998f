"""InternVL: a picture becomes a grid of square tiles of the closest aspect ratio, and a thumbnail of the whole."""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from triptych.errors import ConfigError
from triptych.model.families.base import Family, ImageLayout, ItemLayout, UnitLayout, edge, require_equal, square


class InternVL(Family):
    model_types = ("internvl",)
    # The processor's default wins over what the checkpoint says.
    image_arguments: ClassVar[Mapping[str, object]] = {"crop_to_patches": True}

    def image_layout(
        self, image_processor: BaseImageProcessor, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]
    ) -> ImageLayout:
        vision = self.config.vision_config
        side = square(vision.image_size)
        require_equal("tile height", edge(image_processor.size, "height"), side)
        require_equal("tile width", edge(image_processor.size, "width"), side)
        tokens_per_tile = int((side // square(vision.patch_size) * self.config.downsample_ratio) ** 2)
        require_equal("image_seq_length", arguments.get("image_seq_length", tokens_per_tile), tokens_per_tile)
        start = getattr(tokenizer, "start_image_token", None)
        end = getattr(tokenizer, "end_image_token", None)
        if start is None or end is None:
            raise ConfigError("the tokenizer names no start_image_token and end_image_token")
        return _Tiles(
            self._token(tokenizer, self.image_token_id),
            start=start,
            end=end,
            side=side,
            tokens_per_tile=tokens_per_tile,
            min_tiles=image_processor.min_patches,
            max_tiles=image_processor.max_patches,
        )


class _Tiles(ImageLayout):
    def __init__(
        self,
        image_token: str,
        *,
        start: str,
        end: str,
        side: int,
        tokens_per_tile: int,
        min_tiles: int,
        max_tiles: int,
    ) -> None:
        super().__init__(image_token)
        self._start, self._end = start, end
        self._side, self._tokens_per_tile = side, tokens_per_tile
        self._max_tiles = max_tiles
        sides = range(1, max_tiles + 1)
        grids = [(columns, rows) for columns in sides for rows in sides if min_tiles <= columns * rows <= max_tiles]
        self._grids = sorted(grids, key=lambda grid: grid[0] * grid[1])

    def _lay_out(self, width: int, height: int) -> ItemLayout:
        unit = UnitLayout(self._num_tiles(width, height) * self._tokens_per_tile)
        return ItemLayout.of(self.image_token, [self._start, unit.num_tokens, self._end], (unit,))

    def _num_tiles(self, width: int, height: int) -> int:
        if self._max_tiles <= 1:
            return 1
        columns, rows = self._grid(width, height)
        return 1 if columns * rows == 1 else columns * rows + 1

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """The closest aspect ratio; of equally close ones the largest that the picture fills more than half."""
        best, best_distance = (1, 1), float("inf")
        for columns, rows in self._grids:
            distance = abs(width / height - columns / rows)
            fills = width * height > 0.5 * self._side * self._side * columns * rows
            if distance < best_distance or (distance == best_distance and fills):
                best, best_distance = (columns, rows), distance
        return best
