"""The lighter sub-modules compute what the originals compute."""

import pytest
import torch
from torch import nn

from triptych.model.tuning import PackedLinear, PatchProjection, tune

torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "size"), [(1, (24, 16)), (300, (24, 16)), (5, (800, 700))])
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_packed_linear_equals_the_plain_one(dtype: torch.dtype, rows: int, size: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(size[1], size[0], bias=bias, dtype=dtype)
    packed = PackedLinear(plain.weight, plain.bias)
    pixels = torch.randn(2, rows, size[1], dtype=dtype)
    assert packed.weight.shape == plain.weight.shape
    assert packed.weight.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(packed(pixels), plain(pixels), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv2d(3, 5, 4, 4), (2, 3, 8, 12)),
        (nn.Conv2d(3, 5, (4, 2), (4, 2), bias=False), (1, 3, 10, 5)),  # the rest beyond whole patches is cut off
        (nn.Conv3d(3, 5, (2, 4, 4), (2, 4, 4)), (7, 3, 2, 4, 4)),
    ],
)
@torch.inference_mode()
def test_a_patch_projection_equals_the_convolution(conv: nn.Conv2d | nn.Conv3d, shape: tuple[int, ...]) -> None:
    pixels = torch.randn(shape)
    torch.testing.assert_close(PatchProjection(conv)(pixels), conv(pixels), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_tuning_leaves_overlapping_convolutions_and_the_result_of_a_model_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 1), nn.Conv2d(4, 6, 2, 2), nn.Flatten(2), nn.Linear(9, 5), nn.LayerNorm(5))
    pixels = torch.randn(2, 3, 8, 8)
    expected = model(pixels)
    tune(model)
    assert isinstance(model[0], nn.Conv2d)
    assert isinstance(model[1], PatchProjection)
    assert isinstance(model[3], PackedLinear)
    torch.testing.assert_close(model(pixels), expected, atol=1e-5, rtol=1e-5)
