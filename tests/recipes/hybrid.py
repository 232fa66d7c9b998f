"""Recipes of families whose text model mixes linear attention and full attention."""

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedConfig

from tests.recipes.base import Recipe, Text, TokenId
from tests.recipes.images import RECIPES as IMAGES

_LIKE = IMAGES["qwen3_vl"]  # whose pictures, template and tokens these families share


def _qwen3_5(config_class: type[PreTrainedConfig], **extra: Any) -> Callable[[Text, TokenId], PreTrainedConfig]:
    def build(text: Text, token_id: TokenId) -> PreTrainedConfig:
        names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
        return config_class(
            text_config=_text(text) | extra,
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "patch_size": 8,
                "out_hidden_size": text.hidden,
                "num_position_embeddings": 64,
            },
            tie_word_embeddings=False,
            **{f"{name}_token_id": token_id(f"<|{token}|>") for name, token in names.items()},
        )

    return build


def _text(text: Text) -> dict[str, Any]:
    """Every second layer attends. Heads of the others have uneven sizes, so that no state fills whole pages."""
    head_dim = text.hidden // 4
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_interleaved": True,
        "mrope_section": [head_dim // 4 - 2, 1, 1],
    }
    return text.config(
        head_dim=head_dim,
        layer_types=["full_attention" if layer % 2 else "linear_attention" for layer in range(text.layers)],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=12,
        linear_value_head_dim=10,
        rope_parameters=rope,
    )


def _recipe(model_class: str, config: Callable[[Text, TokenId], PreTrainedConfig]) -> Recipe:
    return Recipe(
        model_class,
        config,
        _LIKE.image_processor,
        _LIKE.chat_template,
        _LIKE.special_tokens,
        processor=_LIKE.processor,
    )


RECIPES: dict[str, Recipe] = {
    "qwen3_5": _recipe("Qwen3_5ForConditionalGeneration", _qwen3_5(transformers.Qwen3_5Config)),
    "qwen3_5_moe": _recipe(
        "Qwen3_5MoeForConditionalGeneration",
        _qwen3_5(
            transformers.Qwen3_5MoeConfig,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
        ),
    ),
}
