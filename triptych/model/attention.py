"""Paged attention as transformers' language models call it: one function for prefill chunks and decodes together.

Models find it by its name in transformers' AttentionInterface; they need no cache object and no mask.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from triptych.model.attention_batch import AttentionBatch, ChunkRows
from triptych.model.dense_attention import attend, prefers_products

try:
    import triptych.model.attention_triton as _triton
except ImportError:  # Triton comes with CUDA builds of torch only; without it the plain functions serve CUDA too
    _triton = None  # type: ignore[assignment]

PAGED_ATTENTION = "triptych_paged"


def paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, rows, head_dim]
    key: Tensor,  # [1, kv_heads, rows, head_dim], rotary positions applied
    value: Tensor,
    attention_mask: None,
    *,
    batch: AttentionBatch,
    scaling: float,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Stores the rows' keys and values, then attends over the block tables: [1, rows, heads, head_dim]."""
    layer = batch.region.layout.slots[int(module.layer_idx)]  # type: ignore[arg-type]
    batch.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    if _triton is not None and query.is_cuda:
        return _triton.attend(batch, layer, query, scaling, sliding_window), None
    parts: list[Tensor] = []
    if batch.num_decodes:
        parts += _attend_decodes(batch, layer, query, scaling, sliding_window)
    for chunk in batch.chunks:
        parts.append(_attend_chunk(batch, layer, chunk, query, key, value, scaling, sliding_window))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)), None


def _attend_decodes(batch: AttentionBatch, layer: int, query: Tensor, scale: float, window: int | None) -> list[Tensor]:
    """One row per sequence, by two batched products: SDPA works on blocks of rows that would be mostly empty."""
    head_dim, parts = query.shape[3], []
    rows = query[0].transpose(0, 1)
    for group in batch.decode_groups(window):
        both = batch.region.gather(group.pages[layer]).view(2, group.mask.shape[0], -1, head_dim)
        keys, values = both.unbind(0)  # [rows * kv_heads, kv_len, head_dim], contiguous: else the products copy them
        # The query heads that share a KV head ride as query rows: nothing is repeated.
        queries = rows[group.first : group.last].reshape(len(keys), -1, head_dim)
        scores = torch.baddbmm(group.mask, queries, keys.transpose(1, 2), alpha=scale)
        parts.append(torch.bmm(scores.softmax(-1), values).view(1, group.last - group.first, -1, head_dim))
    return parts


def _attend_chunk(
    batch: AttentionBatch,
    layer: int,
    chunk: ChunkRows,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    rows = slice(chunk.row, chunk.row + chunk.length)
    mask = batch.chunk_mask(chunk, window, needs_causal=not prefers_products(query))
    if chunk.pages is None:
        keys, values = key[:, :, rows], value[:, :, rows]
    else:
        keys, values = batch.context(layer, chunk)
    return attend(query[:, :, rows], keys, values, scale, mask, causal=mask is None).transpose(1, 2)


AttentionInterface.register(PAGED_ATTENTION, paged_attention)
