# ruff: noqa: N803, SIM108 - Triton's compile-time arguments are written in capitals; its language has few expressions
"""Paged attention on CUDA: one Triton kernel for prefill chunks and decodes, split along the keys when decodes are few.

A tile is some query tokens of one sequence times all query heads that share a KV head, so that keys are read once for
them. Importing this module needs Triton. Knows the layout of KVRegion and nothing of models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.config import KV_BLOCK_TOKENS

if TYPE_CHECKING:
    from triptych.model.attention_batch import AttentionBatch

_BLOCK_N = 64  # keys per step of a tile
_MIN_ROWS = 16  # the smallest tile of a tensor-core product
_CHUNK_ROWS = 64
_MIN_KEYS_PER_SPLIT = 256
_MAX_SPLITS = 32
_LOG2_E = 1.4426950408889634


@dataclass(slots=True)
class Plan:
    """What all layers of a forward share, on the device."""

    tiles: Tensor  # [2, num_tiles] int32: sequence, first query token within it
    sequences: Tensor  # [3, num_sequences] int32: first row, position of the first row, tokens in all
    tables: Tensor  # [num_sequences, width] int32
    last_visible: Tensor  # [rows] int32; one unused element if no picture attends to itself
    grouped: bool
    block_rows: int
    num_splits: int


def attend(batch: AttentionBatch, layer: int, query: Tensor, scale: float, window: int | None) -> Tensor:
    """query [1, heads, rows, head_dim] -> [1, rows, heads, head_dim]. The rows' keys and values are already stored."""
    if batch.device_plan is None:
        batch.device_plan = make_plan(batch, query)
    plan: Plan = batch.device_plan
    layout = batch.region.layout
    _, heads, rows, head_dim = query.shape
    out = query.new_empty(1, rows, heads, head_dim)
    splits = plan.num_splits
    partial = query.new_empty(splits if splits > 1 else 0, rows, heads, head_dim, dtype=torch.float32)
    log_sums = query.new_empty(splits if splits > 1 else 0, rows, heads, dtype=torch.float32)
    head_elements = KV_BLOCK_TOKENS * head_dim
    part_elements = layout.kv_heads * head_elements
    _attend_tile[(plan.tiles.shape[1], layout.kv_heads, splits)](
        query,
        batch.region.blocks,
        out,
        partial,
        log_sums,
        plan.tiles,
        plan.sequences,
        plan.tables,
        plan.last_visible,
        scale * _LOG2_E,
        window or 0,
        query.stride(2),
        query.stride(1),
        rows,
        plan.tiles.shape[1],
        plan.tables.shape[0],
        plan.tables.shape[1],
        2 * layout.num_layers * part_elements,
        2 * layer * part_elements,
        part_elements,
        GROUP=heads // layout.kv_heads,
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
        BLOCK_M=plan.block_rows,
        BLOCK_N=_BLOCK_N,
        PAGE=KV_BLOCK_TOKENS,
        GROUPED=plan.grouped,
        SPLITS=splits,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=4,
        num_stages=2,  # three would not fit the shared memory of every card in float32
    )
    if splits > 1:
        weights = log_sums.mul_(1 / _LOG2_E).softmax(0)
        out.copy_((partial * weights[..., None]).sum(0)[None])
    return out


