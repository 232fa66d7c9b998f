"""Aya Vision: tiles and thumbnail as InternVL makes them, each behind its own name."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.image_processing_utils import BaseImageProcessor

from triptych.model.families.base import Family, ItemLayout, Modality, Parts, Piece, edge, require_equal, square
from triptych.model.families.tiles import ClosestGrid
from triptych.model.headers import ImageHeader


class AyaVision(Family):
    model_types = ("aya_vision",)

    def modalities(self, parts: Parts) -> Sequence[Modality]:
        processor, arguments, vision = parts.image_processor, parts.arguments, self.config.vision_config
        side = square(vision.image_size)
        require_equal("tile height", edge(processor.size, "height"), side)
        require_equal("tile width", edge(processor.size, "width"), side)
        require_equal("img_size", arguments.get("img_size", 364), side)
        patch = square(vision.patch_size) * self.config.downsample_factor
        written = arguments.get("patch_size", 28) * arguments.get("downsample_factor", 1)
        require_equal("patch_size times downsample_factor", written, patch)
        require_equal("vision_feature_select_strategy", "full", self.config.vision_feature_select_strategy)
        token = parts.token(self.config.image_token_id)
        require_equal("img_patch_token", arguments.get("img_patch_token", "<|IMG_PATCH|>"), token)
        return [_Named(processor, token, arguments, side, (side // patch) ** 2)]


class _Named(ClosestGrid):
    def __init__(
        self,
        processor: BaseImageProcessor,
        token: str,
        arguments: Mapping[str, Any],
        side: int,
        tokens_per_tile: int,
    ) -> None:
        placeholder = arguments.get("image_token", "<image>")
        super().__init__(processor, token, side=side, tokens_per_tile=tokens_per_tile, placeholder=placeholder)
        self._start = arguments.get("start_of_img_token", "<|START_OF_IMG|>")
        self._end = arguments.get("end_of_img_token", "<|END_OF_IMG|>")
        self._tile = arguments.get("tile_token", "TILE")
        self._whole = arguments.get("tile_global_token", "TILE_GLOBAL")

    def _lay_out(self, header: ImageHeader, num_items: int) -> ItemLayout:
        num_tiles = self._num_tiles(header.width, header.height)
        pieces: list[Piece] = [self._start]
        for number in range(1, num_tiles):
            pieces += [f"{self._tile}_{number}", self._tokens_per_tile]
        pieces += [self._whole, self._tokens_per_tile, self._end]
        return self.item(pieces, [self._tokens_per_tile] * num_tiles)
