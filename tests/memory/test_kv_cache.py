"""KVCache: tables grow with tokens; full blocks are found again by what they hold, until their space is needed."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.builders import make_sampling, make_unit
from triptych.core import BlockHash, RequestId, Sequence, Span
from triptych.memory.kv_cache import KVCache
from triptych.memory.prefix import prompt_hashes

BLOCK = 4


def make_sequence(num_tokens: int = 1) -> Sequence:
    return Sequence(RequestId("r"), list(range(num_tokens)), num_tokens, make_sampling())


def make_hashed(token_ids: list[int]) -> Sequence:
    hashes = prompt_hashes(b"root", token_ids, (), (), BLOCK)
    return Sequence(RequestId("r"), token_ids, len(token_ids), make_sampling(), prompt_hashes=hashes)


def find(kv: KVCache, token_ids: list[int]) -> list[int]:
    return kv.find(make_hashed(token_ids).prompt_hashes, len(token_ids))


def compute(kv: KVCache, token_ids: list[int]) -> Sequence:
    """A sequence that holds its blocks, all computed and sealed."""
    sequence = make_hashed(token_ids)
    kv.hold(sequence, len(token_ids))
    sequence.num_computed = len(token_ids)
    kv.seal(sequence)
    return sequence


def leave(kv: KVCache, token_ids: list[int]) -> None:
    """A sequence that was here and is gone."""
    kv.free(compute(kv, token_ids))


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
    assert kv.make_room(sequence, 1)
    kv.hold(sequence, 1)
    assert sequence.block_table == [0, 1]


def test_newcomers_leave_the_growth_reserve_alone():
    kv, running, newcomer = KVCache(3, 16), make_sequence(), make_sequence()
    kv.hold(running, 16)
    kv.growth_reserve = 1
    assert kv.make_room_for_new(newcomer, 16)
    assert not kv.make_room_for_new(newcomer, 17)
    assert kv.make_room(running, 48)


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


def test_full_computed_blocks_are_found_while_they_are_held_and_after():
    kv = KVCache(8, BLOCK)
    sequence = compute(kv, [1] * 10)
    assert find(kv, [1] * 10) == sequence.block_table[:2], "the third one is not full"
    kv.free(sequence)
    assert (kv.usage().used, kv.usage().cached, kv.usage().free) == (0, 2, 6)
    assert len(find(kv, [1] * 10)) == 2
    assert find(kv, [1] * 4 + [2] * 6) == find(kv, [1] * 4)
    assert find(kv, [2] + [1] * 9) == []


def test_a_block_is_not_found_before_all_of_it_is_computed():
    kv, sequence = KVCache(8, BLOCK), make_hashed([1] * 8)
    kv.hold(sequence, 8)
    sequence.num_computed = 7
    kv.seal(sequence)
    assert len(find(kv, [1] * 8)) == 1


def test_nothing_is_found_behind_the_tokens_that_are_asked_for():
    kv = KVCache(8, BLOCK)
    hashes = compute(kv, [1] * 8).prompt_hashes
    assert [len(kv.find(hashes, n)) for n in (8, 7, 4, 3, 0)] == [2, 1, 1, 0, 0]


def test_a_sequence_that_begins_with_found_blocks_shares_them_and_counts_them_as_computed():
    kv = KVCache(8, BLOCK)
    first = compute(kv, [1] * 8)
    second = make_hashed([1] * 8 + [2] * 4)
    kv.hold(second, 12, find(kv, second.token_ids))
    assert second.block_table[:2] == first.block_table
    assert second.num_computed == 8
    assert kv.usage().used == 3
    kv.free(first)
    assert kv.usage().used == 3, "what the second one reads stays"
    kv.free(second)
    assert (kv.usage().used, kv.usage().cached) == (0, 2)


def test_of_two_equal_blocks_the_first_keeps_its_name_and_the_other_is_freed_with_its_sequence():
    kv = KVCache(8, BLOCK)
    first, second = compute(kv, [1] * 8), compute(kv, [1] * 8)
    assert find(kv, [1] * 8) == first.block_table
    kv.free(second)
    assert (kv.usage().used, kv.usage().cached) == (2, 0)
    kv.check_integrity()


def test_what_became_unreferenced_first_is_evicted_first_and_reported():
    kv = KVCache(4, BLOCK)
    for token in (1, 2, 3):
        leave(kv, [token] * 4)
    kv.hold(old := make_hashed([1] * 4), 4, find(kv, [1] * 4))
    kv.free(old)  # used again: now the youngest
    kv.hold(make_sequence(), 8)
    assert [bool(find(kv, [token] * 4)) for token in (1, 2, 3)] == [True, False, True]
    assert kv.evicted == [make_hashed([2] * 4).prompt_hashes.blocks[0]]


def test_the_end_of_a_prefix_is_evicted_before_its_beginning():
    kv = KVCache(4, BLOCK)
    leave(kv, [1] * 16)
    for num_left in (3, 2, 1, 0):
        kv.hold(make_sequence(), 4)
        assert len(find(kv, [1] * 16)) == num_left


def test_a_free_block_is_taken_before_anything_is_evicted():
    kv = KVCache(4, BLOCK)
    leave(kv, [1] * 8)
    kv.hold(make_sequence(), 8)
    assert kv.evicted == []
    assert len(find(kv, [1] * 8)) == 2


def test_found_blocks_that_nobody_references_are_not_counted_as_space_for_the_rest():
    kv = KVCache(4, BLOCK)
    leave(kv, [1] * 8)
    sequence = make_hashed([1] * 8 + [2] * 12)
    assert kv.make_room_for_new(sequence, 16, find(kv, sequence.token_ids))
    assert not kv.make_room_for_new(sequence, 17, find(kv, sequence.token_ids))
    kv.hold(sequence, 16, find(kv, sequence.token_ids))
    assert kv.evicted == []


def test_blocks_that_others_reference_need_no_space():
    kv = KVCache(4, BLOCK)
    compute(kv, [1] * 12)
    sequence = make_hashed([1] * 12 + [2] * 4)
    assert kv.has_room(sequence, 16, find(kv, sequence.token_ids))
    assert not kv.has_room(sequence, 16)


def test_what_a_reader_reads_stays_when_its_sequence_is_freed():
    kv = KVCache(4, BLOCK)
    sequence = compute(kv, [1] * 8)
    blocks = sequence.block_table[:1]
    kv.refer(blocks)
    kv.free(sequence)
    assert (kv.usage().used, kv.usage().cached) == (1, 1)
    assert not kv.make_room_for_new(make_sequence(), 16)
    kv.give_back(blocks)
    assert kv.make_room_for_new(make_sequence(), 16)


def test_giving_back_more_often_than_sharing_asserts():
    kv = KVCache(4, BLOCK)
    leave(kv, [1] * 4)
    with pytest.raises(AssertionError, match="given back more often than shared"):
        kv.give_back([0])


def test_space_that_is_held_for_later_is_asked_back_one_by_one_and_from_prompts_only_for_running_sequences():
    kv = KVCache(6, BLOCK)
    ahead, waiting = [make_sequence(), make_sequence()], [make_sequence()]
    for sequence in [*ahead, *waiting]:
        kv.hold(sequence, 8)

    def give_up(places: list[Sequence]) -> bool:
        if places:
            kv.free(places.pop())
            return True
        return False

    kv.reclaim_ahead = lambda: give_up(ahead)
    kv.reclaim_waiting = lambda: give_up(waiting)
    assert not kv.has_room(make_sequence(), 4)
    assert kv.make_room_for_new(make_sequence(), 8)
    assert len(ahead) == 1, "no more than needed"
    assert not kv.make_room_for_new(make_sequence(), 17)
    assert (len(ahead), len(waiting)) == (0, 1)
    assert kv.make_room(make_sequence(), 17)
    assert waiting == []
    assert not kv.make_room(make_sequence(), 25)


@pytest.mark.parametrize("options", [{"prefix_caching": False}, {"state_blocks": 1}])
def test_without_prefix_caching_and_with_recurrent_states_nothing_is_found_or_kept(options):
    kv = KVCache(8, BLOCK, **options)
    sequence = compute(kv, [1] * 8)
    assert find(kv, [1] * 8) == []
    kv.free(sequence)
    assert (kv.usage().cached, kv.usage().free) == (0, 8)


def test_state_blocks_stand_before_those_of_tokens():
    kv, sequence = KVCache(8, BLOCK, state_blocks=2), make_sequence()
    kv.hold(sequence, 5)
    assert sequence.block_table == [0, 1, 2, 3]
    assert kv.max_tokens == 24
    sequence.num_computed = 4
    assert kv.computed_blocks(sequence) == [0, 1, 2]


def test_blocks_of_tokens_that_are_not_known_yet_get_no_name():
    """Decode pulls KV of a prompt before it knows its tokens: only blocks whose hash came with it may be found."""
    kv = KVCache(8, BLOCK)
    hashes = prompt_hashes(b"root", [1] * 4, (), (), BLOCK)
    for token in (2, 3):
        ahead = Sequence(RequestId("r"), [], 0, make_sampling(), prompt_hashes=hashes, num_computed=8)
        kv.hold(ahead, 9)
        kv.seal(ahead)
        assert ahead.sealed == [*hashes.blocks]
        ahead.token_ids = [1] * 4 + [token] * 4
        kv.seal(ahead)
        assert find(kv, [1] * 4 + [token] * 4)[1] == ahead.block_table[1]


def test_a_sequence_that_nobody_hashed_names_no_block():
    """Its tokens alone do not tell which pictures it looks at."""
    kv = KVCache(8, BLOCK)
    sequence = Sequence(RequestId("r"), [9] * 8, 8, make_sampling(), num_computed=8)
    kv.hold(sequence, 8)
    kv.seal(sequence)
    kv.free(sequence)
    assert (kv.usage().cached, kv.usage().free) == (0, 8)


CAT, DOG = make_unit("cat", 3), make_unit("dog", 3)
PROMPTS = [
    [*start, *middle, *end]
    for start in ([7] * 4, [7] * 6)
    for middle in ([], [CAT], [DOG], [CAT, DOG])
    for end in ([8], [8] * 5, [7] * 9)
]  # they share beginnings of 4, 6, 7 and more tokens, and differ in pictures that no token shows

Content = tuple[object, ...]  # per position, the token or (unit, row)


class Kept:
    """A sequence, and what stands at each of its positions."""

    def __init__(self, prompt: list[object]) -> None:
        self.content: list[object] = []
        token_ids: list[int] = []
        spans: list[Span] = []
        units = tuple(piece for piece in prompt if not isinstance(piece, int))
        for piece in prompt:
            if isinstance(piece, int):
                token_ids.append(piece)
                self.content.append(piece)
            else:
                spans.append(Span(len(token_ids), piece.num_tokens, units.index(piece), 0))
                token_ids += [9] * piece.num_tokens
                self.content += [(piece.hash, row) for row in range(piece.num_tokens)]
        hashes = prompt_hashes(b"root", token_ids, units, spans, BLOCK)
        self.sequence = Sequence(RequestId("r"), token_ids, len(token_ids), make_sampling(), prompt_hashes=hashes)

    def prefix(self, num_blocks: int) -> Content:
        return tuple(self.content[: num_blocks * BLOCK])


class Cache(RuleBasedStateMachine):
    """Sequences with common beginnings that come, are computed, decode, are read by others and leave."""

    def __init__(self) -> None:
        super().__init__()
        self.kv = KVCache(10, BLOCK)
        self.kv.reclaim_ahead = self._reclaim
        self.live: list[Kept] = []
        self.ahead: list[Kept] = []
        self.leases: list[list[int]] = []
        self.written: dict[int, Content] = {}  # block -> everything up to its end, when it was filled
        self.idle_since: dict[int, int] = {}  # reusable block -> when its last reference went
        self.block_of: dict[BlockHash, int] = {}
        self.now = 0

    def _reclaim(self) -> bool:
        if not self.ahead:
            return False
        self.kv.free(self.ahead.pop().sequence)
        self._note()
        return True

    def _note(self) -> None:
        """After every change: what was evicted was unreferenced, and nothing was so for longer."""
        kv, self.now = self.kv, self.now + 1
        for hash_ in kv.evicted:
            block = self.block_of[hash_]
            assert block in self.idle_since, f"block {block} was evicted while somebody held it"
            since = self.idle_since.pop(block)
            left = [other for other in self.idle_since if other in kv._reusable]
            assert all(self.idle_since[other] >= since for other in left), f"{block} was evicted before older ones"
        kv.evicted.clear()
        self.idle_since = {block: self.idle_since.get(block, self.now) for block in kv._reusable}
        self.block_of = dict(kv._block_of)

    def _begin(self, kept: Kept, found: list[int]) -> None:
        sequence = kept.sequence
        held = {block for other in [*self.live, *self.ahead] for block in other.sequence.block_table}
        held |= {block for lease in self.leases for block in lease}
        self.kv.hold(sequence, len(sequence.token_ids), found)
        assert sequence.num_computed == len(found) * BLOCK
        assert not held & set(sequence.block_table[len(found) :]), "a block was handed out that somebody holds"
        assert not self.kv._hash_of.keys() & set(sequence.block_table[len(found) :]), "a new block has an old name"

    def _find(self, kept: Kept) -> list[int]:
        sequence = kept.sequence
        found = self.kv.find(sequence.prompt_hashes, len(sequence.token_ids) - 1)
        for index, block in enumerate(found):
            assert self.written[block] == kept.prefix(index + 1), f"block {block} holds another prefix"
        if len(found) < (len(sequence.token_ids) - 1) // BLOCK:
            assert sequence.prompt_hashes.blocks[len(found)] not in self.kv._block_of, "a longer prefix is here"
        return found

    @rule(prompt=st.sampled_from(PROMPTS))
    def admit(self, prompt):
        kept = Kept(prompt)
        found = self._find(kept)
        if self.kv.make_room_for_new(kept.sequence, len(kept.sequence.token_ids), found):
            self._begin(kept, found)
            self.live.append(kept)
            assert self.kv.usage().free + self.kv.usage().cached >= self.kv.growth_reserve
        self._note()

    @rule(prompt=st.sampled_from(PROMPTS))
    def hold_ahead(self, prompt):
        kept = Kept(prompt)
        found = self._find(kept)
        if self.kv.has_room(kept.sequence, len(kept.sequence.token_ids), found):
            self._begin(kept, found)
            self.ahead.append(kept)
        self._note()

    @precondition(lambda self: self.live)
    @rule(data=st.data(), num_tokens=st.integers(1, 12))
    def compute(self, data, num_tokens):
        kept = data.draw(st.sampled_from(self.live))
        sequence = kept.sequence
        end = min(sequence.num_computed + num_tokens, len(sequence.token_ids))
        for index in range(sequence.num_computed // BLOCK, -(-end // BLOCK)):
            block = sequence.block_table[index]
            assert block not in self.kv._hash_of, "a block is written to that others may find"
            assert self._num_holders()[block] == 1, "a block is written to that somebody else holds"
            self.written.pop(block, None)
            if (index + 1) * BLOCK <= end:
                self.written[block] = kept.prefix(index + 1)
        sequence.num_computed = end
        self.kv.seal(sequence)
        self._note()

    @precondition(lambda self: self.live)
    @rule(data=st.data(), token=st.sampled_from([7, 8]))
    def decode(self, data, token):
        kept = data.draw(st.sampled_from(self.live))
        sequence = kept.sequence
        if sequence.num_computed == len(sequence.token_ids):
            before = list(sequence.block_table)
            if self.kv.make_room(sequence, len(sequence.token_ids) + 1):
                self.kv.hold(sequence, len(sequence.token_ids) + 1)
                sequence.token_ids.append(token)
                kept.content.append(token)
            assert sequence.block_table[: len(before)] == before
        self._note()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def lease(self, data):
        sequence = data.draw(st.sampled_from(self.live)).sequence
        blocks = sequence.block_table[: data.draw(st.integers(0, sequence.num_computed // BLOCK))]
        self.kv.refer(blocks)
        self.leases.append(blocks)
        self._note()

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def end_lease(self, data):
        self.kv.give_back(self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1))))
        self._note()

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data):
        kept = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.kv.free(kept.sequence)
        assert kept.sequence.block_table == []
        self._note()

    @rule(blocks=st.integers(0, 4))
    def reserve(self, blocks):
        self.kv.growth_reserve = blocks

    def _num_holders(self) -> Counter[int]:
        tables = [kept.sequence.block_table for kept in [*self.live, *self.ahead]]
        return Counter(block for blocks in [*tables, *self.leases] for block in blocks)

    @invariant()
    def the_books_agree(self):
        kv, holders = self.kv, self._num_holders()
        kv.check_integrity()
        assert [holders[block] for block in range(10)] == kv._num_references
        assert set(kv._reusable) == {block for block in kv._hash_of if not holders[block]}
        usage = kv.usage()
        assert (usage.used, usage.cached) == (len(holders), len(kv._reusable))
        assert usage.total == usage.free + usage.used + usage.cached

    @invariant()
    def sequences_hold_what_they_computed(self):
        for kept in self.live:
            for index in range(kept.sequence.num_computed // BLOCK):
                assert self.written[kept.sequence.block_table[index]] == kept.prefix(index + 1)

    @invariant()
    def a_name_stands_for_one_content(self):
        contents = {block: self.written[block] for block in self.kv._hash_of}
        assert len(set(contents.values())) == len(contents)


TestCache = Cache.TestCase
TestCache.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
