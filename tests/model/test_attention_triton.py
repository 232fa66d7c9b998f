"""The Triton kernel equals dense attention; it runs on CPU through Triton's interpreter, in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
CHECK = """
import torch
from triton.runtime import interpreter

patch_tensor = interpreter._patch_lang_tensor
def patch_tensor_for_numpy_2_4(tensor, scope):  # Triton 3.6 still converts arrays of one element by int()
    patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
interpreter._patch_lang_tensor = patch_tensor_for_numpy_2_4
from types import SimpleNamespace
from tests.model import test_attention as dense
from triptych.model import attention_triton

def paged(module, query, key, value, mask, *, batch, scaling, sliding_window):
    batch.write(module.layer_idx, key[0].transpose(0, 1), value[0].transpose(0, 1))
    return attention_triton.attend(batch, module.layer_idx, query, scaling, sliding_window), None

dense.paged_attention = paged
attention_triton._MIN_KEYS_PER_SPLIT = 16
torch.manual_seed(0)
for window in (None, 1, 20, 40):
    region = dense.KVRegion.allocate(dense.LAYOUT, 40)
    region.blocks.fill_(1e3)
    a, b = dense.History(83, [9, 1, 30, 4, 7, 2]), dense.History(40, [5, 0, 3], group=(9, 21))
    dense.check_step(region, [(a, 0, 33), (b, 0, 7)], window)
    dense.check_step(region, [(a, 33, 80), (b, 7, 30)], window)
    dense.check_step(region, [(a, 80, 81), (b, 30, 36)], window)
    dense.check_step(region, [(a, 81, 82), (b, 36, 37)], window)
    dense.check_step(region, [(a, 82, 83)], window)
print("equal")
"""


@needs_triton
def test_the_kernel_equals_dense_attention_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_compiled_kernel_equals_dense_attention() -> None:
    code = CHECK.replace("import torch\n", "import torch\ntorch.set_default_device('cuda')\n", 1)
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-3000:]
