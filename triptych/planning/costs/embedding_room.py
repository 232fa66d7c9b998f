"""How large an embedding cache must be for what an instance of a role does, as the stages of the engine divide it."""

import math

from triptych.config import EMBEDDING_BLOCK_TOKENS
from triptych.core import Role, Stage
from triptych.stages.group import ENCODE_SHARE


def blocks_of(num_rows: int) -> int:
    """Of one unit: blocks have rows of one unit only."""
    return -(-num_rows // EMBEDDING_BLOCK_TOKENS)


def least_blocks(role: Role, encoded: int, prefilled: int) -> int:
    """The smallest cache whose parts hold what is encoded and what is prefilled at one time, all in blocks.

    A request that is alone needs room for its largest unit where it is encoded, and for all of them where it is
    prefilled. Where an instance does both, each has its share.
    """
    prefills = Stage.PREFILL in role.stages
    if role.encodes and prefills:
        return max(math.ceil(encoded / ENCODE_SHARE), math.floor((prefilled - 1) / (1 - ENCODE_SHARE)) + 1)
    return prefilled if prefills else encoded if role.encodes else 0
