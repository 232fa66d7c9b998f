"""Pictures that are encoded whole, and those of MiniCPM-V, which are cut into slices of their own shape."""

import math
from dataclasses import dataclass

from triptych.planning.model.areas import fit_area, fit_volume
from triptych.planning.model.units import Unit, Units


@dataclass(frozen=True)
class Square:
    """Every picture is resized to the same square."""

    unit: Unit

    def units(self, width: int, height: int, num_images: int) -> Units:
        return (self.unit,)


@dataclass(frozen=True)
class MergedPatches:
    """Any resolution, in whole squares of `side` pixels, each of `merged` positions. All of it is one unit."""

    side: int
    merged: int
    min_pixels: int
    max_pixels: int
    slice_length: int = 0  # where the bounds count the pixels of a slice of so many frames

    def units(self, width: int, height: int, num_images: int) -> Units:
        bounds = (self.min_pixels, self.max_pixels)
        if self.slice_length:
            rows = fit_volume(self.slice_length, width, height, self.side, self.slice_length, *bounds)
        else:
            rows = fit_area(width, height, self.side, *bounds)
        return (Unit(rows, rows * self.merged),)


@dataclass(frozen=True)
class LinesOfPatches:
    """Pixtral: scaled down to the largest size, never up, and filled up to whole squares."""

    side: int
    merged: int
    max_width: int
    max_height: int

    def units(self, width: int, height: int, num_images: int) -> Units:
        ratio = max(height / self.max_height, width / self.max_width)
        if ratio > 1:
            height, width = max(1, math.floor(height / ratio)), max(1, math.floor(width / ratio))
        rows = -(-height // self.side) * -(-width // self.side)
        return (Unit(rows, rows * self.merged),)


@dataclass(frozen=True)
class Slices:
    """MiniCPM-V: cut into about as many slices as squares of `side` fit, and a thumbnail where there are several.

    Positions are those of a full square. The model keeps each slice's own shape, with about as many.
    """

    side: int
    slice: Unit
    max_slices: int

    def units(self, width: int, height: int, num_images: int) -> Units:
        wanted = min(math.ceil(width * height / self.side**2), self.max_slices)
        if wanted <= 1:
            return (self.slice,)
        counts = [count for count in (wanted - 1, wanted, wanted + 1) if 1 < count <= self.max_slices]
        grids = [(columns, count // columns) for count in counts for columns in _divisors(count)]
        ratio = math.log(width / height)
        columns, rows = min(grids, key=lambda grid: abs(ratio - math.log(grid[0] / grid[1])))
        return (self.slice,) * (columns * rows + 1)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
