"""The arithmetic of transformers' Qwen2-VL forward, for fast training: few shapes, batched pictures, packed prompts.

Uses the modules of the given model; a test holds it equal to the library's own forward. Does not know the data.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from triptych.demo.pool import MAX_PATCHES, MERGE, Grid

MAX_TOKENS = MAX_PATCHES // MERGE**2
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # the image processor's
_STD = (0.26862954, 0.26130258, 0.27577711)
_FORBIDDEN = -1e9


_LENGTHS = (24, 40, 48, MAX_PATCHES)  # pictures are padded to the next of these, and computed together


def see(visual: Any, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
    """uint8 [pictures, MAX_PATCHES, values] -> [pictures, MAX_TOKENS, width]; its tokens first, then junk."""
    order: list[int] = []
    parts = []
    for shorter, length in zip((0, *_LENGTHS), _LENGTHS, strict=False):
        chosen = [i for i, (rows, columns) in enumerate(grids) if shorter < rows * columns <= length]
        if chosen:
            tokens = _see_equal(visual, patches[chosen, :length], [grids[i] for i in chosen])
            parts.append(functional.pad(tokens, (0, 0, 0, MAX_TOKENS - tokens.shape[1])))
            order += chosen
    return torch.cat(parts)[torch.tensor(order).argsort()]


def _see_equal(visual: Any, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
    """The same for pictures that are padded to one length: [pictures, length, values] -> [pictures, tokens, width]."""
    weight = visual.patch_embed.proj.weight.sum(2).flatten(1)  # the picture's two copies in time are equal
    hidden = _normalised(patches).to(weight.dtype) @ weight.t()
    num_pictures, length, width = hidden.shape
    cos, sin, bias = (part.to(hidden) for part in _picture_tables(visual, grids, length))
    for block in visual.blocks:
        heads = block.attn.qkv(block.norm1(hidden)).view(num_pictures, length, 3, block.attn.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = _attend(_turn(query, cos, sin), _turn(key, cos, sin), value, bias)
        hidden = hidden + block.attn.proj(mixed.transpose(1, 2).reshape(num_pictures, length, width))
        hidden = hidden + block.mlp(block.norm2(hidden))
    tokens: Tensor = visual.merger(hidden)
    return tokens.view(num_pictures, length // MERGE**2, -1)


def think(model: Qwen2VLForConditionalGeneration, embeds: Tensor, positions: Tensor, allowed: Tensor) -> list[Tensor]:
    """embeds [rows, length, width], positions [3, rows, length], allowed bool [rows, length, length].

    -> the hidden states after each layer, the last of them normalised for the output layer.
    """
    lm, eps = model.model.language_model, model.config.text_config.rms_norm_eps
    rows, length, width = embeds.shape
    head_size = width // model.config.text_config.num_attention_heads
    cos, sin = (part[:, None] for part in lm.rotary_emb(embeds, positions))
    bias = torch.zeros_like(allowed, dtype=embeds.dtype).masked_fill_(~allowed, _FORBIDDEN)[:, None]
    hidden, states = embeds, []
    for layer in lm.layers:
        attention = layer.self_attn
        normed = functional.rms_norm(hidden, (width,), layer.input_layernorm.weight, eps)
        query, key, value = (
            projection(normed).view(rows, length, -1, head_size).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        mixed = _attend(_turn(query, cos, sin), _turn(key, cos, sin), value, bias)
        hidden = hidden + attention.o_proj(mixed.transpose(1, 2).reshape(rows, length, width))
        hidden = hidden + layer.mlp(functional.rms_norm(hidden, (width,), layer.post_attention_layernorm.weight, eps))
        states.append(hidden)
    return [*states[:-1], functional.rms_norm(hidden, (width,), lm.norm.weight, eps)]


def token_mask(grids: Sequence[Grid]) -> Tensor:
    """bool [pictures, MAX_TOKENS]: which merged tokens belong to the picture."""
    lengths = torch.tensor([rows * columns // MERGE**2 for rows, columns in grids])
    return torch.arange(MAX_TOKENS) < lengths[:, None]


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """[rows, heads, length, size] with fewer key heads; plain products, whose backward is the fastest on a CPU."""
    rows, heads, length, size = query.shape
    groups = key.shape[1]
    grouped = (query * size**-0.5).reshape(rows, groups, heads // groups * length, size)
    scores = (grouped @ key.transpose(-1, -2)).view(rows, heads, length, length) + bias
    weights = scores.softmax(-1).view(rows, groups, heads // groups * length, length)
    mixed: Tensor = weights @ value
    return mixed.view(rows, heads, length, size)


def _turn(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = states.chunk(2, -1)
    return states * cos + torch.cat((-second, first), -1) * sin


def _normalised(patches: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=patches.device).view(3, 1) * 255 for v in (_MEAN, _STD))
    by_channel = patches.float().view(*patches.shape[:-1], 3, -1)
    return ((by_channel - mean) / std).flatten(-2)


def _picture_tables(visual: Any, grids: Sequence[Grid], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """cos and sin [pictures, 1, length, size], and the bias that hides the padding [pictures, 1, 1, length]."""
    positions = torch.stack([_patch_positions(*grid)[:length] for grid in grids])
    angles = positions[..., None].float() * visual.rotary_pos_emb.inv_freq.float().cpu()
    angles = angles.flatten(-2).repeat(1, 1, 2)[:, None]
    lengths = torch.tensor([rows * columns for rows, columns in grids])
    hidden = torch.arange(length) >= lengths[:, None]
    return angles.cos(), angles.sin(), (hidden * _FORBIDDEN)[:, None, None]


@functools.cache
def _patch_positions(rows: int, columns: int) -> Tensor:
    """[MAX_PATCHES, 2] row and column of each patch, in blocks of MERGE x MERGE."""
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
    blocks = grid.view(rows // MERGE, MERGE, columns // MERGE, MERGE, 2).transpose(1, 2).reshape(-1, 2)
    return functional.pad(blocks, (0, 0, 0, MAX_PATCHES - rows * columns))
