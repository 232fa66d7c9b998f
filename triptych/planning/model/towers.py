"""Which towers there are, what their configs leave out, and how one is read from the config of its model."""

from collections.abc import Callable, Mapping
from typing import Any

from triptych.errors import ConfigError
from triptych.planning.model import patch_towers, sound_towers, square_towers
from triptych.planning.model.configs import Fields
from triptych.planning.model.tower import Tower

SIGLIP: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
SIGLIP |= {"image_size": 224, "patch_size": 16, "vision_use_head": True}
SO400M = SIGLIP | {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16}
IDEFICS = SIGLIP | {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32, "vision_use_head": False}
CLIP_L = SIGLIP | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_L |= {"image_size": 336, "patch_size": 14}
QWEN: dict[str, Any] = {
    "depth": 32,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN3 = QWEN | {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 16, "out_hidden_size": 3584}
QWEN3 |= {"num_position_embeddings": 2304}
QWEN2_5 = QWEN | {"hidden_size": 3584, "intermediate_size": 3420, "out_hidden_size": 3584, "window_size": 112}
QWEN2_5 |= {"fullatt_block_indexes": [7, 15, 23, 31]}
GLM4V = QWEN | {"depth": 24, "hidden_size": 1536, "num_heads": 12, "image_size": 336, "out_hidden_size": 4096}
GLM4V |= {"intermediate_size": 13696}
WHISPER: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
}
WHISPER |= {"num_mel_bins": 128, "max_source_positions": 1500}
OLD_WHISPER = WHISPER | {"d_model": 1280, "encoder_ffn_dim": 5120, "encoder_layers": 32, "encoder_attention_heads": 20}

# What transformers takes for a key that a config does not have, by the type of the tower.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "clip_vision_model": SIGLIP | {"patch_size": 32},
    "siglip_vision_model": SIGLIP,
    "idefics3_vision": IDEFICS,
    "smolvlm_vision": IDEFICS,
    "pixtral": CLIP_L | {"image_size": 1024, "patch_size": 16},
    "internvl_vision": CLIP_L | {"image_size": 448, "use_mean_pooling": True},
    "intern_vit_6b": {"num_hidden_layers": 48, "hidden_size": 3200, "intermediate_size": 12800, "image_size": 224}
    | {"num_attention_heads": 25, "patch_size": 14, "qk_normalization": True, "norm_type": "rms_norm"},
    "qwen2_vl_vision": QWEN | {"embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4},
    "qwen2_5_vl_vision": QWEN2_5,
    "qwen2_5_omni_vision_encoder": QWEN2_5,
    "qwen3_vl_vision": QWEN3 | {"deepstack_visual_indexes": [8, 16, 24]},
    "qwen3_5_vision": QWEN3,
    "glm4v_vision": GLM4V,
    "ovis2_vision": CLIP_L
    | {"intermediate_size": 2816, "num_attention_heads": 8, "image_size": 224}
    | {"vocab_size": 16384, "hidden_stride": 1, "num_visual_indicator_tokens": 5},
    "qwen2_audio_encoder": OLD_WHISPER,
    "qwen2_5_omni_audio_encoder": OLD_WHISPER | {"n_window": 100, "output_dim": 3584},
    "voxtral_encoder": WHISPER,
    "audioflamingo3_encoder": WHISPER,
}

READERS: Mapping[str, Callable[[Fields], Tower]] = {
    "clip_vision_model": square_towers.clip,
    "siglip_vision_model": square_towers.siglip,
    "idefics3_vision": square_towers.siglip,
    "smolvlm_vision": square_towers.siglip,
    "pixtral": square_towers.pixtral,
    "internvl_vision": square_towers.internvit,
    "intern_vit_6b": square_towers.internvit,
    "qwen2_vl_vision": patch_towers.qwen2_vl,
    "qwen2_5_vl_vision": patch_towers.qwen2_5_vl,
    "qwen2_5_omni_vision_encoder": patch_towers.qwen2_5_vl,
    "qwen3_vl_vision": patch_towers.qwen3_vl,
    "qwen3_5_vision": patch_towers.qwen3_vl,
    "glm4v_vision": patch_towers.glm4v,
    "ovis2_vision": square_towers.ovis2,
    "qwen2_audio_encoder": sound_towers.old_whisper,
    "qwen2_5_omni_audio_encoder": sound_towers.old_whisper,
    "voxtral_encoder": sound_towers.new_whisper,
    "audioflamingo3_encoder": sound_towers.new_whisper,
}

ALIASES = {  # other names of a type, also those that older checkpoints write
    "qwen3_vl_moe_vision": "qwen3_vl_vision",
    "qwen3_5_moe_vision": "qwen3_5_vision",
    "glm4v_moe_vision": "glm4v_vision",
    "qwen2_vl": "qwen2_vl_vision",
    "qwen2_5_vl": "qwen2_5_vl_vision",
    "qwen3_vl": "qwen3_vl_vision",
    "qwen3_vl_moe": "qwen3_vl_vision",
    "qwen3_5": "qwen3_5_vision",
    "qwen3_5_moe": "qwen3_5_vision",
    "glm4v": "glm4v_vision",
    "glm4v_moe": "glm4v_vision",
    "idefics3": "idefics3_vision",
    "smolvlm": "smolvlm_vision",
    "siglip": "siglip_vision_model",
}


def tower_fields(config: Fields, key: str, usual: str, absent: Mapping[str, Any] | None = None) -> tuple[str, Fields]:
    """The type of a tower and its config with the defaults of the type. `absent`: those of the family, where the config
    of the model says nothing of its tower. Raises ConfigError for a type that is not known."""
    if not config.is_given(key):
        return usual, Fields({}, absent or DEFAULTS[usual], name=config.path(key))
    named = config.part(key).text("model_type") or usual
    kind = ALIASES.get(named, named)
    if kind not in READERS:
        raise ConfigError(
            f"{config.path(key)}.model_type: {named!r} is not known; known are {', '.join(sorted(READERS))}"
        )
    return kind, config.part(key, DEFAULTS[kind])


def read_tower(config: Fields, key: str, usual: str, absent: Mapping[str, Any] | None = None) -> tuple[Tower, Fields]:
    """The tower, and its config with the defaults. Raises ConfigError as above, and for sizes that are missing."""
    kind, fields = tower_fields(config, key, usual, absent)
    return READERS[kind](fields), fields
