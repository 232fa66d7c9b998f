"""Both ways of computing attention give the same, for shared heads, masks and causal rows."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from triptych.model.dense_attention import attend

torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40, 256, 600])
@pytest.mark.parametrize("form", ["full", "causal", "mask"])
def test_attention_equals_that_of_torch_in_float32(dtype: torch.dtype, rows: int, form: str) -> None:
    torch.manual_seed(0)
    num_keys = rows if form == "causal" else rows + 30
    query = torch.randn(2, 6, rows, 16, dtype=dtype)
    key, value = torch.randn(2, 2, 2, num_keys, 16, dtype=dtype)
    mask = None
    if form == "mask":
        mask = torch.zeros(rows, num_keys, dtype=dtype).masked_fill_(torch.rand(rows, num_keys) < 0.5, -torch.inf)
        mask[:, 0] = 0
    causal = form == "causal"
    out = attend(query, key, value, 0.3, mask, causal=causal)
    expected = F.scaled_dot_product_attention(
        *(x.float() for x in (query, key, value)),
        attn_mask=None if mask is None else mask.float(),
        is_causal=causal,
        scale=0.3,
        enable_gqa=True,
    )
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(out.float(), expected, atol=tolerance, rtol=tolerance)
