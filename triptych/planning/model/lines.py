"""Pictures of the LLaVAs: a small square, and the tiles of a larger copy, read line by line."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from triptych.planning.model.units import Unit, Units

SHRINKS_FROM = 1.1  # LLaVA-OneVision: times the side that a grid of features may have


@dataclass(frozen=True)
class LinesOfTiles:
    """LLaVA-NeXT and LLaVA-OneVision: a small square, and those tiles of a larger copy that show anything of it.

    Each unit ends with a newline row. `max_tiles`: beyond about so many the features of all are shrunk together, and
    only the one picture of a prompt has tiles; 0: neither.
    """

    side: int
    patches: int  # up and across a tile
    positions: int  # of a tile, with those that are no patch
    resolutions: Sequence[tuple[int, int]]  # (height, width)
    max_tiles: int = 0

    def units(self, width: int, height: int, num_images: int) -> Units:
        tile = Unit(self.patches**2 + 1, self.positions)
        if self.max_tiles and num_images > 1:
            return (tile,)
        best = best_resolution(width, height, self.resolutions)
        lines, places = self._used(width, height, best)
        columns, rows = _touched(places, self.patches), _touched(lines, self.patches)
        if self.max_tiles:
            ratio = math.sqrt(len(lines) * len(places) / (self.max_tiles * self.patches**2))
            if ratio > SHRINKS_FROM:
                kept = int(len(lines) // ratio) * (int(len(places) // ratio) + 1)
                tiles = best[0] // self.side * (best[1] // self.side)
                return (Unit(self.patches**2 + kept, (1 + tiles) * self.positions),)
        return (tile,) * (1 + columns * rows)

    def _used(self, width: int, height: int, best: tuple[int, int]) -> tuple[range, range]:
        """Lines and places of the grid of features that are no padding."""
        num_lines, num_places = best[0] // self.side * self.patches, best[1] // self.side * self.patches
        if width / height > num_places / num_lines:
            used = int(round(height * (num_places / width), 7))
            return _middle(num_lines, used), range(num_places)
        used = int(round(width * (num_lines / height), 7))
        return range(num_lines), _middle(num_places, used)


def _middle(num: int, used: int) -> range:
    padding = (num - used) // 2
    return range(padding, num - padding)


def _touched(used: range, patches: int) -> int:
    return (used.stop - 1) // patches - used.start // patches + 1 if used else 0


def best_resolution(width: int, height: int, resolutions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """(height, width) that keeps most of the picture's pixels; of equal ones that with the least padding."""

    def kept(resolution: tuple[int, int]) -> tuple[int, int]:
        scale = min(resolution[1] / width, resolution[0] / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - resolution[0] * resolution[1]

    return max(resolutions, key=kept)
