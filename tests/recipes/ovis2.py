"""The recipe of Ovis2, whose pictures stand between indicator tokens."""

import transformers
from transformers import PreTrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil

from tests.recipes.base import Recipe, Text, TokenId

_INDICATORS = ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")

_TEMPLATE = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}\
{% if content['type'] == 'image' %}{{ '<image>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}\
{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}{% endfor %}\
{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"""


def _ovis2(text: Text, token_id: TokenId) -> PreTrainedConfig:
    return transformers.Ovis2Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 48,
            "patch_size": 8,
            "vocab_size": 64,
            "hidden_stride": 2,  # 6 x 6 patches: 9 rows for a tile
        },
        text_config=text.config(model_type="qwen2"),
        image_token_id=token_id("<IMG_ATOM>"),
        visual_indicator_token_ids=[token_id(indicator) for indicator in _INDICATORS],
        hidden_size=text.hidden,
        vocab_size=text.vocab_size,
    )


def _images() -> BaseImageProcessor:  # up to 6 tiles
    return Ovis2ImageProcessorPil(size={"height": 48, "width": 48}, crop_to_patches=True, max_patches=6)


RECIPES: dict[str, Recipe] = {
    "ovis2": Recipe(
        "Ovis2ForConditionalGeneration",
        _ovis2,
        _images,
        _TEMPLATE,
        ("<|im_start|>", "<image>", "<IMG_ATOM>", *_INDICATORS),
        processor={"image_seq_length": 9, "processor_class": "Ovis2Processor"},
        embedding_scale=0.5,
    ),
}
