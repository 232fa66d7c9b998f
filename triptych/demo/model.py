"""The model's shape and first weights: a Qwen2-VL of about 3 million parameters.

Does not know how it is trained or saved.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from triptych.demo.pool import MERGE, PATCH

WIDTH = 192
_RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "fc2.weight")


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(_config(tokenizer))
    _set_first_weights(model)
    return model


def _config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    def token_id(token: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(token))

    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "bos_token_id": None,
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
        "tie_word_embeddings": True,
        # The fast half of each head tells order; the slow half hardly turns, and compares contents at any distance.
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 4, 4]},
    }
    vision = {
        "depth": 4,
        "embed_dim": 128,
        "hidden_size": WIDTH,
        "num_heads": 4,
        "mlp_ratio": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )


@torch.no_grad()
def _set_first_weights(model: Qwen2VLForConditionalGeneration) -> None:
    """Normal with std fan_in^-0.5, half of it where a layer adds to the residual stream; 0.02 is too small here."""
    for name, weight in model.named_parameters():
        if "embed_tokens" in name:
            weight.normal_(0, 0.1)
        elif weight.dim() > 1:
            std = weight[0].numel() ** -0.5
            weight.normal_(0, std / 2 if name.endswith(_RESIDUAL_OUTPUTS) else std)
