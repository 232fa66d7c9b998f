"""Attention as transformers' models call it: paged for language models, by segments for vision towers.

One flattened forward carries rows of many sequences, decodes first, then prefill chunks. `AttentionBatch` says where
each row stands; it is made once per forward, handed down by keyword and shared by all layers. Knows no request.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from triptych.config import KV_BLOCK_TOKENS
from triptych.model.caches import KVRegion

try:
    from triptych.model import attention_triton
except ImportError:  # Triton comes with CUDA builds of torch only
    attention_triton = None  # type: ignore[assignment]

PAGED_ATTENTION = "triptych_paged"
# Towers with packed segments hand them over whole (`cu_seq_lens_q`) only to a name that contains "flash".
SEGMENT_ATTENTION = "triptych_flash_segments"

Ints = npt.NDArray[np.int64]


@dataclass(slots=True)
class SequenceRows:
    """Tokens [start, end) of one sequence, as rows of a flattened forward.

    `blocks` is its block table, with at least ceil(end / 16) entries. `last_visible` gives, per row, the position of the
    last token it may attend to, where that is not its own (pictures that attend to themselves in both directions).
    """

    start: int
    end: int
    blocks: Ints
    last_visible: Ints | None = None


@dataclass(slots=True)
class _DecodePlan:
    """What all layers with one window gather: per layer the pages of K and V, padded to the longest sequence."""

    pages: list[Tensor]  # per layer [2 * num_decodes * width]
    width: int  # blocks per sequence
    kv_len: int  # tokens that the longest sequence sees; the rest of its last block is cut off
    mask: Tensor | None  # [num_decodes, 1, 1, kv_len], 0 or -inf; None if every row sees all of it


@dataclass(slots=True)
class _Chunk:
    """One sequence's rows [row, row + length) with its context."""

    row: int
    rows: SequenceRows
    pages: Tensor  # [1, 1, blocks] pages of K of layer 0

    @property
    def length(self) -> int:
        return self.rows.end - self.rows.start


