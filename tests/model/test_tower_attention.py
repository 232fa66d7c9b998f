"""Segments of packed pictures see themselves only, and towers get what transformers' own attention gives."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from triptych.model.tower_attention import segment_attention, tower_attention

torch.set_num_threads(1)
DIM = 8


@pytest.mark.parametrize("lengths", [[64], [16, 16, 16], [16, 8, 16, 4], [300, 300], [1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_attend_to_themselves_only(lengths: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, sum(lengths), DIM, dtype=dtype)
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    out, _ = segment_attention(torch.nn.Identity(), query, key, value, None, cu_seq_lens_q=bounds, scaling=0.5)
    parts = zip(*(x.float().split(lengths, 2) for x in (query, key, value)), strict=True)
    expected = torch.cat([F.scaled_dot_product_attention(*part, scale=0.5).transpose(1, 2) for part in parts], 1)
    torch.testing.assert_close(out.float(), expected, atol=1e-5 if dtype == torch.float32 else 0.02, rtol=0.02)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tower_sees_its_whole_picture_unless_a_mask_forbids(dtype: torch.dtype, masked: bool) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 20, DIM, dtype=dtype)
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril(5) if masked else None
    out, _ = tower_attention(nn.Identity(), query, key, value, mask, scaling=0.5, is_causal=False)
    expected = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask, scale=0.5)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(out.float(), expected.transpose(1, 2), atol=tolerance, rtol=tolerance)
