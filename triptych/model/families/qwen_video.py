"""Videos of Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from triptych.model.families.base import Parts, Piece
from triptych.model.families.patch_grids import fit_area, fit_volume
from triptych.model.families.video import CLIP_MEAN, CLIP_STD, SliceArguments, Slices, slice_times
from triptych.model.headers import VideoHeader

_MIN_GROWTH = 1.05  # a cap on the pixels of a frame leaves this much room above the smallest size

# Those of transformers' classes, for checkpoints that bring none.
_QWEN2_DEFAULTS = SliceArguments(
    min_pixels=128 * 28 * 28,
    max_pixels=28 * 28 * 768,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    image_mean=CLIP_MEAN,
    image_std=CLIP_STD,
    max_video_tokens=128000,
)
_QWEN3_DEFAULTS = SliceArguments(
    min_pixels=128 * 32 * 32,
    max_pixels=32 * 32 * 768,
    patch_size=16,
    temporal_patch_size=2,
    merge_size=2,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    max_video_tokens=768,
)


class Qwen2Video(Slices):
    """One run for the whole video. Bounds on pixels are those of each frame."""

    @classmethod
    def read(cls, parts: Parts, vision: Any, token: str, *, start: str, end: str) -> "Qwen2Video":
        arguments = SliceArguments.read(parts, _QWEN2_DEFAULTS, bounds_outside_size=True)
        arguments.require_of_model(vision)
        return cls(arguments, token, markup=f"{start}{token}{end}")

    def _grid(self, num_frames: int, width: int, height: int) -> tuple[int, int]:
        settings = self.settings
        max_pixels = settings.max_pixels
        if settings.cap_pixels_per_frame:
            all_pixels = int(settings.max_video_tokens * settings.side * settings.side * 0.9)
            share = all_pixels * settings.temporal_patch_size // num_frames
            max_pixels = max(min(max_pixels, share), int(settings.min_pixels * _MIN_GROWTH))
        return fit_area(width, height, settings.side, settings.min_pixels, max_pixels)

    def _pieces(self, header: VideoHeader, num_slices: int, tokens_per_slice: int) -> Sequence[Piece]:
        return [num_slices * tokens_per_slice]


class Qwen25Video(Qwen2Video):
    """Positions count the time that passes from slice to slice."""

    seconds: ClassVar[str] = "second_per_grid_ts"  # the argument of the position rule

    def _positions(self, header: VideoHeader, grid: tuple[int, int, int]) -> Mapping[str, Any]:
        frames_per_second = len(header.frames) / header.num_frames * header.fps
        seconds = self.settings.temporal_patch_size / frames_per_second
        return {**super()._positions(header, grid), self.seconds: seconds}


class Qwen3Video(Slices):
    """A time and a run for each slice. Bounds on pixels are those of all frames together."""

    def __init__(self, arguments: SliceArguments, token: str, *, start: str, end: str) -> None:
        super().__init__(arguments, token, markup=f"{start}{token}{end}")
        self._start, self._end = start, end

    @classmethod
    def read(cls, parts: Parts, vision: Any, token: str, *, start: str, end: str) -> "Qwen3Video":
        arguments = SliceArguments.read(parts, _QWEN3_DEFAULTS)
        arguments.require_of_model(vision)
        return cls(arguments, token, start=start, end=end)

    def _grid(self, num_frames: int, width: int, height: int) -> tuple[int, int]:
        settings = self.settings
        num_frames = max(num_frames, settings.temporal_patch_size)
        max_pixels = settings.max_pixels
        if settings.cap_pixels_per_frame:
            of_frame = min(settings.max_video_tokens * settings.side * settings.side, max_pixels // num_frames)
            max_pixels = max(of_frame, int(settings.min_pixels * _MIN_GROWTH)) * num_frames
        length = settings.temporal_patch_size
        return fit_volume(num_frames, width, height, settings.side, length, settings.min_pixels, max_pixels)

    def _pieces(self, header: VideoHeader, num_slices: int, tokens_per_slice: int) -> Sequence[Piece]:
        pieces: list[Piece] = []
        for first, last in slice_times(header, self.settings.temporal_patch_size):
            pieces += [f"<{(first + last) / 2:.1f} seconds>{self._start}", tokens_per_slice, self._end]
        return pieces
