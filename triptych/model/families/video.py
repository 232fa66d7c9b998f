"""Videos, as far as their families agree on them: frames become temporal slices, each of which is one unit.

transformers' own video processors need torchvision. What they do to the pixels is a few lines of torch, and is written
here with the same numbers. Which frames they get is decided by the server, for all families alike: everything here
is equal to what the family's processor makes of those frames with `do_sample_frames=False`, and with metadata that says
which ones they are, of how many, at which rate.
"""

import dataclasses
import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedConfig

from triptych.core import Media
from triptych.errors import ConfigError, RequestError
from triptych.model.families.base import MAX_ASPECT_RATIO, ItemLayout, Modality, Parts, Piece, Tensors, require_equal
from triptych.model.headers import Header, VideoHeader
from triptych.model.videos import Frame, iter_frames

# Where transformers looks for the arguments of a video processor: the first that is there counts, as a whole.
_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers


class VideoModality(Modality):
    """Videos of any family."""

    name = "video"

    def lay_out(self, header: Header, num_items: int) -> ItemLayout:
        assert isinstance(header, VideoHeader)
        if max(header.width, header.height) > MAX_ASPECT_RATIO * min(header.width, header.height):
            raise RequestError(
                f"a video of {header.width} x {header.height} pixels is too narrow: the longer side may be at most "
                f"{MAX_ASPECT_RATIO} times the shorter one",
                code="invalid_video",
            )
        return super().lay_out(header, num_items)

    @abstractmethod
    def _lay_out(self, header: VideoHeader, num_items: int) -> ItemLayout: ...


@dataclass(frozen=True, slots=True)
class VideoArguments:
    """Those of a video processor that cuts frames into patches."""

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    max_video_tokens: int = 0
    cap_pixels_per_frame: bool = False
    rescale_factor: float = 1 / 255
    resample: int = 3

    @classmethod
    def read(cls, parts: Parts, defaults: Self, *, bounds_outside_size: bool = False) -> Self:
        """Bounds on pixels are `size`, or `min_pixels` and `max_pixels`, which go first, where the family knows those.

        Raises ConfigError for a processor that does not resize, rescale and normalise.
        """
        given = _given(parts)
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if given.get(step) is False:
                raise ConfigError(f"model {parts.folder}: a video processor with {step}: false is not supported")
        names = {field.name for field in dataclasses.fields(cls)} - {"min_pixels", "max_pixels"}
        found = {name: value for name, value in given.items() if name in names and value is not None}
        if found.get("resample", defaults.resample) not in _RESAMPLE:
            raise ConfigError(f"model {parts.folder}: a video processor with resample: {found['resample']}")
        for name in ("image_mean", "image_std"):
            if name in found:
                found[name] = tuple(found[name])
        size = given.get("size") or {}
        outside = given if bounds_outside_size else {}
        return dataclasses.replace(
            defaults,
            min_pixels=outside.get("min_pixels") or size.get("shortest_edge") or defaults.min_pixels,
            max_pixels=outside.get("max_pixels") or size.get("longest_edge") or defaults.max_pixels,
            **found,
        )

    def require_of_model(self, vision: PreTrainedConfig) -> None:
        """Raises ConfigError where the model cuts other patches than the processor."""
        require_equal("patch_size of videos", self.patch_size, vision.patch_size)
        require_equal("merge_size of videos", self.merge_size, vision.spatial_merge_size)
        require_equal("temporal_patch_size of videos", self.temporal_patch_size, vision.temporal_patch_size)

    @property
    def side(self) -> int:
        """Pixels of one token, up and across."""
        return self.patch_size * self.merge_size


