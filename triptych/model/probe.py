"""Finds what the caches must look like, by running the decoder on two tokens without weights.

Also the place where a model is refused whose attention the paged one cannot compute exactly.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from triptych.core import Role
from triptych.errors import ConfigError
from triptych.model.caches import EmbeddingLayout, KVLayout
from triptych.model.loading import meta_model

PROBE_ATTENTION = "triptych_probe"


@dataclass(frozen=True)
class _Layer:
    index: int
    kv_heads: int
    key_dim: int
    value_dim: int
    softcap: float | None
    sinks: bool


def kv_layout(hf_config: PreTrainedConfig, dtype: torch.dtype) -> KVLayout:
    """The KV cache of a model, from its config alone. Raises ConfigError naming what cannot be served exactly."""
    layers = _run_probe(hf_config)
    _refuse_inexact(hf_config, layers)
    return KVLayout(num_layers=len(layers), kv_heads=layers[0].kv_heads, head_dim=layers[0].key_dim, dtype=dtype)


def embedding_layout(hf_config: PreTrainedConfig, dtype: torch.dtype) -> EmbeddingLayout:
    """The rows that go from encoder to language model: hidden states, then one slice per deepstack layer."""
    hidden: int = hf_config.get_text_config().hidden_size
    return EmbeddingLayout(hidden * (1 + num_deepstack_layers(hf_config)), dtype)


def num_deepstack_layers(hf_config: PreTrainedConfig) -> int:
    vision = getattr(hf_config, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def _run_probe(hf_config: PreTrainedConfig) -> list[_Layer]:
    seen: list[_Layer] = []
    decoder = meta_model(hf_config, Role.D).get_decoder()
    if not getattr(decoder, "_supports_attention_backend", False):
        raise ConfigError(f"{hf_config.model_type}: its decoder takes no attention function from outside")
    decoder.config._attn_implementation = PROBE_ATTENTION
    embeddings = torch.zeros(1, 2, hf_config.get_text_config().hidden_size, device="meta")
    positions = torch.arange(2, device="meta")[None]
    with torch.inference_mode():
        decoder(inputs_embeds=embeddings, position_ids=positions, past_key_values=None, use_cache=False, batch=seen)
    return seen


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object
) -> tuple[Tensor, None]:
    """An attention function that only notes what it is asked."""
    seen = kwargs.get("batch")
    if not isinstance(seen, list):
        raise ConfigError(f"{type(module).__name__}: its layers do not hand keywords down to the attention function")
    layer = _Layer(
        index=int(module.layer_idx),  # type: ignore[arg-type]
        kv_heads=key.shape[1],
        key_dim=key.shape[3],
        value_dim=value.shape[3],
        softcap=kwargs.get("softcap"),  # type: ignore[arg-type]
        sinks=kwargs.get("s_aux") is not None,
    )
    seen.append(layer)
    return query.transpose(1, 2), None


def _refuse_inexact(hf_config: PreTrainedConfig, layers: list[_Layer]) -> None:
    text, name = hf_config.get_text_config(), hf_config.model_type
    if [layer.index for layer in layers] != list(range(text.num_hidden_layers)):
        raise ConfigError(f"{name}: attention ran in layers {[layer.index for layer in layers]}, not once in each")
    shapes = {(layer.kv_heads, layer.key_dim) for layer in layers}
    if len(shapes) > 1:
        raise ConfigError(f"{name}: layers differ in KV heads or head size: {sorted(shapes)}")
    if any(layer.value_dim != layer.key_dim for layer in layers):
        raise ConfigError(f"{name}: values have another size than keys ({layers[0].value_dim}, {layers[0].key_dim})")
    if any(layer.softcap is not None for layer in layers) or getattr(text, "attn_logit_softcapping", None):
        raise ConfigError(f"{name}: attention scores are soft-capped")
    if any(layer.sinks for layer in layers):
        raise ConfigError(f"{name}: attention has sink tokens")
    if getattr(text, "final_logit_softcapping", None):
        raise ConfigError(f"{name}: logits are soft-capped")


AttentionInterface.register(PROBE_ATTENTION, _record)
