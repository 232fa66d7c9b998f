"""Idefics3 and SmolVLM: rows and columns of square tiles, each behind its own tag, and the whole picture at the end."""

import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from triptych.errors import ConfigError
from triptych.model.families.base import Family, ImageLayout, ItemLayout, Piece, UnitLayout, edge, require_equal, square

_FRAME = "<fake_token_around_image>"
_WHOLE = "<global-img>"
_LARGEST_SIDE = 4096  # of a resized picture, whatever the checkpoint asks for


class Idefics3(Family):
    model_types = ("idefics3", "smolvlm")
    tensors = ("pixel_values", "pixel_attention_mask")

    def image_layout(
        self, image_processor: BaseImageProcessor, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]
    ) -> ImageLayout:
        vision = self.config.vision_config
        tile = edge(image_processor.max_image_size, "longest_edge")
        longest = edge(image_processor.size, "longest_edge")
        if tile is None or longest is None or not image_processor.do_resize:
            raise ConfigError("the image processor must resize, with a size and a max_image_size of longest_edge")
        require_equal("tile side", tile, square(vision.image_size))
        patches = (square(vision.image_size) // square(vision.patch_size)) ** 2
        tokens_per_tile = int(patches / self.config.scale_factor**2)
        require_equal("image_seq_len", arguments.get("image_seq_len", tokens_per_tile), tokens_per_tile)
        return _TaggedTiles(
            self._token(tokenizer, self.image_token_id),
            frame=getattr(tokenizer, "fake_image_token", _FRAME),
            whole=getattr(tokenizer, "global_image_token", _WHOLE),
            tokens_per_tile=tokens_per_tile,
            tile=tile,
            longest=longest,
            splits=bool(image_processor.do_image_splitting),
        )


class _TaggedTiles(ImageLayout):
    def __init__(
        self, image_token: str, *, frame: str, whole: str, tokens_per_tile: int, tile: int, longest: int, splits: bool
    ) -> None:
        super().__init__(image_token)
        self._frame, self._whole = frame, whole
        self._tokens_per_tile, self._tile, self._longest, self._splits = tokens_per_tile, tile, longest, splits

    def _lay_out(self, width: int, height: int) -> ItemLayout:
        rows, columns = self._grid(width, height)
        pieces: list[Piece] = []
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                pieces += [f"{self._frame}<row_{row}_col_{column}>", self._tokens_per_tile]
            pieces.append("\n")
        if pieces:
            pieces.append("\n")
        pieces += [f"{self._frame}{self._whole}", self._tokens_per_tile, self._frame]
        unit = UnitLayout((rows * columns + 1) * self._tokens_per_tile)
        return ItemLayout.of(self.image_token, pieces, (unit,))

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
