"""Gemma 3: every picture is resized to the same square; its tokens attend to each other in both directions."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from transformers.image_processing_utils import BaseImageProcessor

from triptych.model.families.base import (
    Family,
    ImageModality,
    ItemLayout,
    Modality,
    Parts,
    edge,
    require_equal,
    square,
)
from triptych.model.headers import ImageHeader


class Gemma3(Family):
    model_types = ("gemma3",)
    image_groups = True

    def modalities(self, parts: Parts) -> Sequence[Modality]:
        processor = parts.image_processor
        side = square(self.config.vision_config.image_size)
        require_equal("picture height", edge(processor.size, "height"), side)
        require_equal("picture width", edge(processor.size, "width"), side)
        num_tokens = self.config.mm_tokens_per_image
        require_equal("image_seq_length", parts.arguments.get("image_seq_length", num_tokens), num_tokens)
        picture = _Framed(
            processor,
            parts.token(self.config.image_token_id),
            start=parts.token(self.config.boi_token_id),
            end=parts.token(self.config.eoi_token_id),
            num_tokens=num_tokens,
        )
        return [picture]


class _Framed(ImageModality):
    # The family's processor passes this on, whatever the checkpoint says.
    options: ClassVar[Mapping[str, object]] = {"do_pan_and_scan": False}

    def __init__(self, processor: BaseImageProcessor, token: str, *, start: str, end: str, num_tokens: int) -> None:
        super().__init__(processor, token, placeholder=start)
        self._layout = self.item([f"\n\n{start}", num_tokens, f"{end}\n\n"], [num_tokens])

    def _lay_out(self, header: ImageHeader, num_items: int) -> ItemLayout:
        return self._layout
