"""LLaVA 1.5: every picture is cropped to the same square and becomes the same number of tokens."""

from collections.abc import Sequence

from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from triptych.errors import ConfigError
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

_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # features of a tower that are no patch


class Llava(Family):
    model_types = ("llava",)

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        refuse_other_towers(config)

    def modalities(self, parts: Parts) -> Sequence[Modality]:
        processor, side = parts.image_processor, square(self.config.vision_config.image_size)
        pixels = processor.crop_size if processor.do_center_crop else processor.size
        require_equal("picture height", edge(pixels, "height"), side)
        require_equal("picture width", edge(pixels, "width"), side)
        return [_OneSquare(processor, parts.token(self.config.image_token_id), rows_of_square(self.config, parts))]


def refuse_other_towers(config: PreTrainedConfig) -> None:
    """Raises ConfigError for a tower that might make another number of features of a square."""
    tower = config.vision_config.model_type
    if tower not in _CLASS_TOKENS:
        raise ConfigError(
            f"{config.model_type} with a vision tower of type {tower} is not supported: its layout is another one"
        )


def rows_of_square(config: PreTrainedConfig, parts: Parts) -> int:
    """How many features the tower's square becomes. Raises ConfigError where the processor counts others."""
    vision, arguments = config.vision_config, parts.arguments
    patch_size, strategy = square(vision.patch_size), config.vision_feature_select_strategy
    class_tokens = _CLASS_TOKENS[vision.model_type]
    require_equal("patch_size", arguments.get("patch_size") or patch_size, patch_size)
    require_equal(
        "num_additional_image_tokens", arguments.get("num_additional_image_tokens", class_tokens), class_tokens
    )
    require_equal(
        "vision_feature_select_strategy", arguments.get("vision_feature_select_strategy") or strategy, strategy
    )
    without_class: bool = strategy == "default"
    return (square(vision.image_size) // patch_size) ** 2 + class_tokens - without_class


class _OneSquare(ImageModality):
    def __init__(self, processor: BaseImageProcessor, token: str, num_tokens: int) -> None:
        super().__init__(processor, token)
        self._layout = self.item([num_tokens], [num_tokens])

    def _lay_out(self, header: ImageHeader, num_items: int) -> ItemLayout:
        return self._layout
