"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: any resolution, one token for each square of merged patches."""

from collections.abc import Sequence
from typing import ClassVar

from transformers.image_processing_utils import BaseImageProcessor

from triptych.errors import ConfigError
from triptych.model.families.base import Family, ImageModality, ItemLayout, Modality, Parts, edge, require_equal
from triptych.model.families.patch_grids import fit_area
from triptych.model.families.qwen_video import Qwen2Video, Qwen3Video, Qwen25Video
from triptych.model.families.video import video_token
from triptych.model.headers import ImageHeader

_VIDEOS: dict[str, type[Qwen2Video]] = {"qwen2_vl": Qwen2Video, "qwen2_5_vl": Qwen25Video}


class QwenVL(Family):
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")

    def modalities(self, parts: Parts) -> Sequence[Modality]:
        processor, vision = parts.image_processor, self.config.vision_config
        require_equal("patch_size", processor.patch_size, vision.patch_size)
        require_equal("merge_size", processor.merge_size, vision.spatial_merge_size)
        min_pixels = edge(processor.size, "shortest_edge")
        max_pixels = edge(processor.size, "longest_edge")
        if min_pixels is None or max_pixels is None or not processor.do_resize:
            raise ConfigError(
                "the image processor must resize, with a size of shortest_edge and longest_edge in pixels"
            )
        start, end = parts.token(self.config.vision_start_token_id), parts.token(self.config.vision_end_token_id)
        picture = _Patches(
            processor,
            parts.token(self.config.image_token_id),
            start=start,
            end=end,
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        )
        token = video_token(self.config, parts.tokenizer)
        if token is None:
            return [picture]
        return [picture, self.video_class.read(parts, vision, token, start=start, end=end)]

    @property
    def video_class(self) -> type[Qwen2Video | Qwen3Video]:
        return _VIDEOS.get(self.config.model_type, Qwen3Video)


class _Patches(ImageModality):
    tensors: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")

    def __init__(
        self,
        processor: BaseImageProcessor,
        token: str,
        *,
        start: str,
        end: str,
        patch_size: int,
        merge_size: int,
        min_pixels: int,
        max_pixels: int,
    ) -> None:
        super().__init__(processor, token, markup=f"{start}{token}{end}")
        self._patch_size, self._merge_size = patch_size, merge_size
        self._min_pixels, self._max_pixels = min_pixels, max_pixels

    def _lay_out(self, header: ImageHeader, num_items: int) -> ItemLayout:
        side = self._patch_size * self._merge_size
        rows, columns = fit_area(header.width, header.height, side, self._min_pixels, self._max_pixels)
        grid = (1, rows * self._merge_size, columns * self._merge_size)  # in patches
        return self.item([rows * columns], [rows * columns], positions={"image_grid_thw": grid})
