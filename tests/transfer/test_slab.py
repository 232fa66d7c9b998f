import os

import pytest
import torch

from triptych.errors import ConfigError
from triptych.transfer.slab import ALIGNMENT, Slab, available_bytes, slab_bytes

SIZES = {"kv": (3000, 5, "kv"), "embedding": (100, 7, "embedding")}


def test_regions_are_page_aligned_and_do_not_overlap() -> None:
    slab = Slab("triptych-test", slab_bytes(SIZES))
    kv, embedding = slab.carve(SIZES).values()
    assert (kv.offset, embedding.offset, slab.nbytes) == (0, 4 * ALIGNMENT, 5 * ALIGNMENT)
    slab.region_tensor("kv").fill_(1)
    slab.region_tensor("embedding").fill_(2)
    assert int(slab.tensor.sum()) == 3000 * 5 + 100 * 7 * 2
    slab.close()


def test_a_region_tensor_is_a_view_of_the_slab() -> None:
    slab = Slab("triptych-test", slab_bytes(SIZES))
    slab.carve(SIZES)
    kv = slab.region_tensor("kv")
    assert (kv.dtype, kv.shape, kv.data_ptr()) == (torch.uint8, (15000,), slab.address)
    slab.close()


def test_a_live_slab_is_carved_again() -> None:
    slab = Slab("triptych-test", slab_bytes(SIZES))
    slab.carve(SIZES)
    slab.tensor.fill_(9)
    slab.carve({"embedding": (1000, 20, "embedding")})
    assert set(slab.regions) == {"embedding"}
    assert slab.region_tensor("embedding").eq(9).all()
    with pytest.raises(AssertionError, match="20480"):
        slab.carve({"kv": (1000, 21, "kv")})
    slab.close()


def test_pages_are_taken_only_when_they_are_written() -> None:
    slab = Slab("triptych-test", 1 << 30)
    assert slab.segment is not None
    assert os.fstat(slab.segment.fd).st_blocks == 0
    slab.tensor[: 1 << 20].fill_(1)
    assert os.fstat(slab.segment.fd).st_blocks * 512 == 1 << 20
    slab.close()


def test_a_closed_slab_gives_its_memory_back_with_its_last_view() -> None:
    slab = Slab("triptych-test-closing", 1 << 20)
    view = slab.tensor[:10]
    slab.close()
    assert "triptych-test-closing" in _mappings()
    del view
    assert "triptych-test-closing" not in _mappings()


def test_a_slab_larger_than_memory_is_refused_with_both_figures() -> None:
    with pytest.raises(ConfigError, match=r"need \d+ bytes and \d+ are available"):
        Slab("triptych-test", 2 * available_bytes())


def _mappings() -> str:
    with open("/proc/self/maps") as maps:
        return maps.read()
