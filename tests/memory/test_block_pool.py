"""BlockPool: lowest first, freed once, never lost."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from triptych.memory.block_pool import BlockPool


def test_blocks_run_lowest_first():
    pool = BlockPool(6)
    assert pool.allocate(4) == [0, 1, 2, 3]
    pool.free([2, 0])
    assert pool.allocate(3) == [0, 2, 4]


def test_a_pool_says_what_it_can_allocate_and_changes_nothing():
    pool = BlockPool(2)
    assert pool.can_allocate(2)
    assert not pool.can_allocate(3)
    assert pool.num_free == 2


def test_allocating_more_than_is_free_asserts_with_the_numbers():
    pool = BlockPool(4)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="asked for 4 blocks, 3 of 4 free"):
        pool.allocate(4)


def test_freeing_a_block_twice_asserts():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free(blocks)


def test_a_block_that_is_freed_twice_at_once_asserts():
    pool = BlockPool(4)
    pool.allocate(3)
    with pytest.raises(AssertionError, match="freed twice"):
        pool.free([1, 1])


def test_an_empty_pool_gives_nothing():
    pool = BlockPool(0)
    assert pool.allocate(0) == []
    assert not pool.can_allocate(1)
    pool.check_integrity()


def test_integrity_notices_a_block_that_is_listed_twice():
    pool = BlockPool(4)
    pool._free.append((3, 4))
    with pytest.raises(AssertionError, match="free list 5"):
        pool.check_integrity()


class Pool(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool = BlockPool(12)
        self.owners: list[list[int]] = []

    @rule(num_blocks=st.integers(0, 6))
    def allocate(self, num_blocks):
        if self.pool.can_allocate(num_blocks):
            lowest = sorted(set(range(12)) - {block for owner in self.owners for block in owner})[:num_blocks]
            assert self.pool.allocate(num_blocks) == lowest
            self.owners.append(lowest)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def free(self, data):
        self.pool.free(self.owners.pop(data.draw(st.integers(0, len(self.owners) - 1))))

    @invariant()
    def every_block_is_free_or_has_one_owner(self):
        self.pool.check_integrity()
        held = [block for owner in self.owners for block in owner]
        assert len(held) == len(set(held)) == self.pool.num_held
        assert self.pool.num_free == 12 - len(held)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
