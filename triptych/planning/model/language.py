"""The language half of a model as its config describes it: exact parameters, bytes of KV, work for a token.

Counted is what the modules of transformers (and of the models with code of their own) hold; `tests/planning` compares.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from triptych.errors import ConfigError
from triptych.planning.model.configs import MOST_LAYERS, Fields

LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
QWEN2 = LLAMA | {"intermediate_size": 22016, "vocab_size": 151936, "max_position_embeddings": 32768}
QWEN2_72B = QWEN2 | {"vocab_size": 152064, "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80}
LINEAR = {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
LINEAR |= {"linear_num_key_heads": 16, "linear_num_value_heads": 32, "full_attention_interval": 4}
QWEN3_5 = QWEN2 | LINEAR | {"vocab_size": 248320, "intermediate_size": 12288, "head_dim": 256}

# What transformers takes for a key that a config does not have, by the type of the text model.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": LLAMA | {"vocab_size": 32000, "max_position_embeddings": 2048},
    "mistral": LLAMA
    | {"vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    "internlm2": LLAMA | {"vocab_size": 103168, "max_position_embeddings": 2048},
    "qwen2": QWEN2 | {"num_key_value_heads": 32},
    "qwen3": QWEN2 | {"num_key_value_heads": 32, "head_dim": 128},
    "qwen2_vl_text": QWEN2_72B | {"num_attention_heads": 64, "num_key_value_heads": 8},
    "qwen2_5_vl_text": QWEN2_72B | {"num_attention_heads": 64, "num_key_value_heads": 8},
    "qwen2_5_omni_text": QWEN2
    | {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4},
    "qwen3_vl_text": QWEN2 | {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 128000},
    "qwen3_vl_moe_text": QWEN2
    | {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16}
    | {"num_key_value_heads": 16, "head_dim": 128, "max_position_embeddings": 128000, "decoder_sparse_step": 1}
    | {"moe_intermediate_size": 1408, "num_experts_per_tok": 4, "num_local_experts": 60},
    "qwen3_5_text": QWEN3_5 | {"num_attention_heads": 16, "num_key_value_heads": 4},
    "qwen3_5_moe_text": QWEN3_5
    | {"hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 2}
    | {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts_per_tok": 8}
    | {"num_experts": 256},
    "gemma3_text": {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072},
    "cohere2": {"vocab_size": 256000, "hidden_size": 8192, "intermediate_size": 22528, "num_hidden_layers": 40}
    | {"num_attention_heads": 64, "max_position_embeddings": 8192},
    "glm4v_text": LLAMA
    | {"vocab_size": 151552, "intermediate_size": 13696, "num_hidden_layers": 40, "num_key_value_heads": 2}
    | {"max_position_embeddings": 32768},
    "glm4v_moe_text": LLAMA
    | {"vocab_size": 151424, "intermediate_size": 10944, "num_hidden_layers": 46, "num_attention_heads": 96}
    | {"num_key_value_heads": 8, "moe_intermediate_size": 1408, "num_experts_per_tok": 8, "n_shared_experts": 1}
    | {"n_routed_experts": 128, "first_k_dense_replace": 1, "attention_bias": True, "max_position_embeddings": 65536},
}
BIAS_OF_QKV = {"qwen2", "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "glm4v_text"}  # whatever they say
NORMS_OF_HEADS = {"qwen3", "qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_5_text", "qwen3_5_moe_text", "gemma3_text"}
NORMS_OF_A_LAYER = {"gemma3_text": 4, "glm4v_text": 4, "cohere2": 1}  # others 2
GATED_QUERIES = {"qwen3_5_text", "qwen3_5_moe_text"}
TIED = {"gemma3_text", "cohere2"}  # unless they say otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """Counts are of numbers, not bytes. `active` is what one token is multiplied with, without head and embeddings."""

    parameters: int
    embedding: int
    head: int  # 0 where it is the embedding
    active: int
    layers: int
    attention_layers: int  # those that keep KV for every token
    hidden: int
    intermediate: int  # of all experts that a token goes through
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    matrix_state: int = 0  # numbers that the layers without KV keep for a sequence, always in 32 bits
    window_state: int = 0  # others, in the type of the weights

    @property
    def kv_per_token(self) -> int:
        """Numbers kept for each token of context."""
        return 2 * self.attention_layers * self.kv_heads * self.head_dim

    @property
    def flops_per_token(self) -> float:
        """Of the matrices, without attention and without the head."""
        return 2.0 * self.active

    @property
    def flops_per_pair(self) -> float:
        """Of attention: one token that looks at one token of context."""
        return 4.0 * self.attention_layers * self.heads * self.head_dim

    @property
    def flops_of_head(self) -> float:
        """For each token that is sampled."""
        return 2.0 * self.vocab * self.hidden


def read_language(text: Fields, *, kind: str, tied: bool) -> Language:
    """`text`: the config of the text model, with the defaults of `kind`. `tied`: whether its head is the embedding."""
    hidden, layers = text.integer("hidden_size"), text.integer("num_hidden_layers", most=MOST_LAYERS)
    heads = text.integer("num_attention_heads")
    kv_heads = text.integer("num_key_value_heads", heads)
    head_dim = text.integer("head_dim", hidden // heads)
    if heads % kv_heads:
        raise ConfigError(f"{text.path('num_key_value_heads')}: {kv_heads} does not divide {heads} heads")
    linear = _num_linear(text, layers)
    attention = _attention(text, kind, hidden, heads, kv_heads, head_dim)
    norms = NORMS_OF_A_LAYER.get(kind, 2) * hidden
    mixer = _linear_attention(text, hidden) if linear else 0
    mlps, active_mlps, intermediate = _mlps(text, kind, hidden, layers)
    others = (layers - linear) * attention + linear * mixer + layers * norms + hidden
    vocab = text.integer("vocab_size")
    head = 0 if tied else vocab * hidden
    return Language(
        parameters=vocab * hidden + head + others + mlps,
        embedding=vocab * hidden,
        head=head,
        active=others + active_mlps,
        layers=layers,
        attention_layers=layers - linear,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=vocab,
        context=_context(text),
        matrix_state=linear * _matrix_state(text) if linear else 0,
        window_state=linear * _window_state(text) if linear else 0,
    )


def _num_linear(text: Fields, layers: int) -> int:
    kinds = text.items("layer_types")
    if kinds:
        return min(layers, kinds.count("linear_attention"))
    return layers - layers // text.integer("full_attention_interval", 1)


def _attention(text: Fields, kind: str, hidden: int, heads: int, kv_heads: int, head_dim: int) -> int:
    queries, keys = heads * head_dim, kv_heads * head_dim
    gates = queries if kind in GATED_QUERIES else 0
    matrices = hidden * (2 * queries + gates + 2 * keys)
    norms = 2 * head_dim if kind in NORMS_OF_HEADS or text.flag("use_qk_norm") else 0
    if kind in BIAS_OF_QKV or (kind == "glm4v_moe_text" and text.flag("attention_bias")):
        return matrices + queries + 2 * keys + norms
    if text.flag("attention_bias") or (kind == "internlm2" and text.flag("bias")):
        return matrices + queries + gates + 2 * keys + hidden + norms
    return matrices + norms


def _linear_attention(text: Fields, hidden: int) -> int:
    """A gated delta rule layer."""
    value_heads, value_dim = text.integer("linear_num_value_heads"), text.integer("linear_value_head_dim")
    values = value_heads * value_dim
    projections = hidden * (_joined(text) + values + 2 * value_heads) + values * hidden
    return projections + _window_state(text) + value_dim + 2 * value_heads


def _joined(text: Fields) -> int:
    """Width of queries, keys and values together, which the convolution goes over."""
    keys = text.integer("linear_num_key_heads") * text.integer("linear_key_head_dim")
    return 2 * keys + text.integer("linear_num_value_heads") * text.integer("linear_value_head_dim")


def _window_state(text: Fields) -> int:
    """Of one layer: as many numbers as the convolution has weights."""
    return _joined(text) * text.integer("linear_conv_kernel_dim")


def _matrix_state(text: Fields) -> int:
    """Of one layer."""
    values, keys = text.integer("linear_value_head_dim"), text.integer("linear_key_head_dim")
    return text.integer("linear_num_value_heads") * keys * values


def _mlps(text: Fields, kind: str, hidden: int, layers: int) -> tuple[int, int, int]:
    """(parameters of all layers, those that one token meets, width that it meets in a layer)."""
    experts = next(
        (text.integer(key) for key in ("num_experts", "num_local_experts", "n_routed_experts") if text.get(key)), 0
    )
    if not experts:
        width = text.integer("intermediate_size")
        bias = 2 * width + hidden if text.flag("mlp_bias") else 0
        each = 3 * hidden * width + bias
        return layers * each, layers * each, width
    width, chosen = text.integer("moe_intermediate_size"), text.integer("num_experts_per_tok")
    shared_width = text.integer("n_shared_experts", 0, least=0) * width
    shared_gate = 0
    if text.get("shared_expert_intermediate_size"):
        shared_width, shared_gate = text.integer("shared_expert_intermediate_size"), hidden
    around = hidden * experts + shared_gate + 3 * hidden * shared_width
    dense_layers = _num_dense(text, layers)
    dense = 3 * hidden * text.integer("intermediate_size") if dense_layers else 0
    sparse = layers - dense_layers
    everything = sparse * (around + experts * 3 * hidden * width) + dense_layers * dense
    met = sparse * (around + chosen * 3 * hidden * width) + dense_layers * dense
    return everything, met, shared_width + chosen * width


def _num_dense(text: Fields, layers: int) -> int:
    """Layers without experts in a model that has some."""
    if text.get("first_k_dense_replace") is not None:
        return min(layers, text.integer("first_k_dense_replace", least=0))
    step, dense = text.integer("decoder_sparse_step", 1), text.items("mlp_only_layers")
    return sum(layer in dense or (layer + 1) % step > 0 for layer in range(layers))


def _context(text: Fields) -> int:
    """Positions. A dynamic rope is stretched while it runs, so that the config has those of the training."""
    positions = text.integer("max_position_embeddings")
    scaling = text.part("rope_scaling")
    if "dynamic" in (scaling.text("rope_type"), scaling.text("type")):
        return int(positions * scaling.number("factor"))
    return positions
