"""What a recipe for a tiny random checkpoint is made of."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.image_processing_utils import BaseImageProcessor


@dataclass(frozen=True)
class Text:
    """Sizes and tokens of the language model that every family gets."""

    layers: int
    hidden: int
    vocab_size: int
    tokens: dict[str, int | None]

    def config(self, **extra: Any) -> dict[str, Any]:
        base = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
        }
        return base | self.tokens | extra


@dataclass(frozen=True)
class Recipe:
    """How one family's checkpoint is made."""

    model_class: str
    config: Callable[[Text, Callable[[str], int]], PreTrainedConfig]
    image_processor: Callable[[], BaseImageProcessor] | None
    chat_template: str
    special_tokens: tuple[str, ...]
    named_tokens: dict[str, str] = field(default_factory=dict)  # attributes of the tokenizer, e.g. image_token
    eos: str = "<|im_end|>"
    bos: str | None = None  # written before every prompt by the tokenizer itself
    processor: dict[str, Any] = field(default_factory=dict)  # processor_config.json
    embedding_scale: float = 1.0  # less where tied embeddings would make every token predict itself
    feature_extractor: Callable[[], FeatureExtractionMixin] | None = None  # of audio


TokenId = Callable[[str], int]
