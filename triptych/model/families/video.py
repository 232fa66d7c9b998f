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
from transformers import PreTrainedTokenizerBase as Tokenizer

from triptych.core import Media
from triptych.errors import ConfigError
from triptych.model.families.base import ItemLayout, Modality, Parts, Piece, Tensors, refuse_narrow, require_equal
from triptych.model.headers import Header, VideoHeader
from triptych.model.videos import Frame, iter_frames

# Where transformers looks for the arguments of a video processor: the first that is there counts, as a whole.
_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers


class VideoModality(Modality):
    """Videos of any family."""

    name = "video"

    def lay_out(self, header: Header, num_items: int) -> ItemLayout:
        assert isinstance(header, VideoHeader)
        refuse_narrow("video", header.width, header.height, code="invalid_video")
        return super().lay_out(header, num_items)

    @abstractmethod
    def _lay_out(self, header: VideoHeader, num_items: int) -> ItemLayout: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelArguments:
    """Those that every video processor has."""

    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    rescale_factor: float = 1 / 255
    resample: int = 3

    @classmethod
    def read(cls, parts: Parts, defaults: Self) -> Self:
        """The checkpoint's arguments of the names that this class has, defaults for the others.

        Raises ConfigError for a processor that does not resize, rescale and normalise.
        """
        given = given_arguments(parts)
        for step in ("do_resize", "do_rescale", "do_normalize"):
            if given.get(step) is False:
                raise ConfigError(f"model {parts.folder}: a video processor with {step}: false is not supported")
        names = {field.name for field in dataclasses.fields(cls)}
        found = {name: value for name, value in given.items() if name in names and value is not None}
        if found.get("resample", defaults.resample) not in _RESAMPLE:
            raise ConfigError(f"model {parts.folder}: a video processor with resample: {found['resample']}")
        for name in ("image_mean", "image_std"):
            if name in found:
                found[name] = tuple(found[name])
        return dataclasses.replace(defaults, **found)

    def resized(self, pixels: Frame, height: int, width: int) -> Tensor:
        """[3, height, width], uint8."""
        frame = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        if frame.shape[1:] == (height, width):
            return frame
        mode = _RESAMPLE[self.resample]
        return functional.interpolate(frame[None], (height, width), mode=mode, antialias=True)[0]

    def normalised(self, frames: Tensor) -> Tensor:
        """float32, of [frames, 3, height, width] in uint8."""
        scale = 1.0 / self.rescale_factor
        mean = (torch.tensor(self.image_mean) * scale)[:, None, None]
        std = (torch.tensor(self.image_std) * scale)[:, None, None]
        return frames.to(torch.float32).sub_(mean).div_(std)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameArguments(PixelArguments):
    """Those of a video processor to which each frame is a picture of one size."""

    height: int
    width: int

    @classmethod
    def read(cls, parts: Parts, defaults: Self) -> Self:
        """Raises ConfigError, as above, and for a processor that crops."""
        given = given_arguments(parts)
        size = given.get("size") or {"height": defaults.height, "width": defaults.width}
        if given.get("do_center_crop") or not size.get("height") or not size.get("width"):
            raise ConfigError(f"model {parts.folder}: videos must be resized to a height and a width, and not cropped")
        found = super(FrameArguments, cls).read(parts, defaults)
        return dataclasses.replace(found, height=size["height"], width=size["width"])

    @classmethod
    def read_squares(cls, parts: Parts, side: int) -> "FrameArguments":
        """For a tower that takes squares of that side. Raises ConfigError where the frames become anything else."""
        found = FrameArguments.read(parts, FRAME_DEFAULTS)
        require_equal("height of videos", found.height, side)
        require_equal("width of videos", found.width, side)
        return found


