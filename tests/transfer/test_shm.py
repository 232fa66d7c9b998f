import os
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.errors import InstanceError
from triptych.transfer.shm import map_segment, runs
from triptych.transfer.slab import Slab


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_runs_cover_the_pairs_in_order(pairs: list[tuple[int, int]]) -> None:
    found = list(runs([source for source, _ in pairs], [target for _, target in pairs]))
    assert [(source + i, target + i) for source, target, count in found for i in range(count)] == pairs
    joints = [(a[0] + a[2], a[1] + a[2]) != b[:2] for a, b in pairwise(found)]
    assert all(joints), "two runs that are one"


def test_blocks_in_order_on_both_sides_are_one_run() -> None:
    assert list(runs([4, 5, 6, 9], [0, 1, 2, 3])) == [(4, 0, 3), (9, 3, 1)]


def test_a_segment_is_mapped_read_only_and_recognised_by_its_name() -> None:
    slab = Slab("triptych-test-mapped", 1 << 12)
    assert slab.segment is not None
    slab.tensor[7] = 77
    view = map_segment(slab.segment)
    assert view[7] == 77
    assert not view.flags.writeable
    with pytest.raises(InstanceError, match="in place of slab triptych-test"):
        map_segment(msgspec.structs.replace(slab.segment, name="triptych-test"))
    slab.close()


def test_a_segment_of_a_closed_slab_is_out_of_reach() -> None:
    slab = Slab("triptych-test-closed", 1 << 12)
    segment = slab.segment
    assert segment is not None
    assert segment.pid == os.getpid()
    slab.close()
    with pytest.raises((OSError, InstanceError)):
        map_segment(segment)
