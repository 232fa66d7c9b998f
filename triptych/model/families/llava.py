"""LLaVA 1.5: every picture is cropped to the same square and becomes the same number of tokens."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from triptych.errors import ConfigError
from triptych.model.families.base import Family, ImageLayout, ItemLayout, UnitLayout, edge, require_equal, square

_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # features of a tower that are no patch


class Llava(Family):
    model_types = ("llava",)

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        tower = config.vision_config.model_type
        if tower not in _CLASS_TOKENS:
            raise ConfigError(f"llava with a vision tower of type {tower} is not supported: its layout is another one")

    def image_layout(
        self, image_processor: BaseImageProcessor, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]
    ) -> ImageLayout:
        vision = self.config.vision_config
        side, patch_size = square(vision.image_size), square(vision.patch_size)
        pixels = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
        require_equal("picture height", edge(pixels, "height"), side)
        require_equal("picture width", edge(pixels, "width"), side)
        class_tokens = _CLASS_TOKENS[vision.model_type]
        strategy = self.config.vision_feature_select_strategy
        require_equal("patch_size", arguments.get("patch_size") or patch_size, patch_size)
        require_equal(
            "num_additional_image_tokens", arguments.get("num_additional_image_tokens", class_tokens), class_tokens
        )
        require_equal(
            "vision_feature_select_strategy", arguments.get("vision_feature_select_strategy") or strategy, strategy
        )
        num_tokens = (side // patch_size) ** 2 + class_tokens - (strategy == "default")
        return _OneSquare(self._token(tokenizer, self.image_token_id), num_tokens)


class _OneSquare(ImageLayout):
    def __init__(self, image_token: str, num_tokens: int) -> None:
        super().__init__(image_token)
        self._layout = ItemLayout.of(image_token, [num_tokens], (UnitLayout(num_tokens),))

    def _lay_out(self, width: int, height: int) -> ItemLayout:
        return self._layout