# Those of transformers' classes, for checkpoints that bring none.
FRAME_DEFAULTS = FrameArguments(height=384, width=384, image_mean=CLIP_MEAN, image_std=CLIP_STD)


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceArguments(PixelArguments):
    """Those of a video processor that keeps the shape of the frames, and cuts them into patches."""

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    max_video_tokens: int = 0
    cap_pixels_per_frame: bool = False

    @classmethod
    def read(cls, parts: Parts, defaults: Self, *, bounds_outside_size: bool = False) -> Self:
        """Bounds on pixels are `size`, or `min_pixels` and `max_pixels`, which go first, where the family knows those.

        Raises ConfigError, as above.
        """
        given = given_arguments(parts)
        size, outside = given.get("size") or {}, given if bounds_outside_size else {}
        return dataclasses.replace(
            super(SliceArguments, cls).read(parts, defaults),
            min_pixels=outside.get("min_pixels") or size.get("shortest_edge") or defaults.min_pixels,
            max_pixels=outside.get("max_pixels") or size.get("longest_edge") or defaults.max_pixels,
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


class Frames(VideoModality):
    """Videos whose frames are pictures to the encoder, one unit each."""

    def __init__(self, arguments: FrameArguments, token: str, tokens_per_frame: int, **texts: str | None) -> None:
        super().__init__(token, **texts)
        self.settings = arguments
        self._tokens_per_frame = tokens_per_frame

    @property
    def arguments(self) -> str:
        return json.dumps([type(self).__name__, dataclasses.asdict(self.settings)])

    def prepare(self, media: Media) -> Tensor:
        """[frames, 3, height, width], uint8."""
        return self.resized(iter_frames(media.data, media.frames))

    def resized(self, frames: Iterable[Frame]) -> Tensor:
        """What `prepare` makes of these frames, which it keeps no longer than it needs each of them."""
        height, width = self.settings.height, self.settings.width
        return torch.stack([self.settings.resized(pixels, height, width) for pixels in frames])

    @abstractmethod
    def inputs(self, prepared: Tensor, index: int) -> Tensors: ...


class Slices(VideoModality):
    """Videos whose encoder takes `temporal_patch_size` frames at a time, and never looks from one slice to another.

    Where the number of frames does not divide, the last one is repeated. So a video of one frame is one slice, which
    some of transformers' processors refuse.
    """

    def __init__(self, arguments: SliceArguments, token: str, **texts: str | None) -> None:
        super().__init__(token, **texts)
        self.settings = arguments

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
            rows, columns = self._grid(num_frames, pixels.shape[1], pixels.shape[0])
            small.append(self.settings.resized(pixels, rows * self.settings.side, columns * self.settings.side))
        assert len(small) == num_frames, f"{len(small)} frames where {num_frames} were announced"
        small += small[-1:] * (-num_frames % self.settings.temporal_patch_size)
        return torch.stack(small)

    def inputs(self, prepared: Tensor, index: int) -> Tensors:
        length = self.settings.temporal_patch_size
        patches = self._patches(prepared[index * length : (index + 1) * length])
        grid = [1, prepared.shape[-2] // self.settings.patch_size, prepared.shape[-1] // self.settings.patch_size]
        return {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([grid])}

    def _patches(self, frames: Tensor) -> Tensor:
        """[patches, channels * frames * patch_size ** 2] of one slice: the patches of one token one after the other."""
        pixels = self.settings.normalised(frames)
        num_frames, channels, height, width = pixels.shape
        patch, merge, side = self.settings.patch_size, self.settings.merge_size, self.settings.side
        pixels = pixels.view(num_frames, channels, height // side, merge, patch, width // side, merge, patch)
        pixels = pixels.permute(2, 5, 3, 6, 1, 0, 4, 7)  # rows, columns, both within a token, channel, frame, pixels
        return pixels.reshape(-1, channels * num_frames * patch * patch)


def video_token(config: PreTrainedConfig, tokenizer: Tokenizer) -> str | None:
    """What the family's config calls the token of videos. None where the tokenizer does not have it: checkpoints for
    pictures only, and older ones, have configs that name it nevertheless."""
    token_id: int = config.video_token_id
    token: str | None = tokenizer.convert_ids_to_tokens(token_id) if token_id < len(tokenizer) else None
    return token


def slice_times(header: VideoHeader, length: int) -> list[tuple[float, float]]:
    """Seconds from the beginning of the video to the first and to the last frame of each slice."""
    times = [index / header.fps for index in header.frames]
    times += times[-1:] * (-len(times) % length)
    return list(zip(times[::length], times[length - 1 :: length], strict=True))


def given_arguments(parts: Parts) -> Mapping[str, Any]:
    """Those of the checkpoint's video processor; empty if it brings none."""
    nested: Mapping[str, Any] | None = parts.arguments.get("video_processor")
    if nested is not None:
        return nested
    for name in _FILES:
        if given := parts.read_json(name):
            return given
    return {}
