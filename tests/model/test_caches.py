"""Regions are views of slab bytes; a block is one contiguous run of them. States take whole pages of whole blocks."""

import pytest
import torch

from triptych.model.caches import EmbeddingLayout, EmbeddingRegion, KVLayout, KVRegion, LayerState, blocks_that_fit

LAYOUT = KVLayout(num_layers=3, kv_heads=2, head_dim=8, dtype=torch.float32)
STATES = (
    LayerState(0, "conv", (24, 4), torch.float32),
    LayerState(0, "recurrent", (4, 8, 8), torch.float32),
    LayerState(2, "conv", (24, 4), torch.float32),
    LayerState(2, "recurrent", (4, 8, 8), torch.float32),
)
HYBRID = KVLayout(2, 2, 8, torch.float32, STATES)  # of layers 1 and 3
ROWS = EmbeddingLayout(row_width=24, dtype=torch.bfloat16)


def test_block_bytes_cover_all_layers_keys_and_values() -> None:
    assert LAYOUT.block_bytes == 3 * 2 * 16 * 2 * 8 * 4
    assert ROWS.block_bytes == 16 * 24 * 2
    assert blocks_that_fit(10 * LAYOUT.block_bytes + 1, LAYOUT) == 10


def test_a_kv_block_is_one_contiguous_run_of_the_slab() -> None:
    slab = torch.zeros(4 * LAYOUT.block_bytes, dtype=torch.uint8)
    region = KVRegion(slab, LAYOUT, 4)
    region.blocks[2] = 1.0
    written = slab.view(torch.float32).view(4, -1).ne(0)
    assert written[2].all()
    assert written.sum() == LAYOUT.block_bytes // 4


def test_pages_and_slots_are_the_tokens_of_a_block_layer_part_and_head() -> None:
    region = KVRegion.allocate(LAYOUT, 4)
    block, layer, part, head, token = 3, 1, 1, 0, 5
    region.blocks[block, layer, part, head, token] = 7.0
    page = ((block * 3 + layer) * 2 + part) * 2 + head
    assert region.pages[page].view(16, 8)[token].eq(7.0).all()
    assert region.slots[page * 16 + token].eq(7.0).all()


def test_gathered_pages_are_copies_in_the_order_asked() -> None:
    region = KVRegion.allocate(LAYOUT, 2)
    region.pages.copy_(torch.arange(len(region.pages))[:, None].expand_as(region.pages))
    assert region.gather(torch.tensor([5, 1]))[:, 0].tolist() == [5, 1]
    assert region.gather(torch.tensor([2]))[:, 0].tolist() == [2]


def test_states_take_whole_pages_one_after_the_other_and_as_many_blocks_as_those_fill() -> None:
    assert HYBRID.page_bytes == 16 * 8 * 4
    assert [state.num_bytes for state in STATES] == [384, 1024, 384, 1024]
    assert list(HYBRID.state_pages.values()) == [range(1), range(1, 3), range(3, 4), range(4, 6)]
    assert HYBRID.pages_per_block == 8
    assert HYBRID.state_blocks == 1
    assert KVLayout(1, 2, 8, torch.float32, STATES).state_blocks == 2
    assert LAYOUT.state_blocks == 0


def test_layers_with_keys_and_values_are_counted_without_those_with_states() -> None:
    assert HYBRID.slots == {1: 0, 3: 1}
    assert LAYOUT.slots == {0: 0, 1: 1, 2: 2}


def test_rows_of_a_unit_fill_its_blocks_in_order() -> None:
    region = EmbeddingRegion.allocate(ROWS, 3)
    region.rows[17] = 1.0
    assert region.blocks[1, 1].eq(1.0).all()


def test_layouts_that_differ_in_anything_have_different_strings() -> None:
    layouts = [
        LAYOUT,
        KVLayout(3, 2, 8, torch.bfloat16),
        KVLayout(3, 1, 16, torch.float32),
        KVLayout(2, 2, 8, torch.float32),
        HYBRID,
        KVLayout(2, 2, 8, torch.float32, STATES[:3]),
        ROWS,
        EmbeddingLayout(48, torch.bfloat16),
    ]
    assert len({layout.layout for layout in layouts}) == len(layouts)


def test_a_slab_that_is_too_small_is_a_bug_with_numbers() -> None:
    with pytest.raises(AssertionError, match=f"4 blocks of {LAYOUT.block_bytes}"):
        KVRegion(torch.zeros(100, dtype=torch.uint8), LAYOUT, 4)