class Slices(VideoModality):
    """Videos whose encoder takes `temporal_patch_size` frames at a time, and never looks from one slice to another.

    Where the number of frames does not divide, the last one is repeated. So a video of one frame is one slice, which
    some of transformers' processors refuse.
    """

    def __init__(self, arguments: VideoArguments, token: str, **texts: str | None) -> None:
        super().__init__(token, **texts)
        self.settings = arguments
        scale = 1.0 / arguments.rescale_factor
        self._mean = (torch.tensor(arguments.image_mean) * scale)[:, None, None]
        self._std = (torch.tensor(arguments.image_std) * scale)[:, None, None]

    @property
    def arguments(self) -> str:
        return json.dumps([type(self).__name__, dataclasses.asdict(self.settings)])

    @abstractmethod
    def _grid(self, num_frames: int, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of tokens in each slice."""

    @abstractmethod
    def _pieces(self, header: VideoHeader, num_slices: int, tokens_per_slice: int) -> Sequence[Piece]: ...

    def _positions(self, header: VideoHeader, grid: tuple[int, int, int]) -> Mapping[str, Any]:
        return {"video_grid_thw": grid}

    def _lay_out(self, header: VideoHeader, num_items: int) -> ItemLayout:
        rows, columns = self._grid(len(header.frames), header.width, header.height)
        num_slices = -(-len(header.frames) // self.settings.temporal_patch_size)
        merge_size = self.settings.merge_size
        return self.item(
            self._pieces(header, num_slices, rows * columns),
            [rows * columns] * num_slices,
            positions=self._positions(header, (num_slices, rows * merge_size, columns * merge_size)),
        )

    def prepare(self, media: Media) -> Tensor:
        """[frames, 3, height, width], uint8: resized, and so many that they make whole slices."""
        return self.resized(iter_frames(media.data, media.frames), len(media.frames))

    def resized(self, frames: Iterable[Frame], num_frames: int) -> Tensor:
        """What `prepare` makes of these frames, which it keeps no longer than it needs each of them."""
        small: list[Tensor] = []
        for pixels in frames:
            height, width = pixels.shape[:2]
            rows, columns = self._grid(num_frames, width, height)
            size = (rows * self.settings.side, columns * self.settings.side)
            small.append(self._resize(torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1), size))
        assert len(small) == num_frames, f"{len(small)} frames where {num_frames} were announced"
        small += small[-1:] * (-num_frames % self.settings.temporal_patch_size)
        return torch.stack(small)

    def inputs(self, prepared: Tensor, index: int) -> Tensors:
        length = self.settings.temporal_patch_size
        patches = self._patches(prepared[index * length : (index + 1) * length])
        grid = [1, prepared.shape[-2] // self.settings.patch_size, prepared.shape[-1] // self.settings.patch_size]
        return {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([grid])}

    def _resize(self, frame: Tensor, size: tuple[int, int]) -> Tensor:
        if frame.shape[1:] == size:
            return frame
        mode = _RESAMPLE[self.settings.resample]
        return functional.interpolate(frame[None], size, mode=mode, antialias=True)[0]

    def _patches(self, frames: Tensor) -> Tensor:
        """[patches, channels * frames * patch_size ** 2] of one slice: the patches of one token one after the other."""
        pixels = frames.to(torch.float32).sub_(self._mean).div_(self._std)
        num_frames, channels, height, width = pixels.shape
        patch, merge, side = self.settings.patch_size, self.settings.merge_size, self.settings.side
        pixels = pixels.view(num_frames, channels, height // side, merge, patch, width // side, merge, patch)
        pixels = pixels.permute(2, 5, 3, 6, 1, 0, 4, 7)  # rows, columns, both within a token, channel, frame, pixels
        return pixels.reshape(-1, channels * num_frames * patch * patch)


def slice_times(header: VideoHeader, length: int) -> list[tuple[float, float]]:
    """Seconds from the beginning of the video to the first and to the last frame of each slice."""
    times = [index / header.fps for index in header.frames]
    times += times[-1:] * (-len(times) % length)
    return list(zip(times[::length], times[length - 1 :: length], strict=True))


def _given(parts: Parts) -> Mapping[str, Any]:
    nested: Mapping[str, Any] | None = parts.arguments.get("video_processor")
    if nested is not None:
        return nested
    for name in _FILES:
        if given := parts.read_json(name):
            return given
    return {}
