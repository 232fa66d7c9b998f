"""GLM-4.1V and GLM-4.5V: any resolution; a video is a picture for each slice, with the second behind it."""

from collections.abc import Sequence
from typing import Any, ClassVar

from triptych.errors import ConfigError
from triptych.model.families.base import (
    Family,
    ImageModality,
    ItemLayout,
    Modality,
    Parts,
    Piece,
    edge,
    require_equal,
)
from triptych.model.families.patch_grids import fit_volume
from triptych.model.families.video import CLIP_MEAN, CLIP_STD, SliceArguments, Slices, slice_times, video_token
from triptych.model.headers import ImageHeader, VideoHeader

# Those of transformers' class, for checkpoints that bring none.
_DEFAULTS = SliceArguments(
    min_pixels=112 * 112,
    max_pixels=28 * 28 * 2 * 30000,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    image_mean=CLIP_MEAN,
    image_std=CLIP_STD,
)


class Glm4v(Family):
    model_types = ("glm4v", "glm4v_moe")

    def modalities(self, parts: Parts) -> Sequence[Modality]:
        config, vision = self.config, self.config.vision_config
        processor = parts.image_processor
        require_equal("patch_size", processor.patch_size, vision.patch_size)
        require_equal("merge_size", processor.merge_size, vision.spatial_merge_size)
        require_equal("temporal_patch_size", processor.temporal_patch_size, vision.temporal_patch_size)
        token, placeholder = parts.token(config.image_token_id), video_token(config, parts.tokenizer)
        start, end = parts.token(config.image_start_token_id), parts.token(config.image_end_token_id)
        picture = _Picture(processor, token, start=start, end=end)
        if placeholder is None:
            return [picture]
        markup = f"{parts.token(config.video_start_token_id)}{placeholder}{parts.token(config.video_end_token_id)}"
        video = Glm4vVideo.read(parts, vision, token, placeholder=placeholder, markup=markup, start=start, end=end)
        return [picture, video]


class _Picture(ImageModality):
    """Laid out as a video of one slice."""

    tensors: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")

    def __init__(self, processor: Any, token: str, *, start: str, end: str) -> None:
        super().__init__(processor, token, markup=f"{start}{token}{end}")
        min_pixels, max_pixels = edge(processor.size, "shortest_edge"), edge(processor.size, "longest_edge")
        if not min_pixels or not max_pixels or not processor.do_resize:
            raise ConfigError(
                "the image processor must resize, with a size of shortest_edge and longest_edge in pixels"
            )
        self._bounds = (min_pixels, max_pixels)

    def _lay_out(self, header: ImageHeader, num_items: int) -> ItemLayout:
        length, merge_size = self.processor.temporal_patch_size, self.processor.merge_size
        side = self.processor.patch_size * merge_size
        rows, columns = fit_volume(length, header.width, header.height, side, length, *self._bounds)
        grid = (1, rows * merge_size, columns * merge_size)
        return self.item([rows * columns], [rows * columns], positions={"image_grid_thw": grid})


class Glm4vVideo(Slices):
    """Its rows stand under the token of pictures: nothing but the markup tells that this is a video."""

    def __init__(
        self, arguments: SliceArguments, token: str, *, placeholder: str, markup: str, start: str, end: str
    ) -> None:
        super().__init__(arguments, token, placeholder=placeholder, markup=markup)
        self._start, self._end = start, end

    @classmethod
    def read(cls, parts: Parts, vision: Any, token: str, **texts: str) -> "Glm4vVideo":
        arguments = SliceArguments.read(parts, _DEFAULTS)
        arguments.require_of_model(vision)
        return cls(arguments, token, **texts)

    def _grid(self, num_frames: int, width: int, height: int) -> tuple[int, int]:
        settings, length = self.settings, self.settings.temporal_patch_size
        bounds = (settings.min_pixels, settings.max_pixels)
        return fit_volume(max(num_frames, length), width, height, settings.side, length, *bounds)

    def _pieces(self, header: VideoHeader, num_slices: int, tokens_per_slice: int) -> Sequence[Piece]:
        pieces: list[Piece] = []
        for first, _ in slice_times(header, self.settings.temporal_patch_size):
            pieces += [self._start, tokens_per_slice, f"{self._end}{int(first)}"]
        return pieces
