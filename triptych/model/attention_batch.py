"""Where the rows of one flattened forward stand in a KV region: decodes first, then prefill chunks.

Made once per forward, handed down by keyword and shared by all layers. Knows no request and no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from triptych.config import KV_BLOCK_TOKENS
from triptych.model.caches import KVRegion

_GATHER_BYTES = 2 << 20  # of one group of decode rows: short ones are not padded to the length of long ones

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(slots=True)
class SequenceRows:
    """Tokens [start, end) of one sequence, as rows of a flattened forward.

    `blocks` are those of its KV, at least ceil(end / 16). `last_visible` gives, per row, the position of the last token
    it may attend to, where that is not its own (pictures that attend to themselves both ways).
    """

    start: int
    end: int
    blocks: Ints
    last_visible: Ints | None = None


@dataclass(slots=True)
class DecodeGroup:
    """Rows [first, last), and per layer the pages of their keys and values, padded to the longest."""

    first: int
    last: int
    pages: tuple[Tensor, ...]  # per layer [2 * rows * kv_heads * blocks]
    mask: Tensor  # [rows * kv_heads, 1, blocks * 16], 0 or -inf


@dataclass(slots=True)
class ChunkRows:
    """One sequence's rows [row, row + length) with its context."""

    row: int
    length: int
    rows: SequenceRows
    pages: Tensor | None  # [2, kv_heads, blocks] of layer 0; None if all that it sees are its own rows


