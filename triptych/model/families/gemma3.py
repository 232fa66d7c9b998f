"""Gemma 3: every picture is resized to the same square; its tokens attend to each other in both directions."""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from triptych.model.families.base import Family, ImageLayout, ItemLayout, Piece, UnitLayout, edge, require_equal, square


class Gemma3(Family):
    model_types = ("gemma3",)
    image_groups = True
    # The processor's default wins over what the checkpoint says.
    image_arguments: ClassVar[Mapping[str, object]] = {"do_pan_and_scan": False}

    def image_layout(
        self, image_processor: BaseImageProcessor, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]
    ) -> ImageLayout:
        side = square(self.config.vision_config.image_size)
        require_equal("picture height", edge(image_processor.size, "height"), side)
        require_equal("picture width", edge(image_processor.size, "width"), side)
        num_tokens = self.config.mm_tokens_per_image
        require_equal("image_seq_length", arguments.get("image_seq_length", num_tokens), num_tokens)
        return _Framed(
            self._token(tokenizer, self.image_token_id),
            start=self._token(tokenizer, self.config.boi_token_id),
            end=self._token(tokenizer, self.config.eoi_token_id),
            num_tokens=num_tokens,
        )


class _Framed(ImageLayout):
    def __init__(self, image_token: str, *, start: str, end: str, num_tokens: int) -> None:
        super().__init__(image_token, placeholder=start)
        pieces: list[Piece] = [f"\n\n{start}", num_tokens, f"{end}\n\n"]
        self._layout = ItemLayout.of(image_token, pieces, (UnitLayout(num_tokens),))

    def _lay_out(self, width: int, height: int) -> ItemLayout:
        return self._layout
