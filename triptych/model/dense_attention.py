"""Attention over keys and values that lie together in memory, by what is fastest on the device at hand."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

_QUERY_BLOCK = 256  # rows whose scores are held at once: they stay in the cache of a core


def prefers_products(query: Tensor) -> bool:
    """Whether plain matrix products beat SDPA: in bfloat16 on CPU, where they take 40% of its time."""
    return query.dtype == torch.bfloat16 and not query.is_cuda


def attend(
    query: Tensor,  # [batch, heads, rows, head_dim]
    key: Tensor,  # [batch, kv_heads, keys, head_dim]
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,  # [rows, keys], 0 or -inf
    causal: bool = False,  # without a mask: row i sees the keys up to i
) -> Tensor:
    """[batch, heads, rows, head_dim]."""
    if not prefers_products(query):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
        )
    if causal and mask is None:
        mask = _causal_mask(query.shape[2], query.dtype)
    batch, heads, rows, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    group = heads // kv_heads
    grouped = query.reshape(batch * kv_heads, group, rows, head_dim)  # heads that share keys ride as rows
    keys = key.reshape(batch * kv_heads, num_keys, head_dim).transpose(1, 2)
    values = value.reshape(batch * kv_heads, num_keys, head_dim)
    out = query.new_empty(grouped.shape)
    unused = query.new_zeros(1)
    for first in range(0, rows, _QUERY_BLOCK):
        block = slice(first, min(first + _QUERY_BLOCK, rows))
        # Rows of a causal block see no key behind its last one.
        end = block.stop if causal else num_keys
        queries = grouped[:, :, block].reshape(batch * kv_heads, -1, head_dim)
        scores = torch.baddbmm(unused, queries, keys[:, :, :end], beta=0, alpha=scale)
        if mask is not None:
            scores.view(batch * kv_heads, group, -1, end).add_(mask[block, :end])
        out[:, :, block] = torch.bmm(scores.softmax(-1), values[:, :end]).view(batch * kv_heads, group, -1, head_dim)
    return out.view(query.shape)


def _causal_mask(rows: int, dtype: torch.dtype) -> Tensor:
    return torch.full((rows, rows), float("-inf"), dtype=dtype).triu_(1)
