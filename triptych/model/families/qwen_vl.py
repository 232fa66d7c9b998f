"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: any resolution, one token for each square of merged patches."""

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from triptych.errors import ConfigError
from triptych.model.families.base import Family, ImageLayout, ItemLayout, UnitLayout, edge, require_equal


class QwenVL(Family):
    model_types = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    tensors = ("pixel_values", "image_grid_thw")

    def image_layout(
        self, image_processor: BaseImageProcessor, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]
    ) -> ImageLayout:
        vision = self.config.vision_config
        require_equal("patch_size", image_processor.patch_size, vision.patch_size)
        require_equal("merge_size", image_processor.merge_size, vision.spatial_merge_size)
        min_pixels = edge(image_processor.size, "shortest_edge")
        max_pixels = edge(image_processor.size, "longest_edge")
        if min_pixels is None or max_pixels is None or not image_processor.do_resize:
            raise ConfigError(
                "the image processor must resize, with a size of shortest_edge and longest_edge in pixels"
            )
        return _Patches(
            self._token(tokenizer, self.image_token_id),
            start=self._token(tokenizer, self.config.vision_start_token_id),
            end=self._token(tokenizer, self.config.vision_end_token_id),
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
        )


class _Patches(ImageLayout):
    def __init__(
        self,
        image_token: str,
        *,
        start: str,
        end: str,
        patch_size: int,
        merge_size: int,
        min_pixels: int,
        max_pixels: int,
    ) -> None:
        super().__init__(image_token, markup=f"{start}{image_token}{end}")
        self._patch_size, self._merge_size = patch_size, merge_size
        self._min_pixels, self._max_pixels = min_pixels, max_pixels

    def _lay_out(self, width: int, height: int) -> ItemLayout:
        rows, columns = self._merged_patches(width, height)
        unit = UnitLayout(rows * columns, (1, rows * self._merge_size, columns * self._merge_size))
        return ItemLayout.of(self.image_token, [unit.num_tokens], (unit,))

    def _merged_patches(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns): sides rounded to whole merged patches, then scaled if the area leaves its bounds."""
        side = self._patch_size * self._merge_size
        rows, columns = round(height / side), round(width / side)
        area = rows * side * columns * side
        if area > self._max_pixels:
            shrink = math.sqrt(height * width / self._max_pixels)
            rows = max(1, math.floor(height / shrink / side))
            columns = max(1, math.floor(width / shrink / side))
        elif area < self._min_pixels:
            grow = math.sqrt(self._min_pixels / (height * width))
            rows, columns = math.ceil(height * grow / side), math.ceil(width * grow / side)
        return rows, columns
