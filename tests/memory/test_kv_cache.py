"""KVCache: block tables grow with tokens and are given back whole."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tests.builders import make_sampling
from triptych.core import RequestId, Sequence
from triptych.memory.kv_cache import KVCache


def make_sequence(num_tokens: int = 1) -> Sequence:
    return Sequence(RequestId("r"), list(range(num_tokens)), num_tokens, make_sampling())


def test_a_block_table_covers_the_tokens_and_the_last_block_may_be_partly_used():
    kv, sequence = KVCache(8, 16), make_sequence()
    kv.hold(sequence, 41)
    assert sequence.block_table == [0, 1, 2]
    assert kv.num_missing(sequence, 48) == 0
    assert kv.num_missing(sequence, 49) == 1


def test_growing_keeps_the_blocks_that_are_there():
    kv, first, second = KVCache(8, 16), make_sequence(), make_sequence()
    kv.hold(first, 16)
    kv.hold(second, 1)
    kv.hold(first, 17)
    assert first.block_table == [0, 2]


def test_asking_for_less_than_is_held_takes_and_gives_nothing():
    kv, sequence = KVCache(2, 16), make_sequence()
    kv.hold(sequence, 32)
    assert kv.can_hold(sequence, 1)
    kv.hold(sequence, 1)
    assert sequence.block_table == [0, 1]


def test_newcomers_leave_the_growth_reserve_alone():
    kv, running, newcomer = KVCache(3, 16), make_sequence(), make_sequence()
    kv.hold(running, 16)
    kv.growth_reserve = 1
    assert kv.can_admit(newcomer, 16)
    assert not kv.can_admit(newcomer, 17)
    assert kv.can_hold(running, 48)


def test_sequences_that_wait_for_others_leave_room_for_one_decode():
    kv = KVCache(10, 16)
    assert kv.can_wait_with(10)
    kv.decode_room = 7
    assert kv.can_wait_with(3)
    assert not kv.can_wait_with(4)


def test_computed_blocks_leave_out_a_last_block_that_is_still_empty():
    kv, sequence = KVCache(4, 16), make_sequence()
    kv.hold(sequence, 17)
    sequence.num_computed = 16
    assert kv.computed_blocks(sequence) == [0]
    sequence.num_computed = 17
    assert kv.computed_blocks(sequence) == [0, 1]


def test_freeing_gives_all_blocks_back_and_a_second_time_is_nothing():
    kv, sequence = KVCache(4, 16), make_sequence()
    kv.hold(sequence, 40)
    kv.free(sequence)
    kv.free(sequence)
    assert sequence.block_table == []
    assert kv.usage().used == 0
    assert kv.max_tokens == 64


class Cache(RuleBasedStateMachine):
    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.kv = KVCache(10, 4)
        self.live: list[Sequence] = []

    @rule(target=sequences, num_tokens=st.integers(1, 30))
    def admit(self, num_tokens):
        sequence = make_sequence()
        if self.kv.can_admit(sequence, num_tokens):
            self.kv.hold(sequence, num_tokens)
            assert self.kv.usage().free >= self.kv.growth_reserve
        self.live.append(sequence)
        return sequence

    @rule(sequence=sequences, more=st.integers(0, 9))
    def grow(self, sequence, more):
        num_tokens = len(sequence.block_table) * 4 + more
        before = list(sequence.block_table)
        if self.kv.can_hold(sequence, num_tokens):
            self.kv.hold(sequence, num_tokens)
        assert sequence.block_table[: len(before)] == before

    @rule(sequence=consumes(sequences))
    def free(self, sequence):
        self.kv.free(sequence)
        self.live = [other for other in self.live if other is not sequence]

    @rule(blocks=st.integers(0, 4))
    def reserve(self, blocks):
        self.kv.growth_reserve = blocks

    @invariant()
    def no_block_has_two_owners_and_none_is_lost(self):
        self.kv.check_integrity()
        held = [block for sequence in self.live for block in sequence.block_table]
        assert len(held) == len(set(held)) == self.kv.usage().used
        assert self.kv.usage().total == self.kv.usage().free + self.kv.usage().used


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
