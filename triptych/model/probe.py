"""Finds what the caches must look like, by running the decoder on two tokens without weights.

Also the place where a model is refused whose attention the paged one cannot compute exactly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.cache_utils import Cache, LinearAttentionLayer

from triptych.errors import ConfigError
from triptych.model.caches import EmbeddingLayout, KVLayout, LayerState
from triptych.model.loading import Half, meta_half
from triptych.model.recurrent import Forward, hand_states_to_linear_layers

PROBE_ATTENTION = "triptych_probe"
# Of the weights in the probe: no state has it but those that follow the weights, and products over experts, grouped,
# run on the meta device in this type only.
_PROBE_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class _Layer:
    index: int
    kv_heads: int
    key_dim: int
    value_dim: int
    softcap: float | None
    sinks: bool


@dataclass
class _Seen:
    """What ran, in the order in which it ran. It is given to the decoder as `batch` and as `states`."""

    layers: list[_Layer] = field(default_factory=list)
    states: list[LayerState] = field(default_factory=list)

    def run(self, layer: int, forward: Forward, hidden: Tensor) -> Tensor:
        """Runs a linear-attention layer, and notes the states that it leaves in transformers' cache."""
        kept = LinearAttentionLayer()
        with _plain_functions():
            output = forward(hidden, cache_params=Cache([kept] * (layer + 1)))
        for name, tensors in (("conv", kept.conv_states), ("recurrent", kept.recurrent_states)):
            if tensors[0] is not None:
                self.states.append(LayerState(layer, name, tuple(tensors[0].shape[1:]), tensors[0].dtype))
        return output


@contextmanager
def _plain_functions() -> Iterator[None]:
    """Kernel packages that are installed cannot run without data; transformers leaves them aside in an export."""
    is_exporting = torch.compiler.is_exporting
    torch.compiler.is_exporting = lambda: True
    try:
        yield
    finally:
        torch.compiler.is_exporting = is_exporting


def kv_layout(hf_config: PreTrainedConfig, dtype: torch.dtype) -> KVLayout:
    """The KV cache of a model, from its config alone. Raises ConfigError naming what cannot be served exactly."""
    seen = _run_probe(hf_config)
    _refuse_inexact(hf_config, seen)
    first = seen.layers[0]
    states = [replace(state, dtype=dtype) if state.dtype is _PROBE_DTYPE else state for state in seen.states]
    return KVLayout(len(seen.layers), first.kv_heads, first.key_dim, dtype, tuple(states))


def embedding_layout(hf_config: PreTrainedConfig, dtype: torch.dtype) -> EmbeddingLayout:
    """The rows that go from encoder to language model: hidden states, then one slice per deepstack layer."""
    hidden: int = hf_config.get_text_config().hidden_size
    return EmbeddingLayout(hidden * (1 + num_deepstack_layers(hf_config)), dtype)


def num_deepstack_layers(hf_config: PreTrainedConfig) -> int:
    vision = getattr(hf_config, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def _run_probe(hf_config: PreTrainedConfig) -> _Seen:
    decoder = meta_half(hf_config, Half.LANGUAGE).get_decoder().to(_PROBE_DTYPE)
    num_linear = hand_states_to_linear_layers(decoder)
    if not num_linear and not getattr(decoder, "_supports_attention_backend", False):  # hybrids do not declare it
        raise ConfigError(f"{hf_config.model_type}: its decoder takes no attention function from outside")
    decoder.config._attn_implementation = PROBE_ATTENTION
    seen = _Seen()
    with torch.inference_mode():
        decoder(
            inputs_embeds=torch.zeros(1, 2, hf_config.get_text_config().hidden_size, dtype=_PROBE_DTYPE, device="meta"),
            position_ids=torch.arange(2, device="meta")[None],
            past_key_values=None,
            use_cache=False,
            batch=seen,
            **({"states": seen} if num_linear else {}),
        )
    return seen


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: object
) -> tuple[Tensor, None]:
    """An attention function that only notes what it is asked."""
    seen = kwargs.get("batch")
    if not isinstance(seen, _Seen):
        raise ConfigError(f"{type(module).__name__}: its layers do not hand keywords down to the attention function")
    layer = _Layer(
        index=int(module.layer_idx),  # type: ignore[arg-type]
        kv_heads=key.shape[1],
        key_dim=key.shape[3],
        value_dim=value.shape[3],
        softcap=kwargs.get("softcap"),  # type: ignore[arg-type]
        sinks=kwargs.get("s_aux") is not None,
    )
    seen.layers.append(layer)
    return query.transpose(1, 2), None


def _refuse_inexact(hf_config: PreTrainedConfig, seen: _Seen) -> None:
    text, name, layers = hf_config.get_text_config(), hf_config.model_type, seen.layers
    attending, linear = [layer.index for layer in layers], sorted({state.layer for state in seen.states})
    if not layers or sorted(attending + linear) != list(range(text.num_hidden_layers)):
        others = f" and linear attention in {linear}" if linear else ""
        raise ConfigError(f"{name}: attention ran in layers {attending}{others}, not one of them once in each")
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
