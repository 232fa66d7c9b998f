"""EmbeddingCache and EmbeddingShare: referenced, reusable, evicted oldest first; no stage takes more than its part."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.builders import make_unit
from triptych.core import EncodeUnit
from triptych.memory.embedding_cache import EmbeddingCache, EmbeddingShare


def fill(cache: EmbeddingCache, unit: EncodeUnit) -> None:
    """Puts a unit into the cache, ready and unreferenced."""
    cache.hold(unit).ready = True
    cache.release(unit.hash)


def test_a_unit_takes_as_many_blocks_as_its_rows_need():
    cache = EmbeddingCache(8, 4)
    assert cache.hold(make_unit("a", 9)).blocks == [0, 1, 2]
    assert cache.hold(make_unit("b", 8)).blocks == [3, 4]


def test_a_second_reference_shares_the_entry():
    cache, unit = EmbeddingCache(8, 4), make_unit()
    assert cache.hold(unit) is cache.hold(unit)
    assert cache.usage().used == 2


def test_a_ready_unit_without_references_stays_until_its_blocks_are_needed():
    cache, unit = EmbeddingCache(4, 4), make_unit("a", 8)
    fill(cache, unit)
    assert (cache.usage().used, cache.usage().cached) == (0, 2)
    entry = cache.hold(unit)
    assert entry.ready
    assert cache.usage().used == 2


def test_cached_entries_are_evicted_oldest_first():
    cache = EmbeddingCache(4, 4)
    old, new = make_unit("old", 8), make_unit("new", 8)
    fill(cache, new)
    fill(cache, old)
    fill(cache, new)  # used again: now the younger one
    cache.hold(make_unit("next", 4))
    assert cache.find(old.hash) is None
    assert cache.find(new.hash) is not None
    assert cache.num_evicted == 1
    assert cache.evicted == [old.hash], "the frontend is told"


def test_a_free_block_is_taken_before_anything_is_evicted():
    cache = EmbeddingCache(4, 4)
    fill(cache, make_unit("old", 8))
    cache.hold(make_unit("next", 8))
    assert cache.evicted == []


def test_what_is_referenced_is_never_evicted():
    cache = EmbeddingCache(4, 4)
    held = make_unit("held", 8)
    fill(cache, held)
    cache.hold(held)
    fill(cache, make_unit("idle", 8))
    assert not cache.can_hold([make_unit("next", 9)])
    cache.hold(make_unit("next", 8))
    assert cache.is_ready(held.hash)


def test_two_units_of_other_content_never_get_the_same_blocks():
    cache = EmbeddingCache(6, 4)
    entries = [cache.hold(make_unit(name, 8)) for name in "abc"]
    assert len({block for entry in entries for block in entry.blocks}) == 6


def test_a_unit_that_never_became_ready_is_dropped_with_its_last_reference():
    cache, unit = EmbeddingCache(4, 4), make_unit()
    cache.hold(unit)
    cache.release(unit.hash)
    assert cache.find(unit.hash) is None
    assert cache.usage().free == 4


def test_can_hold_counts_equal_units_once_and_what_eviction_would_free():
    cache = EmbeddingCache(4, 4)
    fill(cache, make_unit("cached", 8))
    unit = make_unit("a", 16)
    assert cache.can_hold([unit, unit])
    assert not cache.can_hold([unit, make_unit("b", 1)])
    assert cache.find(make_unit("cached").hash) is not None


def test_a_cached_unit_that_is_wanted_itself_is_not_counted_as_space_for_others():
    cache = EmbeddingCache(4, 4)
    cached = make_unit("cached", 8)
    fill(cache, cached)
    assert cache.can_hold([cached, make_unit("b", 8)])
    assert not cache.can_hold([cached, make_unit("b", 9)])


def test_releasing_more_often_than_holding_asserts():
    cache, unit = EmbeddingCache(4, 4), make_unit()
    fill(cache, unit)
    with pytest.raises(AssertionError, match="released more often than held"):
        cache.release(unit.hash)


def test_a_share_never_references_more_than_its_blocks():
    cache = EmbeddingCache(8, 4)
    share = EmbeddingShare(cache, 3)
    assert share.can_hold([make_unit("a", 12)])
    assert not share.can_hold([make_unit("a", 13)])
    share.hold(make_unit("a", 8))
    assert share.can_hold([make_unit("a", 8), make_unit("b", 4)])
    assert not share.can_hold([make_unit("b", 5)])


def test_what_one_share_releases_is_still_held_by_the_other():
    cache, unit = EmbeddingCache(8, 4), make_unit()
    encode, prefill = EmbeddingShare(cache, 4), EmbeddingShare(cache, 4)
    encode.hold(unit)
    prefill.hold(unit)
    encode.release(unit.hash)
    assert cache.usage().used == 2
    prefill.release(unit.hash)
    assert cache.usage().used == 0


def test_a_share_cannot_release_what_only_another_one_holds():
    cache, unit = EmbeddingCache(8, 4), make_unit()
    EmbeddingShare(cache, 4).hold(unit)
    with pytest.raises(AssertionError, match="does not hold"):
        EmbeddingShare(cache, 4).release(unit.hash)


units = st.builds(lambda i: make_unit(f"u{i}", (3, 4, 5, 8, 9, 12)[i]), st.integers(0, 5))


class Shares(RuleBasedStateMachine):
    """Two stages over one cache: each gets its part whatever the other does."""

    @initialize(sizes=st.tuples(st.integers(3, 6), st.integers(3, 6)))
    def build(self, sizes):
        self.cache = EmbeddingCache(sum(sizes), 4)
        self.shares = [EmbeddingShare(self.cache, size) for size in sizes]
        self.held: list[Counter[EncodeUnit]] = [Counter(), Counter()]

    @rule(which=st.integers(0, 1), unit=units)
    def hold(self, which, unit):
        if not self.shares[which].can_hold([unit]):
            part = {*self.held[which], unit}
            assert sum(map(self.cache.num_blocks_of, part)) > self.shares[which].max_blocks, "its part is not taken"
            return
        entry = self.shares[which].hold(unit)
        assert len(entry.blocks) == self.cache.num_blocks_of(unit)
        self.held[which][unit] += 1

    @rule(which=st.integers(0, 1), data=st.data(), ready=st.booleans())
    def release(self, which, data, ready):
        if not self.held[which]:
            return
        unit = data.draw(st.sampled_from(sorted(self.held[which], key=lambda unit: unit.hash)))
        self.cache.find(unit.hash).ready |= ready
        self.shares[which].release(unit.hash)
        self.held[which][unit] -= 1
        self.held[which] += Counter()

    @rule(which=st.integers(0, 1), several=st.lists(units, max_size=4))
    def asking_changes_nothing_and_is_kept(self, which, several):
        before = self.cache.usage()
        can = self.shares[which].can_hold(several)
        assert self.cache.usage() == before
        if can:
            for unit in several:
                self.shares[which].hold(unit)
                self.held[which][unit] += 1

    @invariant()
    def the_books_agree(self):
        self.cache.check_integrity()
        held = self.held[0] + self.held[1]
        for unit, count in held.items():
            assert self.cache.find(unit.hash).num_references == count
        usage = self.cache.usage()
        assert usage.used == sum(map(self.cache.num_blocks_of, held))
        assert usage.total == usage.free + usage.used + usage.cached


TestShares = Shares.TestCase
TestShares.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
