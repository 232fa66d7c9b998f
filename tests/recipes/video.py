"""Recipes of the families that are here for their videos, and hardly differ from others in what they do to pictures."""

import transformers
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil

from tests.recipes import images
from tests.recipes.base import Recipe, Text, TokenId


def _qwen3_vl_moe(text: Text, token_id: TokenId) -> PreTrainedConfig:
    dense = images.RECIPES["qwen3_vl"].config(text, token_id)
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": text.hidden,
        "decoder_sparse_step": 1,
    }
    vision = {name: value for name, value in dense.vision_config.to_dict().items() if name != "model_type"}
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return transformers.Qwen3VLMoeConfig(
        text_config=text.config(
            head_dim=text.hidden // 4, rope_parameters=dense.text_config.rope_parameters, **experts
        ),
        vision_config=vision,
        tie_word_embeddings=False,
        **{name: getattr(dense, name) for name in tokens},
    )


def _glm4v(text: Text, token_id: TokenId) -> PreTrainedConfig:
    pairs = text.hidden // 4 // 2  # rotary pairs of one head
    section = [pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8]
    rope = {"rope_type": "default", "mrope_section": section, "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": text.hidden,
        "num_heads": 2,
        "image_size": 64,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return transformers.Glm4vConfig(
        text_config=text.config(rope_parameters=rope),
        vision_config=vision,
        tie_word_embeddings=False,
        image_token_id=token_id("<|image|>"),
        video_token_id=token_id("<|video|>"),
        image_start_token_id=token_id("<|begin_of_image|>"),
        image_end_token_id=token_id("<|end_of_image|>"),
        video_start_token_id=token_id("<|begin_of_video|>"),
        video_end_token_id=token_id("<|end_of_video|>"),
    )


def _glm4v_images() -> BaseImageProcessor:  # 4 to 24 tokens of 16 x 16 pixels; every picture counts as two frames
    size = {"shortest_edge": 2 * 4 * 16 * 16, "longest_edge": 2 * 24 * 16 * 16}
    return Glm4vImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, size=size)


_GLM4V_TEMPLATE = """[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}\
{% if content['type'] == 'image' or 'image' in content %}<|begin_of_image|><|image|><|end_of_image|>\
{% elif content['type'] == 'video' or 'video' in content %}<|begin_of_video|><|video|><|end_of_video|>\
{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<|assistant|>
{% endif %}"""

_GLM4V_TOKENS = (
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|assistant|>",
    "<|begin_of_image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|end_of_video|>",
    "<|image|>",
    "<|video|>",
)

RECIPES: dict[str, Recipe] = {
    "qwen3_vl_moe": Recipe(
        "Qwen3VLMoeForConditionalGeneration",
        _qwen3_vl_moe,
        images.RECIPES["qwen3_vl"].image_processor,
        images.RECIPES["qwen3_vl"].chat_template,
        images.RECIPES["qwen3_vl"].special_tokens,
        processor={"processor_class": "Qwen3VLProcessor"},
    ),
    "glm4v": Recipe(
        "Glm4vForConditionalGeneration",
        _glm4v,
        _glm4v_images,
        _GLM4V_TEMPLATE,
        _GLM4V_TOKENS,
        eos="<|user|>",
        processor={"processor_class": "Glm4vProcessor"},
    ),
}
