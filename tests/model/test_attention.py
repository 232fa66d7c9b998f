"""Paged attention equals plain attention over the whole sequence, whatever shares the forward."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.model import attention_batch
from triptych.model.attention import paged_attention
from triptych.model.attention_batch import AttentionBatch, SequenceRows
from triptych.model.caches import KVLayout, KVRegion

torch.set_num_threads(1)
HEADS, KV_HEADS, DIM, LAYERS = 6, 2, 8, 2
LAYOUT = KVLayout(LAYERS, KV_HEADS, DIM, torch.float32)
MODULES = [SimpleNamespace(layer_idx=layer) for layer in range(LAYERS)]


class History:
    """One sequence's queries, keys and values, and its blocks."""

    def __init__(self, length: int, blocks: list[int], group: tuple[int, int] | None = None) -> None:
        self.query = torch.randn(LAYERS, length, HEADS, DIM)
        self.key, self.value = torch.randn(2, LAYERS, length, KV_HEADS, DIM)
        self.blocks = np.array(blocks, np.int64)
        self.last_visible = np.arange(length)
        self.grouped = group is not None
        if group is not None:
            self.last_visible[group[0] : group[1]] = group[1] - 1

    def rows(self, start: int, end: int) -> SequenceRows:
        return SequenceRows(start, end, self.blocks, self.last_visible[start:end] if self.grouped else None)

    def expected(self, layer: int, start: int, end: int, window: int | None) -> torch.Tensor:
        """[end - start, heads, dim] from one dense computation."""
        key, value = (x[layer, :end].repeat_interleave(HEADS // KV_HEADS, 1) for x in (self.key, self.value))
        scores = torch.einsum("qhd,khd->hqk", self.query[layer, start:end], key) * DIM**-0.5
        position = torch.arange(end)[None]
        seen = position <= torch.from_numpy(self.last_visible[start:end])[:, None]
        if window:
            seen &= position > torch.arange(start, end)[:, None] - window
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value)


def run_step(region: KVRegion, work: list[tuple[History, int, int]], window: int | None) -> list[list[torch.Tensor]]:
    """Per layer the outputs of each sequence's rows [start, end)."""
    decodes = sum(end - start == 1 for _, start, end in work)
    batch = AttentionBatch(region, [history.rows(start, end) for history, start, end in work], decodes)
    outputs = []
    for layer, module in enumerate(MODULES):
        query, key, value = (
            torch.cat([getattr(h, name)[layer, start:end] for h, start, end in work]).transpose(0, 1)[None]
            for name in ("query", "key", "value")
        )
        out, _ = paged_attention(module, query, key, value, None, batch=batch, scaling=DIM**-0.5, sliding_window=window)
        outputs.append(list(out[0].split([end - start for _, start, end in work])))
    return outputs


def check_step(region: KVRegion, work: list[tuple[History, int, int]], window: int | None) -> None:
    work = sorted(work, key=lambda item: item[2] - item[1] > 1)
    for layer, outputs in enumerate(run_step(region, work, window)):
        for (history, start, end), out in zip(work, outputs, strict=True):
            torch.testing.assert_close(out, history.expected(layer, start, end, window), atol=2e-5, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 70), min_size=1, max_size=5),
    cuts=st.lists(st.integers(1, 69), min_size=5, max_size=5),
    window=st.sampled_from([None, 1, 7, 16, 40]),
    group_bytes=st.sampled_from([1, 4096, 1 << 21]),
    seed=st.integers(0, 1000),
)
def test_chunks_then_mixed_steps_then_decodes_see_exactly_their_own_sequence(
    lengths: list[int], cuts: list[int], window: int | None, group_bytes: int, seed: int
) -> None:
    torch.manual_seed(seed)
    scattered = np.random.default_rng(seed).permutation(40).tolist()
    region = KVRegion.allocate(LAYOUT, 40)
    region.blocks.fill_(1e3)  # what was not written must not leak into a result
    histories = [History(n + 2, [scattered.pop() for _ in range(-(-(n + 2) // 16))]) for n in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_batch, "_GATHER_BYTES", group_bytes)
        middles = [min(cut, n - 1) for cut, n in zip(cuts, lengths, strict=False)]
        check_step(region, [(h, 0, m) for h, m in zip(histories, middles, strict=True)], window)
        check_step(region, [(h, m, n) for h, m, n in zip(histories, middles, lengths, strict=True)], window)
        check_step(region, [(h, n, n + 1) for h, n in zip(histories, lengths, strict=True)], window)
        late = [(h, n + 1, n + 2) for h, n in zip(histories, lengths, strict=True)]
        check_step(region, late, window)


@pytest.mark.parametrize("window", [None, 6])
def test_tokens_of_a_picture_see_all_of_it_and_text_before_it(window: int | None) -> None:
    torch.manual_seed(0)
    region = KVRegion.allocate(LAYOUT, 8)
    history = History(40, [5, 0, 3], group=(9, 21))
    check_step(region, [(history, 0, 7)], window)
    check_step(region, [(history, 7, 30), (History(12, [1], group=(2, 9)), 0, 12)], window)
    check_step(region, [(history, 30, 31)], window)


def test_a_wrong_block_table_changes_the_result() -> None:
    torch.manual_seed(0)
    region = KVRegion.allocate(LAYOUT, 8)
    history = History(40, [5, 0, 3])
    check_step(region, [(history, 0, 39)], None)
    history.blocks = np.array([5, 1, 3])
    with pytest.raises(AssertionError):
        check_step(region, [(history, 39, 40)], None)
