"""Attention over keys and values that lie together in memory, by what is fastest on the device at hand."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

_QUERY_BLOCK = 256  # rows whose scores are held at once, about: they stay in the cache of a core


def prefers_products(query: Tensor) -> bool:
    """Whether plain matrix products beat SDPA: in bfloat16 on CPU, where they take 40% of its time."""
    return query.dtype == torch.bfloat16 and not query.is_cuda


def attend(
    query: Tensor,  # [batch, heads, rows, head_dim]
    key: Tensor,  # [batch, kv_heads, keys, head_dim]
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,  # [rows, keys], 0 or -inf
    causal: bool = False,  # without a mask: the last row sees all keys, each row one less than the next
) -> Tensor:
    """[batch, heads, rows, head_dim]. Causal rows behind other keys need plain products, or a mask."""
    if not prefers_products(query):
        assert mask is not None or not causal or query.shape[2] == key.shape[2], "SDPA aligns causal rows at the start"
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
        )
    batch, heads, rows, head_dim = query.shape
    kv_heads, num_keys = key.shape[1:3]
    group = heads // kv_heads
    grouped = query.reshape(batch * kv_heads, group, rows, head_dim)  # heads that share keys ride as rows
    keys = key.reshape(batch * kv_heads, num_keys, head_dim).transpose(1, 2)
    values = value.reshape(batch * kv_heads, num_keys, head_dim)
    out = query.new_empty(grouped.shape)
    unused = query.new_zeros(1)
    triangular = causal and mask is None
    step = -(-rows // max(1, round(rows / _QUERY_BLOCK)))  # equal blocks: a small one at the end is a slow product
    triangle = _triangle(step, query.dtype) if triangular else unused
    for first in range(0, rows, step):
        block = slice(first, min(first + step, rows))
        # Rows of a causal block see no key behind its last one, and all before its first.
        end = num_keys - rows + block.stop if triangular else num_keys
        queries = grouped[:, :, block].reshape(batch * kv_heads, -1, head_dim)
        scores = torch.baddbmm(unused, queries, keys[:, :, :end], beta=0, alpha=scale)
        length = block.stop - first
        if triangular:
            scores.view(batch * kv_heads, group, -1, end)[..., end - length :].add_(triangle[:length, :length])
        elif mask is not None:
            scores.view(batch * kv_heads, group, -1, end).add_(mask[block])
        out[:, :, block] = torch.bmm(scores.softmax(-1), values[:, :end]).view(batch * kv_heads, group, -1, head_dim)
    return out.view(query.shape)


def _triangle(rows: int, dtype: torch.dtype) -> Tensor:
    return torch.full((rows, rows), float("-inf"), dtype=dtype).triu_(1)
