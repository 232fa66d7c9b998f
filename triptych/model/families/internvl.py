"""InternVL: a picture becomes a grid of square tiles of the closest aspect ratio, and a thumbnail of the whole."""

from collections.abc import Sequence

from transformers.image_processing_utils import BaseImageProcessor

from triptych.errors import ConfigError
from triptych.model.families.base import Family, ItemLayout, Modality, Parts, edge, require_equal, square
from triptych.model.families.internvl_video import InternVLVideo
from triptych.model.families.tiles import ClosestGrid
from triptych.model.headers import ImageHeader


class InternVL(Family):
    model_types = ("internvl",)

    def modalities(self, parts: Parts) -> Sequence[Modality]:
        processor, tokenizer, vision = parts.image_processor, parts.tokenizer, self.config.vision_config
        side = square(vision.image_size)
        require_equal("tile height", edge(processor.size, "height"), side)
        require_equal("tile width", edge(processor.size, "width"), side)
        tokens_per_tile = int((side // square(vision.patch_size) * self.config.downsample_ratio) ** 2)
        require_equal("image_seq_length", parts.arguments.get("image_seq_length", tokens_per_tile), tokens_per_tile)
        start = getattr(tokenizer, "start_image_token", None)
        end = getattr(tokenizer, "end_image_token", None)
        if start is None or end is None:
            raise ConfigError("the tokenizer names no start_image_token and end_image_token")
        picture = _OneRun(
            processor,
            parts.token(self.config.image_token_id),
            start=start,
            end=end,
            side=side,
            tokens_per_tile=tokens_per_tile,
        )
        placeholder = getattr(tokenizer, "video_token", None)
        if placeholder is None:
            return [picture]
        texts = {"placeholder": placeholder, "start": start, "end": end}
        return [picture, InternVLVideo.read(parts, picture.token, side=side, tokens_per_frame=tokens_per_tile, **texts)]


class _OneRun(ClosestGrid):
    def __init__(
        self, processor: BaseImageProcessor, token: str, *, start: str, end: str, side: int, tokens_per_tile: int
    ) -> None:
        super().__init__(processor, token, side=side, tokens_per_tile=tokens_per_tile)
        self._start, self._end = start, end

    def _lay_out(self, header: ImageHeader, num_items: int) -> ItemLayout:
        tiles = [self._tokens_per_tile] * self._num_tiles(header.width, header.height)
        return self.item([self._start, sum(tiles), self._end], tiles)
