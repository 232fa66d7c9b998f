"""Pictures that the encoder gets as tiles of one size: each of them is a unit."""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers.image_processing_utils import BaseImageProcessor

from triptych.model.families.base import ImageModality, Tensors


class Tiles(ImageModality):
    """A picture whose tensors all have an axis of tiles; the tiles are the item's units, in that order."""

    tile_axis: ClassVar[int] = 0

    def inputs(self, prepared: Tensors, index: int) -> Tensors:
        return {name: tensor.narrow(self.tile_axis, index, 1) for name, tensor in prepared.items()}


class ClosestGrid(Tiles):
    """A picture stretched to the grid of square tiles that is closest to its aspect ratio, and a thumbnail of it."""

    # The families' processors pass this on, whatever the checkpoint says.
    options: ClassVar[Mapping[str, object]] = {"crop_to_patches": True}

    def __init__(
        self, processor: BaseImageProcessor, token: str, *, side: int, tokens_per_tile: int, **texts: str | None
    ) -> None:
        super().__init__(processor, token, **texts)
        self._side, self._tokens_per_tile = side, tokens_per_tile
        limits: Any = processor
        self._max_tiles: int = limits.max_patches
        sides = range(1, self._max_tiles + 1)
        grids = [(columns, rows) for columns in sides for rows in sides]
        allowed = [grid for grid in grids if limits.min_patches <= grid[0] * grid[1] <= self._max_tiles]
        self._grids = sorted(allowed, key=lambda grid: grid[0] * grid[1])

    def _num_tiles(self, width: int, height: int) -> int:
        """With the thumbnail, which comes last, and which a picture of one tile does not have."""
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
