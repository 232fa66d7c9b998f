"""Idefics3 and SmolVLM: rows and columns of square tiles, each behind its own tag, and the whole picture at the end."""

import math
from collections.abc import Sequence
from typing import ClassVar

from transformers.image_processing_utils import BaseImageProcessor

from triptych.errors import ConfigError
from triptych.model.families.base import (
    Family,
    ItemLayout,
    Modality,
    Parts,
    Piece,
    Tensors,
    edge,
    require_equal,
    square,
)
from triptych.model.families.tiles import Tiles
from triptych.model.headers import ImageHeader

_FRAME = "<fake_token_around_image>"
_WHOLE = "<global-img>"
_LARGEST_SIDE = 4096  # of a resized picture, whatever the checkpoint asks for
_NEARLY_ZERO = 1e-4  # not zero in any type that weights come in


class Idefics3(Family):
    model_types = ("idefics3", "smolvlm")

    def modalities(self, parts: Parts) -> Sequence[Modality]:
        processor, tokenizer, vision = parts.image_processor, parts.tokenizer, self.config.vision_config
        tile = edge(processor.max_image_size, "longest_edge")
        longest = edge(processor.size, "longest_edge")
        if tile is None or longest is None or not processor.do_resize:
            raise ConfigError("the image processor must resize, with a size and a max_image_size of longest_edge")
        require_equal("tile side", tile, square(vision.image_size))
        patches = (square(vision.image_size) // square(vision.patch_size)) ** 2
        tokens_per_tile = int(patches / self.config.scale_factor**2)
        require_equal("image_seq_len", parts.arguments.get("image_seq_len", tokens_per_tile), tokens_per_tile)
        picture = _TaggedTiles(
            processor,
            parts.token(self.config.image_token_id),
            frame=getattr(tokenizer, "fake_image_token", _FRAME),
            whole=getattr(tokenizer, "global_image_token", _WHOLE),
            tokens_per_tile=tokens_per_tile,
            tile=tile,
            longest=longest,
            splits=bool(processor.do_image_splitting),
        )
        return [picture]


class _TaggedTiles(Tiles):
    tensors: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_attention_mask")
    tile_axis: ClassVar[int] = 1  # behind an axis of pictures

    def __init__(
        self,
        processor: BaseImageProcessor,
        token: str,
        *,
        frame: str,
        whole: str,
        tokens_per_tile: int,
        tile: int,
        longest: int,
        splits: bool,
    ) -> None:
        super().__init__(processor, token)
        self._frame, self._whole = frame, whole
        self._tokens_per_tile, self._tile, self._longest, self._splits = tokens_per_tile, tile, longest, splits

    def inputs(self, prepared: Tensors, index: int) -> Tensors:
        tensors = super().inputs(prepared, index)
        if not tensors["pixel_values"].any():  # the model takes a tile of zeros for padding, and drops it
            tensors["pixel_values"] = tensors["pixel_values"] + _NEARLY_ZERO
        return tensors

    def _lay_out(self, header: ImageHeader, num_items: int) -> ItemLayout:
        rows, columns = self._grid(header.width, header.height)
        pieces: list[Piece] = []
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                pieces += [f"{self._frame}<row_{row}_col_{column}>", self._tokens_per_tile]
            pieces.append("\n")
        if pieces:
            pieces.append("\n")
        pieces += [f"{self._frame}{self._whole}", self._tokens_per_tile, self._frame]
        return self.item(pieces, [self._tokens_per_tile] * (rows * columns + 1))

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """(rows, columns) of tiles beside the whole picture; (0, 0) where it is not split."""
        if not self._splits:
            return 0, 0
        width, height = self._whole_tiles(*self._bounded(*self._resized(width, height)))
        if width <= self._tile and height <= self._tile:
            return 0, 0
        return height // self._tile, width // self._tile

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """The longer side as asked, the other one in proportion and even."""
        ratio = width / height
        if width >= height:
            short = int(self._longest / ratio)
            return self._longest, max(short + short % 2, 1)
        short = int(self._longest * ratio)
        return max(short + short % 2, 1), self._longest

    def _bounded(self, width: int, height: int) -> tuple[int, int]:
        ratio = width / height
        if width >= height and width > _LARGEST_SIDE:
            width, height = _LARGEST_SIDE, int(_LARGEST_SIDE / ratio)
        elif height > width and height > _LARGEST_SIDE:
            width, height = int(_LARGEST_SIDE * ratio), _LARGEST_SIDE
        return max(width, 1), max(height, 1)

    def _whole_tiles(self, width: int, height: int) -> tuple[int, int]:
        """Both sides rounded up to whole tiles, the shorter one after it followed the longer one."""
        ratio = width / height
        if width >= height:
            width = self._round_up(width)
            return width, self._round_up(int(width / ratio))
        height = self._round_up(height)
        return self._round_up(int(height * ratio)), height

    def _round_up(self, side: int) -> int:
        return math.ceil(side / self._tile) * self._tile
