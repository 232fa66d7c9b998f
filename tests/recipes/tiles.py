"""Recipes of the families that cut pictures into tiles or lines, beside those of `images`."""

from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from tests.recipes.base import Recipe, Text, TokenId

_SIDE = 24  # of a tile of the LLaVAs: 3 x 3 features
_NEXT_RESOLUTIONS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
_ONEVISION_RESOLUTIONS = [[24 * rows, 24 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]


def _tower(model_type: str, side: int, **extra: Any) -> dict[str, Any]:
    base = {"model_type": model_type, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    return base | {"num_hidden_layers": 3, "image_size": side, "patch_size": 8} | extra


def _llava_next(text: Text, token_id: TokenId) -> PreTrainedConfig:
    return transformers.LlavaNextConfig(
        vision_config=_tower("clip_vision_model", _SIDE, projection_dim=32),
        text_config=text.config(model_type="mistral", head_dim=text.hidden // 4, sliding_window=None),
        image_token_id=token_id("<image>"),
        image_grid_pinpoints=_NEXT_RESOLUTIONS,
        image_seq_length=9,
    )


def _llava_onevision(text: Text, token_id: TokenId) -> PreTrainedConfig:
    return transformers.LlavaOnevisionConfig(
        vision_config=_tower("siglip_vision_model", _SIDE, vision_use_head=False),
        text_config=text.config(model_type="qwen2"),
        image_token_id=token_id("<image>"),
        video_token_id=token_id("<video>"),
        image_grid_pinpoints=_ONEVISION_RESOLUTIONS,
        vision_aspect_ratio="anyres_max_3",
    )


def _pixtral_tower(side: int) -> dict[str, Any]:
    return _tower("pixtral", side, num_hidden_layers=2, head_dim=16)


def _pixtral(text: Text, token_id: TokenId) -> PreTrainedConfig:
    return transformers.LlavaConfig(
        vision_config=_pixtral_tower(80) | {"patch_size": 16},
        text_config=text.config(model_type="mistral", head_dim=text.hidden // 4, sliding_window=None),
        image_token_id=token_id("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=1,
    )


def _mistral3(text: Text, token_id: TokenId) -> PreTrainedConfig:
    return transformers.Mistral3Config(
        vision_config=_pixtral_tower(96),
        text_config=text.config(model_type="mistral", head_dim=text.hidden // 4, sliding_window=None),
        image_token_id=token_id("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def _aya_vision(text: Text, token_id: TokenId) -> PreTrainedConfig:
    layer_types = ["full_attention" if layer % 3 == 1 else "sliding_attention" for layer in range(text.layers)]
    return transformers.AyaVisionConfig(
        vision_config=_tower("siglip_vision_model", 32, vision_use_head=False),
        text_config=text.config(
            model_type="cohere2", head_dim=text.hidden // 4, sliding_window=16, layer_types=layer_types
        ),
        image_token_id=token_id("<|IMG_PATCH|>"),
        downsample_factor=2,
    )


# ---- chat templates, each in the manner of its family's own

_LLAVA_NEXT_TEMPLATE = """{% for message in messages %}\
{% set texts = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join %}\
{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + texts + '\n<</SYS>>\n\n' }}\
{% elif message['role'] == 'user' %}{{ '[INST] ' }}\
{% for _ in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}\
{{ texts + ' [/INST]' }}{% else %}{{ ' ' + texts + eos_token }}{% endif %}{% endfor %}"""

_LLAVA_ONEVISION_TEMPLATE = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}\
{% for _ in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}\
{% for _ in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}\
{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + part['text'] }}{% endfor %}\
{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

_PIXTRAL_PARTS = """{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '[IMG]' }}\
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"""


def _instructions(system: str) -> str:
    return f"""{{{{ bos_token }}}}{{% for message in messages %}}\
{{% if message['role'] == 'assistant' %}}{_PIXTRAL_PARTS}{{{{ eos_token }}}}\
{{% elif message['role'] == 'user' %}}[INST]{_PIXTRAL_PARTS}[/INST]\
{{% else %}}{system}{{% endif %}}{{% endfor %}}"""


_PIXTRAL_TEMPLATE = _instructions(_PIXTRAL_PARTS + r"{{ '\n\n' }}")
_MISTRAL3_TEMPLATE = _instructions(f"[SYSTEM_PROMPT]{_PIXTRAL_PARTS}[/SYSTEM_PROMPT]")

_AYA_TEMPLATE = """{{ bos_token }}{% for message in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}\
{{ {'system': '<|SYSTEM_TOKEN|>', 'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}[message['role']] }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}\
{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\
{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""

_AYA_TOKENS = (
    *("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    *("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE_GLOBAL"),
    *(f"TILE_{number}" for number in range(1, 7)),
)

# ---- the recipes


def _llava_next_images() -> BaseImageProcessor:  # 9 tokens, and up to 42 of 1 to 4 tiles
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": _SIDE},
        crop_size={"height": _SIDE, "width": _SIDE},
        image_grid_pinpoints=_NEXT_RESOLUTIONS,
    )


def _llava_onevision_images() -> BaseImageProcessor:  # 9 tokens, and up to 39 of 1 to 9 tiles
    return LlavaOnevisionImageProcessorPil(
        size={"height": _SIDE, "width": _SIDE}, image_grid_pinpoints=_ONEVISION_RESOLUTIONS
    )


def _pixtral_images() -> BaseImageProcessor:  # 1 to 25 tokens of 16 x 16 pixels
    return PixtralImageProcessorPil(size={"longest_edge": 80}, patch_size={"height": 16, "width": 16})


def _mistral3_images() -> BaseImageProcessor:  # 1 to 36 tokens of 2 x 2 patches of 8 x 8 pixels
    return PixtralImageProcessorPil(size={"longest_edge": 96}, patch_size={"height": 8, "width": 8})


def _aya_vision_images() -> BaseImageProcessor:  # 1 to 7 tiles of 4 tokens
    return GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, min_patches=1, max_patches=6)


RECIPES: dict[str, Recipe] = {
    "llava_next": Recipe(
        "LlavaNextForConditionalGeneration",
        _llava_next,
        _llava_next_images,
        _LLAVA_NEXT_TEMPLATE,
        ("<image>",),
        eos="</s>",
        bos="<s>",
        processor={
            "patch_size": 8,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
            "image_token": "<image>",
            "processor_class": "LlavaNextProcessor",
        },
    ),
    "llava_onevision": Recipe(
        "LlavaOnevisionForConditionalGeneration",
        _llava_onevision,
        _llava_onevision_images,
        _LLAVA_ONEVISION_TEMPLATE,
        ("<|im_start|>", "<image>", "<video>"),
        {"image_token": "<image>", "video_token": "<video>"},
        processor={
            "num_image_tokens": 9,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_3",
            "processor_class": "LlavaOnevisionProcessor",
        },
    ),
    "pixtral": Recipe(
        "LlavaForConditionalGeneration",
        _pixtral,
        _pixtral_images,
        _PIXTRAL_TEMPLATE,
        ("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        eos="</s>",
        bos="<s>",
        processor={"patch_size": 16, "processor_class": "PixtralProcessor"},
    ),
    "mistral3": Recipe(
        "Mistral3ForConditionalGeneration",
        _mistral3,
        _mistral3_images,
        _MISTRAL3_TEMPLATE,
        ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
        eos="</s>",
        bos="<s>",
        processor={"patch_size": 8, "spatial_merge_size": 2, "processor_class": "PixtralProcessor"},
    ),
    "aya_vision": Recipe(
        "AyaVisionForConditionalGeneration",
        _aya_vision,
        _aya_vision_images,
        _AYA_TEMPLATE,
        _AYA_TOKENS,
        eos="<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
        processor={"patch_size": 8, "img_size": 32, "downsample_factor": 2, "processor_class": "AyaVisionProcessor"},
        embedding_scale=0.5,
    ),
}
