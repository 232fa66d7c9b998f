"""Clips: windows of their spectrogram."""

from dataclasses import dataclass

from triptych.planning.model.units import Unit, Units


@dataclass(frozen=True)
class Windows:
    """A clip in windows of `window` frames of its spectrogram, of which one row takes `frames_per_row`."""

    rate: int
    hop: int
    window: int
    max_windows: int
    padded: bool  # whether the last window counts as a whole one in the rows
    pads_positions: bool  # and in the work
    max_frames: int = 0  # of a clip; 0: any
    rows_per_window: int = 0  # where it is padded

    def units(self, seconds: float) -> Units:
        frames = -(-round(seconds * self.rate) // self.hop)
        if self.max_frames:
            frames = min(frames, self.max_frames)
        lengths = [min(self.window, frames - start) for start in range(0, frames, self.window)]
        units = [self._unit(length) for length in lengths[: self.max_windows]]
        return tuple(unit for unit in units if unit.rows > 0)

    def _unit(self, frames: int) -> Unit:
        positions = convolved(self.window if self.pads_positions else frames)
        return Unit(self.rows_per_window if self.padded else pooled(frames), positions)


def convolved(frames: int) -> int:
    """Positions of a Whisper encoder for so many frames of a spectrogram."""
    return (frames - 1) // 2 + 1


def pooled(frames: int) -> int:
    """Rows where an average over pairs of positions follows."""
    return (convolved(frames) - 2) // 2 + 1
