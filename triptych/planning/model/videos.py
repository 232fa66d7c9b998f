"""Videos: slices of several frames, or a picture for each frame."""

from dataclasses import dataclass

from triptych.planning.model.areas import fit_area, fit_volume
from triptych.planning.model.units import Unit, Units

MIN_GROWTH = 1.05  # Qwen: room that a cap on the pixels of a frame leaves above the smallest size


@dataclass(frozen=True)
class TemporalSlices:
    """`length` frames become one unit. Bounds count the pixels of a frame, or of the whole video (`by_volume`)."""

    side: int
    merged: int
    length: int
    min_pixels: int
    max_pixels: int
    by_volume: bool
    capped_tokens: int = 0  # where the pixels of a frame are capped so that a video (by volume: a frame) has so many

    def units(self, frames: int, width: int, height: int) -> Units:
        rows = self._rows(frames, width, height)
        return (Unit(rows, rows * self.merged),) * -(-frames // self.length)

    def _rows(self, frames: int, width: int, height: int) -> int:
        most = self.max_pixels
        if not self.by_volume:
            if self.capped_tokens:
                share = int(self.capped_tokens * self.side**2 * 0.9) * self.length // frames
                most = max(min(most, share), int(self.min_pixels * MIN_GROWTH))
            return fit_area(width, height, self.side, self.min_pixels, most)
        frames = max(frames, self.length)
        if self.capped_tokens:
            of_frame = min(self.capped_tokens * self.side**2, most // frames)
            most = max(of_frame, int(self.min_pixels * MIN_GROWTH)) * frames
        return fit_volume(frames, width, height, self.side, self.length, self.min_pixels, most)


@dataclass(frozen=True)
class FramesAsPictures:
    """Each frame is resized to the tower's square, and is one unit."""

    unit: Unit

    def units(self, frames: int, width: int, height: int) -> Units:
        return (self.unit,) * frames
