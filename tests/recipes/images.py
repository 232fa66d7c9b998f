"""Recipes of the families that take pictures: towers, processors and chat templates in the manner of their own."""

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from tests.recipes.base import Recipe, Text, TokenId


def _mrope(hidden: int, **extra: Any) -> dict[str, Any]:
    quarter = hidden // 4 // 2  # rotary pairs of one head
    section = [quarter - 2 * (quarter * 3 // 8), quarter * 3 // 8, quarter * 3 // 8]
    return {"rope_type": "default", "mrope_section": section, "rope_theta": 10000.0} | extra


def _qwen_vision(depth: int, **extra: Any) -> dict[str, Any]:
    base = {"depth": depth, "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
    return base | {"num_heads": 2} | extra


def _qwen_token_ids(token_id: TokenId) -> dict[str, int]:
    return {
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
    }


def _qwen2_vl(text: Text, token_id: TokenId) -> PreTrainedConfig:
    return transformers.Qwen2VLConfig(
        text_config=text.config(rope_parameters=_mrope(text.hidden)),
        vision_config=_qwen_vision(2, embed_dim=32, hidden_size=text.hidden, mlp_ratio=2),
        tie_word_embeddings=True,
        **_qwen_token_ids(token_id),
    )


def _qwen2_5_vl(text: Text, token_id: TokenId) -> PreTrainedConfig:
    vision = _qwen_vision(
        2,
        hidden_size=32,
        out_hidden_size=text.hidden,
        intermediate_size=64,
        window_size=32,
        fullatt_block_indexes=[1],
        tokens_per_second=2,
    )
    return transformers.Qwen2_5_VLConfig(
        text_config=text.config(rope_parameters=_mrope(text.hidden)),
        vision_config=vision,
        tie_word_embeddings=False,
        **_qwen_token_ids(token_id),
    )


def _qwen3_vl(text: Text, token_id: TokenId) -> PreTrainedConfig:
    vision = _qwen_vision(
        3,
        hidden_size=32,
        intermediate_size=64,
        out_hidden_size=text.hidden,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
    )
    return transformers.Qwen3VLConfig(
        text_config=text.config(head_dim=text.hidden // 4, rope_parameters=_mrope(text.hidden, mrope_interleaved=True)),
        vision_config=vision,
        tie_word_embeddings=False,
        **_qwen_token_ids(token_id),
    )


def _internvl(text: Text, token_id: TokenId) -> PreTrainedConfig:
    return transformers.InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": [32, 32],
            "patch_size": [8, 8],
        },
        text_config=text.config(model_type="qwen2"),
        image_token_id=token_id("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )


def _llava(text: Text, token_id: TokenId) -> PreTrainedConfig:
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 32,
    }
    return transformers.LlavaConfig(
        vision_config=vision,
        text_config=text.config(model_type="llama", head_dim=text.hidden // 4),
        image_token_id=token_id("<image>"),
        image_seq_length=16,
    )


def _gemma3(text: Text, token_id: TokenId) -> PreTrainedConfig:
    layer_types = ["full_attention" if layer % 3 == 1 else "sliding_attention" for layer in range(text.layers)]
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 48,
        "patch_size": 8,
    }
    return transformers.Gemma3Config(
        text_config=text.config(
            head_dim=text.hidden // 4,
            sliding_window=16,
            layer_types=layer_types,
            query_pre_attn_scalar=text.hidden // 4,
        ),
        vision_config=vision,
        mm_tokens_per_image=9,
        image_token_id=token_id("<image_soft_token>"),
        boi_token_id=token_id("<start_of_image>"),
        eoi_token_id=token_id("<end_of_image>"),
    )


def _idefics3(config_class: type[PreTrainedConfig]) -> Callable[[Text, TokenId], PreTrainedConfig]:
    def build(text: Text, token_id: TokenId) -> PreTrainedConfig:
        return config_class(
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
            },
            text_config=text.config(model_type="llama", head_dim=text.hidden // 4),
            image_token_id=token_id("<image>"),
            scale_factor=2,
            pad_token_id=token_id("<|endoftext|>"),
        )

    return build


# ---- chat templates, each in the manner of its family's own

_QWEN_PARTS = """{% if message['content'] is string %}{{ message['content'] }}<|im_end|>
{% else %}{% for content in message['content'] %}\
{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}\
<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in content %}\
<|vision_start|><|video_pad|><|vision_end|>\
{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_QWEN2_TEMPLATE = (
    """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
"""
    + _QWEN_PARTS
)

_QWEN3_TEMPLATE = (
    """{% for message in messages %}<|im_start|>{{ message['role'] }}
"""
    + _QWEN_PARTS
)

_INTERNVL_TEMPLATE = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}\
{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}\
{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}\
{{'<|im_end|>\n'}}{% endfor %}\
{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"""

_LLAVA_TEMPLATE = """{% for message in messages %}\
{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}\
{% endif %}{# Render all images first #}\
{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}\
{{ '<image>\n' }}{% endfor %}{# Render all text next #}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}\
{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""

_GEMMA3_TEMPLATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""

_IDEFICS3_TEMPLATE = """{% for message in messages %}{{message['role'] | capitalize}}\
{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}\
{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}{% elif line['type'] == 'image' %}\
{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}\
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

# ---- the recipes

_QWEN_TOKENS = (
    "<|im_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_QWEN_NAMED = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
_TILE_TOKENS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
_IDEFICS3_TOKENS = ("<image>", "<fake_token_around_image>", "<global-img>", *_TILE_TOKENS)


def _qwen_images() -> BaseImageProcessor:  # 4 to 24 tokens of 16 x 16 pixels
    size = {"shortest_edge": 4 * 16 * 16, "longest_edge": 24 * 16 * 16}
    return Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, size=size)


def _internvl_images() -> BaseImageProcessor:  # 1 to 7 tiles of 4 tokens; tiling itself is switched on by the processor
    return GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, min_patches=1, max_patches=6)


def _llava_images() -> BaseImageProcessor:  # always 16 tokens
    return LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def _gemma3_images() -> BaseImageProcessor:  # always 9 tokens
    return Gemma3ImageProcessorPil(size={"height": 48, "width": 48})


def _idefics3_images() -> BaseImageProcessor:  # up to 3 x 3 tiles of 4 tokens, and the whole picture
    return Idefics3ImageProcessorPil(size={"longest_edge": 96}, max_image_size={"longest_edge": 32})


def _smolvlm_images() -> BaseImageProcessor:  # up to 4 x 4 tiles of 4 tokens, and the whole picture
    return SmolVLMImageProcessorPil(size={"longest_edge": 128}, max_image_size={"longest_edge": 32})


RECIPES: dict[str, Recipe] = {
    "qwen2_vl": Recipe(
        "Qwen2VLForConditionalGeneration",
        _qwen2_vl,
        _qwen_images,
        _QWEN2_TEMPLATE,
        _QWEN_TOKENS,
        _QWEN_NAMED,
        processor={"processor_class": "Qwen2VLProcessor"},
    ),
    "qwen2_5_vl": Recipe(
        "Qwen2_5_VLForConditionalGeneration",
        _qwen2_5_vl,
        _qwen_images,
        _QWEN2_TEMPLATE,
        _QWEN_TOKENS,
        _QWEN_NAMED,
        processor={"processor_class": "Qwen2_5_VLProcessor"},
    ),
    "qwen3_vl": Recipe(
        "Qwen3VLForConditionalGeneration",
        _qwen3_vl,
        _qwen_images,
        _QWEN3_TEMPLATE,
        _QWEN_TOKENS,
        processor={"processor_class": "Qwen3VLProcessor"},
    ),
    "internvl": Recipe(
        "InternVLForConditionalGeneration",
        _internvl,
        _internvl_images,
        _INTERNVL_TEMPLATE,
        ("<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        processor={"image_seq_length": 4, "processor_class": "InternVLProcessor"},
    ),
    "llava": Recipe(
        "LlavaForConditionalGeneration",
        _llava,
        _llava_images,
        _LLAVA_TEMPLATE,
        ("<image>",),
        eos="</s>",
        bos="<s>",
        processor={
            "patch_size": 8,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
            "image_token": "<image>",
            "processor_class": "LlavaProcessor",
        },
    ),
    "gemma3": Recipe(
        "Gemma3ForConditionalGeneration",
        _gemma3,
        _gemma3_images,
        _GEMMA3_TEMPLATE,
        ("<start_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        eos="<end_of_turn>",
        bos="<bos>",
        processor={"image_seq_length": 9, "processor_class": "Gemma3Processor"},
        embedding_scale=0.5,
    ),
    "idefics3": Recipe(
        "Idefics3ForConditionalGeneration",
        _idefics3(transformers.Idefics3Config),
        _idefics3_images,
        "<|begin_of_text|>" + _IDEFICS3_TEMPLATE,
        _IDEFICS3_TOKENS,
        eos="<end_of_utterance>",
        bos="<|begin_of_text|>",
        processor={"image_seq_len": 4, "processor_class": "Idefics3Processor"},
    ),
    "smolvlm": Recipe(
        "SmolVLMForConditionalGeneration",
        _idefics3(transformers.SmolVLMConfig),
        _smolvlm_images,
        "<|im_start|>" + _IDEFICS3_TEMPLATE,
        ("<|im_start|>", *_IDEFICS3_TOKENS),
        eos="<end_of_utterance>",
        processor={"image_seq_len": 4, "processor_class": "SmolVLMProcessor"},
    ),
}
