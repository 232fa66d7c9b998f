"""KV blocks of sequences: block tables grow with the tokens whose KV they hold. Knows no tensor."""

from triptych.core import Sequence
from triptych.memory.block_pool import BlockPool
from triptych.messages import PoolUsage


class KVCache:
    """One per instance, shared by its prefill and decode stage.

    A sequence of n tokens with computed KV holds ceil(n / block_tokens) blocks:

        block_table  [ 7 ][ 8 ][ 3 ]
        tokens        0..15 16..31 32..40      (block_tokens = 16, 41 tokens)
    """

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self._pool = BlockPool(num_blocks)
        self.block_tokens = block_tokens
        self.growth_reserve = 0  # free blocks that running decodes will need soon; new sequences leave them alone
        self.decode_room = 0  # blocks for one longest sequence where there is a decode stage, see `can_wait_with`

    @property
    def max_tokens(self) -> int:
        """The longest sequence that fits when it is alone."""
        return self._pool.num_blocks * self.block_tokens

    def num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that the sequence still needs to hold the KV of its first `num_tokens` tokens."""
        return max(0, -(-num_tokens // self.block_tokens) - len(sequence.block_table))

    def can_hold(self, sequence: Sequence, num_tokens: int) -> bool:
        return self._pool.can_allocate(self.num_missing(sequence, num_tokens))

    def can_admit(self, sequence: Sequence, num_tokens: int) -> bool:
        """As `can_hold`, for a sequence that is new here: it must not take what running ones need to grow."""
        return self._pool.can_allocate(self.num_missing(sequence, num_tokens) + self.growth_reserve)

    def can_wait_with(self, num_blocks: int) -> bool:
        """Whether sequences that wait for another instance may hold `num_blocks` together. There is always room to
        decode one sequence: decodes never wait for the embeddings of a request that is prefilled here."""
        return num_blocks + self.decode_room <= self._pool.num_blocks

    def hold(self, sequence: Sequence, num_tokens: int) -> None:
        """Grows the block table to `num_tokens`; the caller asked `can_hold` first."""
        missing = self.num_missing(sequence, num_tokens)
        if missing:
            sequence.block_table.extend(self._pool.allocate(missing))

    def free(self, sequence: Sequence) -> None:
        """Gives all blocks of the sequence back. A sequence without blocks is left as it is."""
        self._pool.free(sequence.block_table)
        sequence.block_table.clear()

    def computed_blocks(self, sequence: Sequence) -> list[int]:
        """The blocks that have KV in them: without the last one while that is still empty."""
        return sequence.block_table[: -(-sequence.num_computed // self.block_tokens)]

    def usage(self) -> PoolUsage:
        return PoolUsage(total=self._pool.num_blocks, free=self._pool.num_free, used=self._pool.num_held, cached=0)

    def check_integrity(self) -> None:
        self._pool.check_integrity()