class AttentionBatch:
    """Where the rows of one flattened forward stand in a KV region.

    The first `num_decodes` sequences have one row each; every other one is a chunk. Valid for one forward.
    """

    def __init__(self, region: KVRegion, sequences: Sequence[SequenceRows], num_decodes: int) -> None:
        layout = region.layout
        self.region = region
        self.sequences = sequences
        self.num_decodes = num_decodes
        self._decodes = sequences[:num_decodes]
        self._groups: dict[int | None, list[DecodeGroup]] = {}
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}
        self._pages_per_layer = 2 * layout.kv_heads
        self._pages_per_block = self._pages_per_layer * layout.num_layers
        block_bytes = self._pages_per_layer * KV_BLOCK_TOKENS * layout.head_dim * layout.dtype.itemsize
        self._group_blocks = _GATHER_BYTES // block_bytes
        self._slots = self._write_slots()
        if layout.states:
            self._clear_begun_blocks()
        self.device_plan: Any = None  # of the CUDA backend
        self.chunks: list[ChunkRows] = []
        row = num_decodes
        for rows in sequences[num_decodes:]:
            pages = self._context_pages(rows) if rows.start else None
            self.chunks.append(ChunkRows(row, rows.end - rows.start, rows, pages))
            row += rows.end - rows.start

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Stores keys and values [rows, kv_heads, head_dim]."""
        slots, head_dim = self.region.slots, key.shape[2]
        slots.index_copy_(0, self._slots[2 * layer], key.reshape(-1, head_dim))
        slots.index_copy_(0, self._slots[2 * layer + 1], value.reshape(-1, head_dim))

    def decode_groups(self, window: int | None) -> list[DecodeGroup]:
        """All decode rows, in groups that are gathered and attended to together."""
        groups = self._groups.get(window)
        if groups is None:
            groups = self._groups[window] = self._make_decode_groups(window)
        return groups

    def context(self, layer: int, chunk: ChunkRows) -> tuple[Tensor, Tensor]:
        """Keys and values [1, kv_heads, end, head_dim] of a chunk's sequence, its own rows included."""
        assert chunk.pages is not None
        pages = (chunk.pages + layer * self._pages_per_layer).view(-1)
        both = self.region.gather(pages)
        both = both.view(2, 1, self.region.layout.kv_heads, -1, self.region.layout.head_dim)
        return both[0, :, :, : chunk.rows.end], both[1, :, :, : chunk.rows.end]

    def chunk_mask(self, chunk: ChunkRows, window: int | None, *, needs_causal: bool = True) -> Tensor | None:
        """What rows of a chunk see of [0, end): [length, end], 0 or -inf. None if that is plain causal and the chunk
        starts at token 0, or, without `needs_causal`, anywhere."""
        key = (chunk.row, window)
        if key not in self._masks:
            self._masks[key] = self._make_chunk_mask(chunk.rows, window, needs_causal)
        return self._masks[key]

    def _clear_begun_blocks(self) -> None:
        """Zeroes the blocks that this forward fills in part, because their rest is gathered too, with weight 0.

        Old keys and values do no harm there, but what a block held of a state need not be a number in their type.
        """
        last = [(rows, (rows.end - 1) // KV_BLOCK_TOKENS) for rows in self.sequences]
        begun = [rows.blocks[block] for rows, block in last if rows.start <= block * KV_BLOCK_TOKENS]
        if begun:
            self.region.blocks.index_fill_(0, self._to_device(np.array(begun)), 0)

    def _write_slots(self) -> tuple[Tensor, ...]:
        """Per layer, for K and for V, the slots of all rows and heads: 2 * layers tensors [rows * kv_heads]."""
        pages, offsets = [], []
        for rows in self.sequences:
            if rows.end - rows.start == 1:
                block, offset = divmod(rows.start, KV_BLOCK_TOKENS)
                pages.append(rows.blocks[block : block + 1])
                offsets.append(np.array([offset]))
            else:
                tokens = np.arange(rows.start, rows.end)
                pages.append(rows.blocks[tokens // KV_BLOCK_TOKENS])
                offsets.append(tokens % KV_BLOCK_TOKENS)
        first = np.concatenate(pages) * self._pages_per_block
        heads = np.arange(self.region.layout.kv_heads) * KV_BLOCK_TOKENS
        slots = (first * KV_BLOCK_TOKENS + np.concatenate(offsets))[:, None] + heads
        parts = np.arange(2 * self.region.layout.num_layers) * (self.region.layout.kv_heads * KV_BLOCK_TOKENS)
        return self._to_device(slots.reshape(1, -1) + parts[:, None]).unbind(0)

    def _make_decode_groups(self, window: int | None) -> list[DecodeGroup]:
        first_seen = [max(0, rows.end - window) if window else 0 for rows in self._decodes]
        first_block = [seen // KV_BLOCK_TOKENS for seen in first_seen]
        blocks = [-(-rows.end // KV_BLOCK_TOKENS) - b for rows, b in zip(self._decodes, first_block, strict=True)]
        groups, start, longest = [], 0, 0
        for row, count in enumerate(blocks):
            longest = max(longest, count)
            if row > start and longest * (row + 1 - start) > self._group_blocks:
                groups.append(self._make_decode_group(start, row, first_seen, first_block))
                start, longest = row, count
        groups.append(self._make_decode_group(start, len(blocks), first_seen, first_block))
        return groups

    def _make_decode_group(self, first: int, last: int, first_seen: list[int], first_block: list[int]) -> DecodeGroup:
        layout = self.region.layout
        tables = [
            rows.blocks[begin : -(-rows.end // KV_BLOCK_TOKENS)]
            for rows, begin in zip(self._decodes[first:last], first_block[first:last], strict=True)
        ]
        table = np.empty((last - first, max(map(len, tables))), np.int64)
        for row, blocks in zip(table, tables, strict=True):
            row[: len(blocks)] = blocks
            row[len(blocks) :] = blocks[0]  # hidden by the mask, yet read: so it must hold numbers
        heads = np.arange(layout.kv_heads)[:, None]
        pages = (table[:, None] * self._pages_per_block + heads).reshape(-1)  # K of layer 0
        parts = np.arange(2 * layout.num_layers) * layout.kv_heads
        per_layer = self._to_device(pages + parts[:, None]).view(layout.num_layers, -1)
        # Positions count from the first gathered token.
        origin = np.array(first_block[first:last]) * KV_BLOCK_TOKENS
        position = np.arange(table.shape[1] * KV_BLOCK_TOKENS)
        ends = np.array([rows.end for rows in self._decodes[first:last]]) - origin
        begins = np.array(first_seen[first:last]) - origin
        seen = (position < ends[:, None]) & (position >= begins[:, None])
        mask = self._additive(seen.repeat(layout.kv_heads, 0))[:, None]
        return DecodeGroup(first, last, per_layer.unbind(0), mask)

    def _context_pages(self, rows: SequenceRows) -> Tensor:
        used = rows.blocks[: -(-rows.end // KV_BLOCK_TOKENS)] * self._pages_per_block
        heads = np.arange(2 * self.region.layout.kv_heads).reshape(2, -1, 1)
        return self._to_device(used + heads)

    def _make_chunk_mask(self, rows: SequenceRows, window: int | None, needs_causal: bool) -> Tensor | None:
        is_causal = rows.last_visible is None and not (window and window < rows.end)
        if is_causal and (rows.start == 0 or not needs_causal):
            return None
        query = np.arange(rows.start, rows.end)[:, None]
        key = np.arange(rows.end)[None]
        seen: Bools = key <= (query if rows.last_visible is None else rows.last_visible[:, None])
        if window:
            seen &= key > query - window
        return self._additive(seen)

    def _additive(self, seen: Bools) -> Tensor:
        """Made once here; from a boolean mask SDPA would make it again in every layer."""
        hidden = self._to_device(~seen)
        return torch.zeros(hidden.shape, dtype=self.region.layout.dtype, device=hidden.device).masked_fill_(
            hidden, float("-inf")
        )

    def _to_device(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.region.device, non_blocking=True)
