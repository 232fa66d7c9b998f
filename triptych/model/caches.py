"""The tensors over an instance's slab: the KV region and the embedding region, cut into blocks.

    KV region         [num_blocks, layers, 2, kv_heads, 16, head_dim]    one block = one contiguous run over all layers
    embedding region  [num_blocks, 16, row_width]                        row_width = hidden * (1 + deepstack layers)

Where a model has linear-attention layers, the first blocks of a sequence hold their states instead of KV.
Knows nothing of who owns which block; block ids come from outside.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from triptych.config import EMBEDDING_BLOCK_TOKENS, KV_BLOCK_TOKENS


@dataclass(frozen=True)
class LayerState:
    """One tensor that a linear-attention layer keeps of a sequence, whatever its length, instead of keys and values."""

    layer: int  # counts all layers of the model
    name: str  # conv or recurrent
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize

    @property
    def layout(self) -> str:
        return _layout_string(self.name, self.shape, self.dtype)


@dataclass(frozen=True)
class KVLayout:
    """Shape of what a model keeps of a sequence: KV per token, and states of a fixed size where it has such layers.

    The first `state_blocks` blocks of a sequence hold `states`, each one in whole pages of 16 * head_dim elements of
    `dtype`; the KV of token i is in the block at `state_blocks + i // 16`.
    """

    num_layers: int  # with keys and values
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    states: tuple[LayerState, ...] = ()

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.kv_heads, KV_BLOCK_TOKENS, self.head_dim)

    @property
    def block_bytes(self) -> int:
        return self.num_layers * 2 * KV_BLOCK_TOKENS * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        return KV_BLOCK_TOKENS * self.head_dim * self.dtype.itemsize

    @property
    def pages_per_block(self) -> int:
        return self.num_layers * 2 * self.kv_heads

    @cached_property
    def state_pages(self) -> dict[LayerState, range]:
        """The pages of each state, counted through the state blocks of a sequence."""
        pages, first = {}, 0
        for state in self.states:
            pages[state] = range(first, first + -(-state.num_bytes // self.page_bytes))
            first = pages[state].stop
        return pages

    @property
    def state_blocks(self) -> int:
        """Blocks of a sequence that hold its states; 0 for a model whose layers all have keys and values."""
        num_pages = max((pages.stop for pages in self.state_pages.values()), default=0)
        return -(-num_pages // self.pages_per_block)

    @cached_property
    def slots(self) -> dict[int, int]:
        """For each layer of the model that has keys and values, its place in a block."""
        without = {state.layer for state in self.states}
        layers = (layer for layer in range(self.num_layers + len(without)) if layer not in without)
        return {layer: slot for slot, layer in enumerate(layers)}

    @property
    def layout(self) -> str:
        """Equal strings mean that one instance's blocks can be read as another's."""
        states = Counter(state.layout for state in self.states)
        counted = [f"{count}x{layout}" for layout, count in states.items()]
        return "+".join([_layout_string("kv", self.block_shape, self.dtype), *counted])


@dataclass(frozen=True)
class EmbeddingLayout:
    """Shape of the rows that the encoder gives to the language model."""

    row_width: int
    dtype: torch.dtype

    @property
    def block_shape(self) -> tuple[int, int]:
        return (EMBEDDING_BLOCK_TOKENS, self.row_width)

    @property
    def block_bytes(self) -> int:
        return EMBEDDING_BLOCK_TOKENS * self.row_width * self.dtype.itemsize

    @property
    def layout(self) -> str:
        return _layout_string("embedding", self.block_shape, self.dtype)


class _Layout(Protocol):
    @property
    def block_shape(self) -> tuple[int, ...]: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...


class KVRegion:
    """A slab's KV part as tensors. All are views of the same bytes.

    blocks  [num_blocks, layers, 2, kv_heads, 16, head_dim]
    pages   [num_blocks * layers * 2 * kv_heads, 16 * head_dim]  tokens of a block in one layer and head: keys or values
    slots   [num_blocks * layers * 2 * kv_heads * 16, head_dim]  one token of a page

    A gather of pages gives [.., kv_heads, tokens, head_dim] without a further copy: what batched products want.
    """

    def __init__(self, buffer: Tensor, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.blocks = _carve(buffer, layout, num_blocks)
        self.pages = self.blocks.view(-1, KV_BLOCK_TOKENS * layout.head_dim)
        self.slots = self.blocks.view(-1, layout.head_dim)
        self._gathered = self.pages[:0]

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    def gather(self, pages: Tensor) -> Tensor:
        """Copies of pages [len(pages), 16 * head_dim], in one buffer that lives on: valid until the next call."""
        count = pages.shape[0]
        if self._gathered.shape[0] < count:
            self._gathered = self.pages.new_empty(count + count // 4, self.pages.shape[1])
        return torch.index_select(self.pages, 0, pages, out=self._gathered[:count])

    @classmethod
    def allocate(cls, layout: KVLayout, num_blocks: int, device: torch.device | str = "cpu") -> "KVRegion":
        """A region with memory of its own, for tests and measurements."""
        return cls(torch.zeros(num_blocks * layout.block_bytes, dtype=torch.uint8, device=device), layout, num_blocks)


class EmbeddingRegion:
    """A slab's embedding part: `blocks` [num_blocks, 16, row_width], `rows` [num_blocks * 16, row_width]."""

    def __init__(self, buffer: Tensor, layout: EmbeddingLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.blocks = _carve(buffer, layout, num_blocks)
        self.rows = self.blocks.view(-1, layout.row_width)

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    @classmethod
    def allocate(
        cls, layout: EmbeddingLayout, num_blocks: int, device: torch.device | str = "cpu"
    ) -> "EmbeddingRegion":
        """A region with memory of its own, for tests and measurements."""
        return cls(torch.zeros(num_blocks * layout.block_bytes, dtype=torch.uint8, device=device), layout, num_blocks)


def blocks_that_fit(num_bytes: int, layout: KVLayout | EmbeddingLayout) -> int:
    return num_bytes // layout.block_bytes


def _carve(buffer: Tensor, layout: _Layout, num_blocks: int) -> Tensor:
    assert buffer.dtype == torch.uint8, f"slab is {buffer.dtype}, not bytes"
    assert buffer.dim() == 1, f"slab has {buffer.dim()} dimensions"
    needed = num_blocks * layout.block_bytes
    assert buffer.numel() >= needed, f"{buffer.numel()} bytes for {num_blocks} blocks of {layout.block_bytes}"
    return buffer[:needed].view(layout.dtype).view(num_blocks, *layout.block_shape)


def _layout_string(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{name}:{'x'.join(map(str, shape))}:{str(dtype).removeprefix('torch.')}"