def make_plan(batch: AttentionBatch, query: Tensor) -> Plan:
    """Lays tiles over the rows of a batch, and decides how many programs share the keys of one tile."""
    group = query.shape[1] // batch.region.layout.kv_heads
    only_decodes = not batch.chunks
    block_rows = max(_MIN_ROWS if only_decodes else _CHUNK_ROWS, triton.next_power_of_2(group))
    tokens_per_tile = block_rows // group
    lengths = [rows.end - rows.start for rows in batch.sequences]
    tiles = [(i, first) for i, length in enumerate(lengths) for first in range(0, length, tokens_per_tile)]
    starts = [rows.start for rows in batch.sequences]
    ends = [rows.end for rows in batch.sequences]
    first_rows = np.cumsum([0, *lengths[:-1]])
    widths = [-(-end // KV_BLOCK_TOKENS) for end in ends]
    tables = np.zeros((len(ends), max(widths)), np.int32)
    for row, rows, width in zip(tables, batch.sequences, widths, strict=True):
        row[:width] = rows.blocks[:width]
    grouped = any(rows.last_visible is not None for rows in batch.sequences)
    visible = np.zeros(1, np.int32)
    if grouped:
        parts = [np.arange(r.start, r.end) if r.last_visible is None else r.last_visible for r in batch.sequences]
        visible = np.concatenate(parts).astype(np.int32)
    splits = _num_splits(len(tiles) * batch.region.layout.kv_heads, max(ends), query.device) if only_decodes else 1
    return Plan(
        tiles=_to_device(np.array(tiles, np.int32).T, query.device),
        sequences=_to_device(np.array([first_rows, starts, ends], np.int32), query.device),
        tables=_to_device(tables, query.device),
        last_visible=_to_device(visible, query.device),
        grouped=grouped,
        block_rows=block_rows,
        num_splits=splits,
    )


def _num_splits(programs: int, longest: int, device: torch.device) -> int:
    """Enough programs for two on every multiprocessor, but no fewer keys for one than pay for joining the results."""
    if device.type != "cuda":
        return min(4, max(1, longest // _MIN_KEYS_PER_SPLIT))
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count // programs
    return max(1, min(wanted, longest // _MIN_KEYS_PER_SPLIT, _MAX_SPLITS))


def _to_device(array: np.ndarray[tuple[int, ...], np.dtype[np.int32]], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


@triton.jit  # type: ignore[untyped-decorator]
def _attend_tile(  # type: ignore[no-untyped-def]
    query,
    blocks,
    out,
    partial,
    log_sums,
    tiles,
    sequences,
    tables,
    last_visible,
    scale,  # times log2(e): exponentials have base 2
    window,  # 0: none
    query_row_stride,
    query_head_stride,
    num_rows,
    num_tiles,
    num_sequences,
    table_width,
    block_stride,
    key_offset,  # of the layer, within a block
    value_offset,  # of values behind keys
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    GROUPED: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(tiles + tile)
    first_token = tl.load(tiles + num_tiles + tile)
    first_row = tl.load(sequences + sequence)
    start = tl.load(sequences + num_sequences + sequence)
    end = tl.load(sequences + 2 * num_sequences + sequence)

    m = tl.arange(0, BLOCK_M)
    token = first_token + m // GROUP  # query token within the sequence's rows
    head = kv_head * GROUP + m % GROUP
    valid = (m < BLOCK_M // GROUP * GROUP) & (start + token < end)
    row = first_row + token
    position = start + token
    if GROUPED:
        visible = tl.load(last_visible + row, mask=valid, other=0)
    else:
        visible = position

    d = tl.arange(0, BLOCK_D)
    in_dim = d < HEAD_DIM
    q = tl.load(
        query + row[:, None] * query_row_stride + head[:, None] * query_head_stride + d[None, :],
        mask=valid[:, None] & in_dim[None, :],
        other=0.0,
    )

    low = 0
    if window > 0:
        low = tl.maximum(start + first_token - window + 1, 0) // BLOCK_N * BLOCK_N
    high = tl.max(tl.where(valid, visible, 0), 0) + 1
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(high - low, SPLITS), BLOCK_N) * BLOCK_N
        low = low + split * share
        high = tl.minimum(low + share, high)

    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    n = tl.arange(0, BLOCK_N)
    for first_key in range(low, high, BLOCK_N):
        key_position = first_key + n
        exists = key_position < high
        block = tl.load(tables + sequence * table_width + key_position // PAGE, mask=exists, other=0).to(tl.int64)
        place = block * block_stride + key_offset + (kv_head * PAGE + key_position % PAGE) * HEAD_DIM
        k = tl.load(blocks + place[None, :] + d[:, None], mask=exists[None, :] & in_dim[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        seen = exists[None, :] & (key_position[None, :] <= visible[:, None])
        if window > 0:
            seen = seen & (key_position[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        anchor = tl.where(new_best == float("-inf"), 0.0, new_best)  # rows that have seen nothing yet stay at zero
        weights = tl.exp2(scores - anchor[:, None])
        shrink = tl.exp2(best - anchor)
        v = tl.load(
            blocks + place[:, None] + value_offset + d[None, :], mask=exists[:, None] & in_dim[None, :], other=0.0
        )
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        total = total * shrink + tl.sum(weights, 1)
        best = new_best

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    place_out = (row * HEADS + head)[:, None] * HEAD_DIM + d[None, :]
    store = valid[:, None] & in_dim[None, :]
    if SPLITS > 1:
        tl.store(partial + split * num_rows * HEADS * HEAD_DIM + place_out, acc, mask=store)
        tl.store(log_sums + (split * num_rows + row) * HEADS + head, best + tl.log2(total), mask=valid)
    else:
        tl.store(out + place_out, acc.to(out.dtype.element_ty), mask=store)
