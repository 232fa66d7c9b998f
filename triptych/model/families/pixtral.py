"""Pixtral and Mistral 3: any resolution, one token for each square of merged patches, a text token behind each line."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from triptych.errors import ConfigError, RequestError
from triptych.model.families.base import (
    Family,
    ImageModality,
    ItemLayout,
    Modality,
    Parts,
    Piece,
    Tensors,
    edge,
    require_equal,
)
from triptych.model.headers import ImageHeader


class Pixtral(Family):
    model_types = ("llava/pixtral", "mistral3")

    def modalities(self, parts: Parts) -> Sequence[Modality]:
        processor, arguments = parts.image_processor, parts.arguments
        patch_size, merge_size = self.config.vision_config.patch_size, getattr(self.config, "spatial_merge_size", 1)
        require_equal("patch_size", arguments.get("patch_size", 16), patch_size)
        require_equal("spatial_merge_size", arguments.get("spatial_merge_size", 1), merge_size)
        strategy = getattr(self.config, "vision_feature_select_strategy", "full")
        require_equal("vision_feature_select_strategy", "full", strategy)
        token = parts.token(self.config.image_token_id)
        require_equal("image_token", arguments.get("image_token", "[IMG]"), token)
        # What the family's processor says at every call.
        processor.patch_size = {"height": patch_size * merge_size, "width": patch_size * merge_size}
        picture = _BrokenLines(
            processor,
            token,
            line_end=arguments.get("image_break_token", "[IMG_BREAK]"),
            end=arguments.get("image_end_token", "[IMG_END]"),
            side=patch_size * merge_size,
        )
        return [picture]


class _BrokenLines(ImageModality):
    tensors: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")

    def __init__(self, processor: BaseImageProcessor, token: str, *, line_end: str, end: str, side: int) -> None:
        super().__init__(processor, token)
        self._line_end, self._end, self._side = line_end, end, side
        self._max_height, self._max_width = _most_pixels(processor)

    def _lay_out(self, header: ImageHeader, num_items: int) -> ItemLayout:
        rows, columns = self._merged_patches(header.width, header.height)
        pieces: list[Piece] = [columns, self._line_end] * rows
        return self.item([*pieces[:-1], self._end], [rows * columns])

    def _merged_patches(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) that hold the picture, scaled down if it is too large; never up."""
        ratio = max(height / self._max_height, width / self._max_width)
        if ratio > 1:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        if height == 0 or width == 0:
            raise RequestError(
                "a picture is too narrow: nothing of it is left in this model's size", code="invalid_image"
            )
        return -(-height // self._side), -(-width // self._side)

    def features(self, model: PreTrainedModel, inputs: Tensors) -> Tensor:
        # One by one: the tower joins pictures to one axis, with a mask over all pairs of their patches.
        pictures = zip(*(torch.split(tensor, 1) for tensor in inputs.values()), strict=True)
        return torch.cat([self._features_of_one(model, dict(zip(inputs, each, strict=True))) for each in pictures])

    def _features_of_one(self, model: PreTrainedModel, inputs: Tensors) -> Tensor:
        if inputs["pixel_values"].shape[-2:] != (self._side, self._side):
            return super().features(model, inputs)
        # transformers (5.23) drops the axis of rows where there is one row only, and then cannot split them.
        return super().features(model, {name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()})[:1]


def _most_pixels(processor: Any) -> tuple[int, int]:
    """(height, width) that no picture exceeds. Raises ConfigError where there is none."""
    longest = edge(processor.size, "longest_edge")
    height, width = longest or edge(processor.size, "height"), longest or edge(processor.size, "width")
    if height is None or width is None or not processor.do_resize:
        raise ConfigError("the image processor must resize, with a size of longest_edge or of height and width")
    return height, width
