"""Recipes of the families that take audio: windows of a second or less, so that short clips have several."""

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedConfig, WhisperFeatureExtractor

from tests.recipes.base import Recipe, Text, TokenId
from tests.recipes.images import RECIPES as IMAGES

_MEL_BINS = 16


def _extractor(*, hop_length: int = 160, seconds: int = 1) -> Callable[[], WhisperFeatureExtractor]:
    def build() -> WhisperFeatureExtractor:
        return WhisperFeatureExtractor(feature_size=_MEL_BINS, hop_length=hop_length, chunk_length=seconds)

    return build


def _tower(max_source_positions: int, **extra: Any) -> dict[str, Any]:
    base = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_mel_bins": _MEL_BINS}
    return base | {"max_source_positions": max_source_positions} | extra


def _qwen2_audio(text: Text, token_id: TokenId) -> PreTrainedConfig:
    tower = {
        "model_type": "qwen2_audio_encoder",
        "d_model": 32,
        "encoder_ffn_dim": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "num_mel_bins": _MEL_BINS,
        "max_source_positions": 100,
    }
    return transformers.Qwen2AudioConfig(
        audio_config=tower, text_config=text.config(model_type="qwen2"), audio_token_id=token_id("<|AUDIO|>")
    )


def _voxtral(text: Text, token_id: TokenId) -> PreTrainedConfig:
    return transformers.VoxtralConfig(
        audio_config=_tower(40, intermediate_size=128, head_dim=16),  # 4 positions make a row: 10 for a window
        text_config=text.config(model_type="llama", head_dim=text.hidden // 4),
        audio_token_id=token_id("[AUDIO]"),
    )


def _audioflamingo3(text: Text, token_id: TokenId) -> PreTrainedConfig:
    return transformers.AudioFlamingo3Config(
        audio_config=_tower(50, intermediate_size=64),
        text_config=text.config(model_type="qwen2"),
        audio_token_id=token_id("<sound>"),
    )


def _qwen2_5_omni(text: Text, token_id: TokenId) -> PreTrainedConfig:
    pair = text.hidden // 4 // 2  # rotary pairs of one head
    section = [pair - 2 * (pair * 3 // 8), pair * 3 // 8, pair * 3 // 8]
    names = {"image": "IMAGE", "video": "VIDEO", "audio": "AUDIO"}
    marks = {"vision_start": "vision_bos", "vision_end": "vision_eos"}
    marks |= {"audio_start": "audio_bos", "audio_end": "audio_eos"}
    return transformers.Qwen2_5OmniThinkerConfig(
        text_config=text.config(
            rope_parameters={"rope_type": "default", "mrope_section": section, "rope_theta": 10000.0}
        ),
        vision_config={
            "depth": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "in_channels": 3,
            "num_heads": 2,
            "hidden_size": 32,
            "out_hidden_size": text.hidden,
            "intermediate_size": 64,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 25,
        },
        audio_config={
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "num_mel_bins": _MEL_BINS,
            "max_source_positions": 20,
            "n_window": 4,  # chunks of 8 frames, units of 40
            "output_dim": text.hidden,
        },
        tie_word_embeddings=False,
        **{f"{name}_token_id": token_id(f"<|{token}|>") for name, token in (names | marks).items()},
    )


_CHATML_END = """{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_CHATML_BEGIN = """{% set audios = namespace(count=0) %}{% for message in messages %}\
{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"""

_QWEN2_AUDIO_TEMPLATE = (
    _CHATML_BEGIN
    + """{% if 'audio' in content or content['type'] == 'audio' %}{% set audios.count = audios.count + 1 %}\
Audio {{ audios.count }}: <|audio_bos|><|AUDIO|><|audio_eos|>
{% elif 'text' in content %}{{ content['text'] }}{% endif %}"""
    + _CHATML_END
)

_AUDIOFLAMINGO3_TEMPLATE = (
    _CHATML_BEGIN
    + """{% if content['type'] == 'audio' %}<sound>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"""
    + _CHATML_END
)

_OMNI_TEMPLATE = (
    _CHATML_BEGIN
    + """{% if content['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>\
{% elif content['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>\
{% elif content['type'] == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>\
{% elif 'text' in content %}{{ content['text'] }}{% endif %}"""
    + _CHATML_END
)

_VOXTRAL_TEMPLATE = """{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}{% else %}[INST]\
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}\
{% if content['type'] == 'audio' %}[AUDIO]{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}\
{% endfor %}{% endif %}[/INST]{% endif %}{% endfor %}"""

_AUDIO_TOKENS = ("<|im_start|>", "<|audio_bos|>", "<|audio_eos|>", "<|AUDIO|>")
_OMNI_TOKENS = ("<|vision_bos|>", "<|vision_eos|>", "<|IMAGE|>", "<|VIDEO|>")


RECIPES: dict[str, Recipe] = {
    "qwen2_audio": Recipe(
        "Qwen2AudioForConditionalGeneration",
        _qwen2_audio,
        None,
        _QWEN2_AUDIO_TEMPLATE,
        _AUDIO_TOKENS,
        feature_extractor=_extractor(seconds=2),
        processor={"processor_class": "Qwen2AudioProcessor"},
    ),
    "voxtral": Recipe(
        "VoxtralForConditionalGeneration",
        _voxtral,
        None,
        _VOXTRAL_TEMPLATE,
        ("[INST]", "[/INST]", "[AUDIO]", "[BEGIN_AUDIO]"),
        eos="</s>",
        bos="<s>",
        feature_extractor=_extractor(hop_length=200),
        processor={"processor_class": "VoxtralProcessor", "rows_per_window": 10},
    ),
    "audioflamingo3": Recipe(
        "AudioFlamingo3ForConditionalGeneration",
        _audioflamingo3,
        None,
        _AUDIOFLAMINGO3_TEMPLATE,
        ("<|im_start|>", "<sound>"),
        feature_extractor=_extractor(),
        processor={"processor_class": "AudioFlamingo3Processor", "audio_token": "<sound>", "max_audio_len": 3},
    ),
    "qwen2_5_omni": Recipe(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        _qwen2_5_omni,
        IMAGES["qwen2_5_vl"].image_processor,
        _OMNI_TEMPLATE,
        _AUDIO_TOKENS + _OMNI_TOKENS,
        {
            "image_token": "<|IMAGE|>",
            "video_token": "<|VIDEO|>",
            "audio_token": "<|AUDIO|>",
            "vision_bos_token": "<|vision_bos|>",
            "vision_eos_token": "<|vision_eos|>",
            "audio_bos_token": "<|audio_bos|>",
            "audio_eos_token": "<|audio_eos|>",
        },
        feature_extractor=_extractor(seconds=2),
        processor={"processor_class": "Qwen2_5OmniProcessor"},
    ),
}