class AttentionBatch:
    """Where the rows of one flattened forward stand in a KV region.

    The first `num_decodes` sequences have one row each; every other one is a chunk. Valid for one forward.
    """

    def __init__(self, region: KVRegion, sequences: Sequence[SequenceRows], num_decodes: int, dtype: torch.dtype) -> None:
        self.region = region
        self.num_decodes = num_decodes
        self.sequences = sequences
        self.dtype = dtype
        self._decodes = sequences[:num_decodes]
        self._plans: dict[int | None, _DecodePlan] = {}
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}
        layers = region.layout.num_layers
        self._pages_per_block = 2 * layers
        self.write_slots = self._write_slots()
        row = num_decodes
        self.chunks: list[_Chunk] = []
        for rows in sequences[num_decodes:]:
            used = rows.blocks[: -(-rows.end // KV_BLOCK_TOKENS)]
            self.chunks.append(_Chunk(row, rows, self._to_device(used * self._pages_per_block)))
            row += rows.end - rows.start
        self.num_rows = row

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Stores keys and values [num_rows, kv_heads, head_dim] of all rows."""
        slots = self.region.slots
        slots.index_copy_(0, self.write_slots[2 * layer], key)
        slots.index_copy_(0, self.write_slots[2 * layer + 1], value)

    def decode_plan(self, window: int | None) -> _DecodePlan:
        plan = self._plans.get(window)
        if plan is None:
            plan = self._plans[window] = self._make_decode_plan(window)
        return plan

    def context(self, layer: int, chunk: _Chunk) -> tuple[Tensor, Tensor]:
        """Keys and values [1, kv_heads, end, head_dim] of a chunk's sequence, its own rows included."""
        layout = self.region.layout
        pages = torch.cat((chunk.pages + 2 * layer, chunk.pages + (2 * layer + 1)))
        both = self.region.pages.index_select(0, pages).view(2, 1, -1, layout.kv_heads, layout.head_dim)
        both = both[:, :, : chunk.rows.end].transpose(2, 3)
        return both[0], both[1]

    def chunk_mask(self, chunk: _Chunk, window: int | None) -> Tensor | None:
        """What rows of a chunk see of [0, end): [length, end], 0 or -inf; None if that is plain causal from token 0."""
        key = (chunk.row, window)
        if key not in self._masks:
            self._masks[key] = self._make_chunk_mask(chunk.rows, window)
        return self._masks[key]

    def _write_slots(self) -> tuple[Tensor, ...]:
        """Per layer and K or V, the slot of every row: 2 * layers tensors [num_rows]."""
        stride = self._pages_per_block * KV_BLOCK_TOKENS
        last = [rows.end - 1 for rows in self._decodes]
        parts = [
            np.array(
                [
                    int(rows.blocks[i // KV_BLOCK_TOKENS]) * stride + i % KV_BLOCK_TOKENS
                    for rows, i in zip(self._decodes, last, strict=True)
                ],
                np.int64,
            )
        ]
        for rows in self.sequences[self.num_decodes :]:
            tokens = np.arange(rows.start, rows.end)
            parts.append(rows.blocks[tokens // KV_BLOCK_TOKENS] * stride + tokens % KV_BLOCK_TOKENS)
        base = parts[0] if len(parts) == 1 else np.concatenate(parts)
        pages = np.arange(self._pages_per_block)[:, None] * KV_BLOCK_TOKENS
        return self._to_device(base[None] + pages).unbind(0)

    def _make_decode_plan(self, window: int | None) -> _DecodePlan:
        ends = np.array([rows.end for rows in self._decodes], np.int64)
        first_seen = np.maximum(ends - window, 0) if window else np.zeros_like(ends)
        first_block = first_seen // KV_BLOCK_TOKENS
        first = first_block * KV_BLOCK_TOKENS  # position of the first gathered token
        lengths = ends - first
        kv_len = int(lengths.max())
        width = -(-kv_len // KV_BLOCK_TOKENS)
        table = np.zeros((len(ends), width), np.int64)
        for row, rows, begin in zip(table, self._decodes, first_block.tolist(), strict=True):
            seen = rows.blocks[begin : -(-rows.end // KV_BLOCK_TOKENS)]
            row[: len(seen)] = seen
        offsets = np.arange(self._pages_per_block).reshape(-1, 2, 1)
        pages = self._to_device((table.reshape(1, 1, -1) * self._pages_per_block + offsets).reshape(-1, 2 * table.size))
        mask = None
        if (lengths != kv_len).any() or (first_seen != first).any():
            position = np.arange(kv_len)
            seen = (position < lengths[:, None]) & (position >= (first_seen - first)[:, None])
            mask = self._additive(seen)[:, None, None]
        return _DecodePlan(list(pages.unbind(0)), width, kv_len, mask)

    def _make_chunk_mask(self, rows: SequenceRows, window: int | None) -> Tensor | None:
        if rows.start == 0 and rows.last_visible is None and not (window and window < rows.end):
            return None
        query = np.arange(rows.start, rows.end)[:, None]
        key = np.arange(rows.end)[None]
        last = query if rows.last_visible is None else rows.last_visible[:, None]
        seen = key <= last
        if window:
            seen &= key > query - window
        return self._additive(seen)

    def _additive(self, seen: npt.NDArray[np.bool_]) -> Tensor:
        """Made once here; from a boolean mask SDPA would make it again in every layer."""
        hidden = self._to_device(~seen)
        return torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))

    def _to_device(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.region.device, non_blocking=True)


def paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, rows, head_dim]
    key: Tensor,  # [1, kv_heads, rows, head_dim], rotary positions applied
    value: Tensor,
    attention_mask: None,
    *,
    batch: AttentionBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Stores this step's keys and values, then attends over all that the block tables hold: [1, rows, heads, head_dim]."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    batch.write(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    if query.is_cuda and attention_triton is not None:
        return attention_triton.attend(batch, layer, query, scaling, sliding_window), None
    parts = []
    if batch.num_decodes:
        parts.append(_attend_decodes(batch, layer, query, scaling, sliding_window))
    for chunk in batch.chunks:
        parts.append(_attend_chunk(batch, layer, chunk, query, key, value, scaling, sliding_window))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)), None


def _attend_decodes(batch: AttentionBatch, layer: int, query: Tensor, scale: float | None, window: int | None) -> Tensor:
    layout, plan, count = batch.region.layout, batch.decode_plan(window), batch.num_decodes
    both = batch.region.pages.index_select(0, plan.pages[layer])
    both = both.view(2, count, plan.width * KV_BLOCK_TOKENS, layout.kv_heads, layout.head_dim)
    keys, values = both[:, :, : plan.kv_len].transpose(2, 3).unbind(0)
    # The query heads that share a KV head ride as query rows: nothing is repeated.
    queries = query[0, :, :count].transpose(0, 1).reshape(count, layout.kv_heads, -1, layout.head_dim)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=plan.mask, scale=scale)
    return out.reshape(1, count, -1, layout.head_dim)


def _attend_chunk(
    batch: AttentionBatch,
    layer: int,
    chunk: _Chunk,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    window: int | None,
) -> Tensor:
    rows = slice(chunk.row, chunk.row + chunk.length)
    mask = batch.chunk_mask(chunk, window)
    if chunk.rows.start == 0:
        keys, values = key[:, :, rows], value[:, :, rows]
    else:
        keys, values = batch.context(layer, chunk)
    out = F.scaled_dot_product_attention(
        query[:, :, rows], keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def segment_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, rows, head_dim]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Full attention inside each segment; segments of one length run as one batch. Returns [1, rows, heads, head_dim]."""
    heads, head_dim = query.shape[1], query.shape[3]
    plan = _segment_plan(tuple(cu_seq_lens_q.tolist()), str(query.device))
    outputs = []
    for length, rows in plan.groups:
        q, k, v = (x[0] if rows is None else x[0].index_select(1, rows) for x in (query, key, value))
        q, k, v = (x.unflatten(1, (-1, length)).transpose(0, 1) for x in (q, k, v))  # [segments, heads, length, head_dim]
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        outputs.append(out.transpose(1, 2).reshape(-1, heads, head_dim))
    if plan.restore is None:
        return outputs[0][None], None
    return torch.cat(outputs).index_select(0, plan.restore)[None], None


def use_segment_attention(model: PreTrainedModel) -> None:
    """Switches the towers that pack segments of several pictures into one row axis to `segment_attention`."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module is not model and _packs_segments(module):
            module.config._attn_implementation = SEGMENT_ATTENTION


def _packs_segments(module: PreTrainedModel) -> bool:
    parameters = type(module).forward.__code__.co_varnames
    wrapped = getattr(type(module).forward, "__wrapped__", None)
    names = wrapped.__code__.co_varnames if wrapped is not None else parameters
    return "grid_thw" in names


@dataclass(frozen=True)
class _SegmentPlan:
    """Groups of equally long segments: (length, rows of all of them; None for all rows in order)."""

    groups: list[tuple[int, Tensor | None]]
    restore: Tensor | None  # puts the groups' outputs, one after the other, back in order


@lru_cache(maxsize=256)
def _segment_plan(bounds: tuple[int, ...], device: str) -> _SegmentPlan:
    starts, lengths = np.array(bounds[:-1]), np.diff(bounds)
    if (lengths == lengths[0]).all():
        return _SegmentPlan([(int(lengths[0]), None)], None)
    groups, order = [], []
    for length in np.unique(lengths):
        rows = (starts[lengths == length][:, None] + np.arange(length)).reshape(-1)
        groups.append((int(length), torch.from_numpy(rows).to(device)))
        order.append(rows)
    return _SegmentPlan(groups, torch.from_numpy(np.argsort(np.concatenate(order))).to(device))  # type: ignore[arg-type]


AttentionInterface.register(PAGED_ATTENTION, paged_attention)
AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
