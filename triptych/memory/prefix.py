"""What the KV of a block is a function of, as a hash: everything in the sequence up to the block's end.

Placeholder tokens are equal for all pictures, so the media themselves are a part of it: two different pictures never
share a block, and a block behind a picture is never found without it.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

from triptych.core import HASH_BYTES, BlockHash, BlockHashes, EncodeUnit, Span


def prompt_hashes(
    root: bytes, token_ids: Sequence[int], units: Sequence[EncodeUnit], spans: Sequence[Span], block_tokens: int
) -> BlockHashes:
    """Hashes of the blocks that a prompt fills. `root` stands for the model: KV of another one is never equal."""
    num_full = len(token_ids) // block_tokens
    media = _media_of_blocks(units, spans, block_tokens)
    blocks: list[BlockHash] = []
    parent = root
    for index in range(num_full):
        tokens = token_ids[index * block_tokens : (index + 1) * block_tokens]
        parent = next_hash(parent, tokens, media.get(index, b""))
        blocks.append(parent)
    return BlockHashes(root, tuple(blocks), media.get(num_full, b""))


def next_hash(parent: bytes, token_ids: Sequence[int], media: bytes = b"") -> BlockHash:
    """The hash of a block behind the one with hash `parent` (or behind nothing: the root)."""
    digest = blake2b(parent, digest_size=HASH_BYTES)
    digest.update(array("Q", token_ids).tobytes())  # equally long for all blocks, so nothing runs together
    digest.update(media)
    return BlockHash(digest.digest())


def _media_of_blocks(units: Sequence[EncodeUnit], spans: Sequence[Span], block_tokens: int) -> dict[int, bytes]:
    """Per block that holds placeholder tokens: which rows of which units stand at which of its tokens."""
    media: dict[int, bytes] = {}
    for span in spans:
        position, end = span.start, span.start + span.length
        while position < end:
            block, place = divmod(position, block_tokens)
            length = min(end - position, block_tokens - place)
            row = span.offset + position - span.start
            piece = array("Q", (place, length, row)).tobytes() + units[span.unit].hash
            media[block] = media.get(block, b"") + piece
            position += length
    return media
