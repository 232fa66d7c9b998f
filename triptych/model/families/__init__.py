"""The model families that are served, and why others are not. The only place with model names."""

from transformers import PreTrainedConfig

from triptych.errors import ConfigError
from triptych.model.families.base import Family, ImageLayout, ItemLayout, UnitLayout
from triptych.model.families.gemma3 import Gemma3
from triptych.model.families.idefics3 import Idefics3
from triptych.model.families.internvl import InternVL
from triptych.model.families.llava import Llava
from triptych.model.families.qwen_vl import QwenVL

__all__ = ["Family", "ImageLayout", "ItemLayout", "UnitLayout", "family_for"]

_FAMILIES: dict[str, type[Family]] = {
    model_type: family for family in (QwenVL, InternVL, Llava, Gemma3, Idefics3) for model_type in family.model_types
}

_RECURRENT = "its linear-attention layers keep a recurrent state, which no paged KV cache holds"
_UNSUPPORTED = {
    "qwen3_5": _RECURRENT,
    "qwen3_5_moe": _RECURRENT,
    "minicpmv4_6": _RECURRENT,
    "mllama": "its cross-attention layers read the picture at every step, beside the KV cache",
    "gemma3n": "its layers share KV caches",
    "gemma4": "its layers share KV caches",
    "llama4": "its chunked attention is not implemented",
    "kimi_k25": "its latent attention is not implemented",
    "paligemma": "its prompt attends in both directions",
}


def family_for(config: PreTrainedConfig) -> Family:
    """Raises ConfigError naming the reason where the model cannot be served exactly."""
    model_type: str = config.model_type
    if model_type in _UNSUPPORTED:
        raise ConfigError(f"model type {model_type} cannot be served: {_UNSUPPORTED[model_type]}")
    if model_type not in _FAMILIES:
        raise ConfigError(f"model type {model_type} is not supported; supported are {', '.join(sorted(_FAMILIES))}")
    _refuse_other_layers(config)
    return _FAMILIES[model_type](config)


def _refuse_other_layers(config: PreTrainedConfig) -> None:
    layer_types = getattr(config.get_text_config(), "layer_types", None) or ()
    others = set(layer_types) - {"full_attention", "sliding_attention"}
    if "linear_attention" in others:
        raise ConfigError(f"model type {config.model_type} cannot be served with this text model: {_RECURRENT}")
    if others:
        raise ConfigError(f"{config.model_type}: layers of type {', '.join(sorted(others))} keep no paged KV cache")
