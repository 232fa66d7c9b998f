"""KV blocks of sequences: block tables grow with the tokens whose KV they hold, and full blocks are found again by what
they are a function of. Knows no tensor."""

from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq

from triptych.core import BlockHash, BlockHashes, Sequence
from triptych.memory.block_pool import BlockPool
from triptych.memory.prefix import next_hash
from triptych.messages import PoolUsage


class KVCache:
    """One per instance, shared by its prefill and decode stage.

    A sequence of n tokens with computed KV holds ceil(n / block_tokens) blocks, behind `state_blocks` ones for what
    recurrent layers keep (0 for other models):

        block_table  [ 7 ][ 8 ][ 3 ]
        tokens        0..15 16..31 32..40      (block_tokens = 16, 41 tokens)

    A block is referenced by every sequence whose table it is in and by every lease that lets another instance read it.
    A full, computed block has a hash (`seal`) under which later sequences find it (`find`). Without references it
    stays, until its space is needed; what became unreferenced first goes first. Nobody writes to a block with a hash.
    """

    def __init__(
        self, num_blocks: int, block_tokens: int, *, state_blocks: int = 0, prefix_caching: bool = True
    ) -> None:
        """A recurrent state is at the last token only, so that sequences with one share no prefix."""
        self._pool = BlockPool(num_blocks)
        self.block_tokens = block_tokens
        self.state_blocks = state_blocks
        self.growth_reserve = 0  # free blocks that running decodes will need soon; new sequences leave them alone
        # Each gives back some blocks that are held for later, of what was sent ahead to decode or of prompts that wait
        # for embeddings. False: there are none.
        self.reclaim_ahead: Callable[[], bool] = lambda: False
        self.reclaim_waiting: Callable[[], bool] = lambda: False
        self.evicted: list[BlockHash] = []  # since somebody emptied it
        self._prefix_caching = prefix_caching and not state_blocks
        self._num_references = [0] * num_blocks
        self._hash_of: dict[int, BlockHash] = {}
        self._block_of: dict[BlockHash, int] = {}
        self._reusable: OrderedDict[int, None] = OrderedDict()  # blocks with a hash and without references

    @property
    def max_tokens(self) -> int:
        """The longest sequence that fits when it is alone."""
        return (self._pool.num_blocks - self.state_blocks) * self.block_tokens

    # ---- space

    @property
    def num_available(self) -> int:
        """Blocks that are free, or that nobody needs."""
        return self._pool.num_free + len(self._reusable)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks of a sequence of that many tokens."""
        return self.state_blocks + -(-num_tokens // self.block_tokens)

    def num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that the sequence still needs to hold the KV of its first `num_tokens` tokens."""
        return max(0, self.num_blocks_for(num_tokens) - len(sequence.block_table))

    def has_space(self, sequence: Sequence) -> bool:
        """Whether its blocks hold the KV of all its tokens."""
        return len(sequence.token_ids) <= (len(sequence.block_table) - self.state_blocks) * self.block_tokens

    def make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether the sequence can hold so much. Takes what is held for later, if need be."""
        while self.num_missing(sequence, num_tokens) > self.num_available:
            if not (self.reclaim_ahead() or self.reclaim_waiting()):
                return False
        return True

    def make_room_for_new(self, sequence: Sequence, num_tokens: int, found: Seq[int] = ()) -> bool:
        """As `make_room`, for a sequence that is new here and would begin with the `found` blocks: it must not take
        what running ones need to grow, nor what prompts hold that wait for embeddings."""
        while not self.has_room(sequence, num_tokens, found):
            if not self.reclaim_ahead():
                return False
        return True

    def has_room(self, sequence: Sequence, num_tokens: int, found: Seq[int] = ()) -> bool:
        """As `make_room_for_new`, beside everything that is held now."""
        unused = sum(block in self._reusable for block in found)
        missing = self.num_missing(sequence, num_tokens) - len(found) + unused
        return missing + self.growth_reserve <= self.num_available

    def hold(self, sequence: Sequence, num_tokens: int, found: Seq[int] = ()) -> None:
        """Grows the block table to `num_tokens`; the caller asked for room first. A new sequence begins with the
        `found` blocks: their KV counts as computed."""
        if found:
            assert not sequence.block_table, f"{len(sequence.block_table)} blocks before those that were found"
            self.refer(found)
            sequence.block_table.extend(found)
            sequence.sealed = [self._hash_of[block] for block in found]
            sequence.num_computed = len(found) * self.block_tokens
        missing = self.state_blocks - (-num_tokens // self.block_tokens) - len(sequence.block_table)  # as for most: 0
        if missing > 0:
            blocks = self._allocate(missing)
            self.refer(blocks)
            sequence.block_table.extend(blocks)

    def free(self, sequence: Sequence) -> None:
        """Gives all references of the sequence back. A sequence without blocks is left as it is."""
        self.give_back(sequence.block_table)
        sequence.block_table.clear()

    def refer(self, blocks: Seq[int]) -> None:
        """One more reference to each block."""
        references = self._num_references
        for block in blocks:
            references[block] += 1
        if self._reusable:
            for block in blocks:
                self._reusable.pop(block, None)

    def give_back(self, blocks: Seq[int]) -> None:
        """One reference less to each. The end of a prefix becomes reusable, and so is evicted, before its beginning."""
        references = self._num_references
        for block in blocks:
            references[block] -= 1
            assert references[block] >= 0, f"block {block} given back more often than shared"
        unused = [block for block in blocks if not references[block]]
        if self._hash_of:
            self._reusable |= dict.fromkeys(block for block in reversed(unused) if block in self._hash_of)
            unused = [block for block in unused if block not in self._hash_of]
        self._pool.free(unused)

    def computed_blocks(self, sequence: Sequence) -> list[int]:
        """The blocks that have something in them: without the last one while that is still empty."""
        return sequence.block_table[: self.num_blocks_for(sequence.num_computed)]

    # ---- prefixes

    def find(self, hashes: BlockHashes, num_tokens: int) -> list[int]:
        """Blocks with the KV of the longest prefix that is here, within the first `num_tokens` tokens."""
        found: list[int] = []
        for hash_ in hashes.blocks[: num_tokens // self.block_tokens]:
            block = self._block_of.get(hash_)
            if block is None:
                break
            found.append(block)
        return found

    def seal(self, sequence: Sequence) -> None:
        """Lets others find the full blocks whose KV is computed now. Of equal blocks the first one keeps the name.

        A sequence without a root was never hashed: what its media are is not known here. Nor are the tokens of one that
        is still prefilled elsewhere, behind the blocks whose hashes came with it."""
        of_prompt = sequence.prompt_hashes
        if not self._prefix_caching or not of_prompt.root:
            return
        num_known = max(len(sequence.token_ids), len(of_prompt.blocks) * self.block_tokens)
        num_full = min(sequence.num_computed, num_known) // self.block_tokens
        for index in range(len(sequence.sealed), num_full):
            hash_ = self._hash_at(sequence, index)
            sequence.sealed.append(hash_)
            block = sequence.block_table[index]
            if hash_ not in self._block_of and block not in self._hash_of:
                self._block_of[hash_], self._hash_of[block] = block, hash_

    def _hash_at(self, sequence: Sequence, index: int) -> BlockHash:
        of_prompt = sequence.prompt_hashes
        if index < len(of_prompt.blocks):
            return of_prompt.blocks[index]
        tokens = sequence.token_ids[index * self.block_tokens : (index + 1) * self.block_tokens]
        media = of_prompt.tail if index == len(of_prompt.blocks) else b""
        return next_hash(sequence.sealed[-1] if index else of_prompt.root, tokens, media)

    # ---- books

    def usage(self) -> PoolUsage:
        cached = len(self._reusable)
        return PoolUsage(
            total=self._pool.num_blocks, free=self._pool.num_free, used=self._pool.num_held - cached, cached=cached
        )

    def check_integrity(self) -> None:
        self._pool.check_integrity()
        referenced = sum(count > 0 for count in self._num_references)
        assert referenced + len(self._reusable) == self._pool.num_held, (
            f"{referenced} referenced + {len(self._reusable)} reusable blocks, the pool says {self._pool.num_held} held"
        )
        assert all(self._num_references[block] == 0 for block in self._reusable), "a referenced block is reusable"
        assert {block: hash_ for hash_, block in self._block_of.items()} == self._hash_of, (
            f"{len(self._block_of)} hashes of {len(self._hash_of)} blocks"
        )

    def _allocate(self, num_blocks: int) -> list[int]:
        while not self._pool.can_allocate(num_blocks):
            assert self._reusable, f"{num_blocks} blocks asked, {self._pool.num_free} free, nothing left to evict"
            block, _ = self._reusable.popitem(last=False)
            hash_ = self._hash_of.pop(block)
            del self._block_of[hash_]
            self.evicted.append(hash_)
            self._pool.free((block,))
        return self._pool.allocate(num_blocks)
