"""Pictures in tiles of one size: the grid of the closest aspect ratio, of the area kept, or of whole tiles."""

import math
from dataclasses import dataclass
from functools import cached_property

from triptych.planning.model.units import Unit, Units

LARGEST_SIDE = 4096  # Idefics3: of a resized picture
COVERED = 0.9  # Ovis2: of the picture's area, by tiles that keep its details


@dataclass(frozen=True)
class ClosestGrid:
    """A grid of square tiles of the closest aspect ratio, and a thumbnail where there are several."""

    side: int
    tile: Unit
    min_tiles: int
    max_tiles: int

    def units(self, width: int, height: int, num_images: int) -> Units:
        if self.max_tiles <= 1:
            return (self.tile,)
        columns, rows = self.grid(width, height)
        return (self.tile,) * (1 if columns * rows == 1 else columns * rows + 1)

    @cached_property
    def grids(self) -> list[tuple[int, int]]:
        sides = range(1, self.max_tiles + 1)
        grids = [(columns, rows) for columns in sides for rows in sides]
        allowed = [grid for grid in grids if self.min_tiles <= math.prod(grid) <= self.max_tiles]
        return sorted(allowed, key=math.prod)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """The closest aspect ratio; of equally close ones the largest that the picture fills more than half."""
        best, best_distance = (1, 1), math.inf
        for columns, rows in self.grids:
            distance = abs(width / height - columns / rows)
            fills = width * height > 0.5 * self.side * self.side * columns * rows
            if distance < best_distance or (distance == best_distance and fills):
                best, best_distance = (columns, rows), distance
        return best


@dataclass(frozen=True)
class CoveringGrid(ClosestGrid):
    """Ovis2: the fewest tiles that keep most of the picture's area. Grids are judged as (rows, columns)."""

    covers: bool = True

    def grid(self, width: int, height: int) -> tuple[int, int]:
        if not self.covers:
            return super().grid(width, height)
        kept = {grid: self._kept_area(width, height, grid) for grid in self.grids}
        enough = [grid for grid, share in kept.items() if share > COVERED]
        if enough:
            return min(enough, key=lambda grid: (math.prod(grid), -kept[grid]))
        return min(kept, key=lambda grid: (-kept[grid], math.prod(grid)))

    def _kept_area(self, width: int, height: int, grid: tuple[int, int]) -> float:
        area = 0.0
        for cell_height in _cells(height, grid[0]):
            for cell_width in _cells(width, grid[1]):
                longer, shorter = max(cell_width, cell_height), min(cell_width, cell_height)
                area += self.side * (shorter / longer * self.side) if longer > self.side else longer * shorter
        return area / (width * height)


def _cells(length: int, count: int) -> list[int]:
    part = length // count
    return [part] * (count - 1) + [length - part * (count - 1)]


@dataclass(frozen=True)
class TaggedTiles:
    """Idefics3: the longer side as asked, both rounded up to whole tiles, and the whole picture as one more."""

    unit: Unit
    tile: int
    longest: int
    splits: bool

    def units(self, width: int, height: int, num_images: int) -> Units:
        if not self.splits:
            return (self.unit,)
        width, height = self._whole_tiles(*self._bounded(*self._resized(width, height)))
        if width <= self.tile and height <= self.tile:
            return (self.unit,)
        return (self.unit,) * (height // self.tile * (width // self.tile) + 1)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        longer, shorter = max(width, height), min(width, height)
        short = int(self.longest / (width / height)) if width >= height else int(self.longest * (width / height))
        assert shorter <= longer, f"{width} x {height}"
        short = max(short + short % 2, 1)
        return (self.longest, short) if width >= height else (short, self.longest)

    def _bounded(self, width: int, height: int) -> tuple[int, int]:
        ratio = width / height
        if width >= height and width > LARGEST_SIDE:
            width, height = LARGEST_SIDE, int(LARGEST_SIDE / ratio)
        elif height > width and height > LARGEST_SIDE:
            width, height = int(LARGEST_SIDE * ratio), LARGEST_SIDE
        return max(width, 1), max(height, 1)

    def _whole_tiles(self, width: int, height: int) -> tuple[int, int]:
        ratio = width / height
        if width >= height:
            width = self._round_up(width)
            return width, self._round_up(int(width / ratio))
        height = self._round_up(height)
        return self._round_up(int(height * ratio)), height

    def _round_up(self, side: int) -> int:
        return math.ceil(side / self.tile) * self.tile
