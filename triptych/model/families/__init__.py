"""The model families that are served, and why others are not. The only place with model names."""

from transformers import PreTrainedConfig

from triptych.errors import ConfigError
from triptych.model.families.audioflamingo3 import AudioFlamingo3
from triptych.model.families.aya_vision import AyaVision
from triptych.model.families.base import Family, ItemLayout, Modality, Parts, Rows, Run
from triptych.model.families.gemma3 import Gemma3
from triptych.model.families.glm4v import Glm4v
from triptych.model.families.idefics3 import Idefics3
from triptych.model.families.internvl import InternVL
from triptych.model.families.llava import Llava
from triptych.model.families.llava_next import LlavaNext, LlavaOnevision
from triptych.model.families.ovis2 import Ovis2
from triptych.model.families.pixtral import Pixtral
from triptych.model.families.qwen2_5_omni import Qwen25Omni
from triptych.model.families.qwen2_audio import Qwen2Audio
from triptych.model.families.qwen3_5 import Qwen35
from triptych.model.families.qwen_vl import QwenVL
from triptych.model.families.voxtral import Voxtral

__all__ = ["Family", "ItemLayout", "Modality", "Parts", "Rows", "Run", "answering_part", "family_for"]

_SUPPORTED: tuple[type[Family], ...] = (
    AudioFlamingo3,
    AyaVision,
    Gemma3,
    Glm4v,
    Idefics3,
    InternVL,
    Llava,
    LlavaNext,
    LlavaOnevision,
    Ovis2,
    Pixtral,
    Qwen25Omni,
    Qwen2Audio,
    Qwen35,
    QwenVL,
    Voxtral,
)
_FAMILIES = {model_type: family for family in _SUPPORTED for model_type in family.model_types}

_RECURRENT = "its linear-attention layers keep a recurrent state, which was not tried with this family"
_UNSUPPORTED = {
    "minicpmv4_6": _RECURRENT,
    "mllama": "its cross-attention layers read the picture at every step, beside the KV cache",
    "gemma3n": "its layers share KV caches",
    "gemma4": "its layers share KV caches",
    "llama4": "its chunked attention is not implemented",
    "kimi_k25": "its latent attention is not implemented",
    "paligemma": "its prompt attends in both directions",
}

# Models that have other parts beside the one that takes prompts and answers in text: its config, and its class.
_ANSWERING = {"qwen2_5_omni": ("thinker_config", "Qwen2_5OmniThinkerForConditionalGeneration")}


def answering_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the part of a model that is served: of most models all of it."""
    if config.model_type not in _ANSWERING:
        return config
    name, architecture = _ANSWERING[config.model_type]
    part: PreTrainedConfig = getattr(config, name)
    part.architectures = [architecture]
    part.dtype = part.dtype or config.dtype
    return part


def family_for(config: PreTrainedConfig) -> Family:
    """Raises ConfigError naming the reason where the model cannot be served exactly."""
    model_type: str = config.model_type
    if model_type in _UNSUPPORTED:
        raise ConfigError(f"model type {model_type} cannot be served: {_UNSUPPORTED[model_type]}")
    tower = getattr(getattr(config, "vision_config", None), "model_type", None)
    family = _FAMILIES.get(f"{model_type}/{tower}") or _FAMILIES.get(model_type)
    if family is None:
        raise ConfigError(f"model type {model_type} is not supported; supported are {', '.join(sorted(_FAMILIES))}")
    _refuse_other_layers(config, family)
    return family(config)


def _refuse_other_layers(config: PreTrainedConfig, family: type[Family]) -> None:
    layer_types = getattr(config.get_text_config(), "layer_types", None) or ()
    others = set(layer_types) - {"full_attention", "sliding_attention"}
    if "linear_attention" in others and not family.linear_attention:
        raise ConfigError(f"model type {config.model_type} cannot be served with this text model: {_RECURRENT}")
    others.discard("linear_attention")
    if others:
        raise ConfigError(f"{config.model_type}: layers of type {', '.join(sorted(others))} keep no paged KV cache")
