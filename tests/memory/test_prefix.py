"""Block hashes: equal for equal beginnings; any difference in tokens, media, rows, places or root makes others."""

from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import make_prompt, make_sampling, make_unit
from triptych.core import BlockHashes, EncodeUnit, RequestId, Sequence, Span
from triptych.memory.kv_cache import KVCache
from triptych.memory.prefix import prompt_hashes

BLOCK = 4
ROOT = b"model and revisn"
CAT, DOG = make_unit("cat", 6), make_unit("dog", 6)
PLACEHOLDER = 9

Piece = int | tuple[EncodeUnit, int, int]  # a token; or rows [offset, offset + length) of a unit
Content = tuple[object, ...]  # per position, what stands there


def hashes(token_ids: list[int], units: tuple[EncodeUnit, ...] = (), spans: tuple[Span, ...] = ()) -> BlockHashes:
    return prompt_hashes(ROOT, token_ids, units, spans, BLOCK)


def hashes_of(pieces: list[Piece], root: bytes = ROOT) -> BlockHashes:
    token_ids, units, spans, _ = laid_out(pieces)
    return prompt_hashes(root, token_ids, units, spans, BLOCK)


def laid_out(pieces: list[Piece]) -> tuple[list[int], tuple[EncodeUnit, ...], tuple[Span, ...], Content]:
    token_ids: list[int] = []
    units: list[EncodeUnit] = []
    spans: list[Span] = []
    content: list[object] = []
    for piece in pieces:
        if isinstance(piece, int):
            token_ids.append(piece)
            content.append(piece)
        else:
            unit, offset, length = piece
            spans.append(Span(len(token_ids), length, len(units), offset))
            units.append(unit)
            token_ids += [PLACEHOLDER] * length
            content += [(unit.hash, row) for row in range(offset, offset + length)]
    return token_ids, tuple(units), tuple(spans), tuple(content)


rows = st.tuples(st.sampled_from([CAT, DOG]), st.integers(0, 3), st.integers(1, 5))
pieces = st.lists(st.one_of(st.sampled_from([7, 8, PLACEHOLDER]), rows), max_size=8)


def test_only_full_blocks_have_a_hash():
    assert [len(hashes([1] * n).blocks) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_every_block_of_a_prompt_has_a_hash_of_its_own_even_if_all_its_tokens_are_equal():
    blocks = hashes([5] * 400).blocks
    assert len(set(blocks)) == len(blocks) == 100
    assert {len(hash_) for hash_ in blocks} == {16}


def test_a_token_changes_its_own_block_and_all_behind_it():
    one, other = hashes([1] * 16).blocks, hashes([1] * 9 + [2] + [1] * 6).blocks
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, True, False, False]


def test_token_ids_that_share_bytes_do_not_run_together():
    lists = [[1, 0, 0, 0], [0, 1, 0, 0], [256, 0, 0, 0], [1, 256, 0, 0], [1 << 32, 0, 0, 0], [257, 0, 0, 0]]
    assert len({hashes(token_ids).blocks for token_ids in lists}) == len(lists)


def test_another_model_or_revision_shares_nothing():
    one, other = (prompt_hashes(root, [1] * 12, (), (), BLOCK).blocks for root in (ROOT, b"other revision!!"))
    assert not set(one) & set(other)


@pytest.mark.parametrize(
    "other",
    [
        [7, 7, (DOG, 0, 6), 8, 8, 8, 8],
        [7, 7, (CAT, 1, 5), 8, 8, 8, 8, 8],
        [7, 7, (CAT, 0, 5), PLACEHOLDER, 8, 8, 8, 8],
        [7, 7, *[PLACEHOLDER] * 6, 8, 8, 8, 8],
        [7, (CAT, 0, 6), 7, 8, 8, 8, 8],
        [7, 7, (CAT, 0, 2), (DOG, 2, 4), 8, 8, 8, 8],
        [7, 7, (CAT, 0, 3), (CAT, 0, 3), 8, 8, 8, 8],
    ],
    ids=["picture", "row", "fewer rows", "no picture", "place", "second half", "same rows twice"],
)
def test_a_difference_in_media_that_no_token_shows_changes_the_last_block(other):
    picture = [7, 7, (CAT, 0, 6), 8, 8, 8, 8]
    assert hashes_of(picture).blocks[-1] != hashes_of(other).blocks[-1]


def test_two_pictures_in_one_block_may_not_be_swapped():
    a, b = make_unit("a", 1), make_unit("b", 1)
    assert hashes_of([(a, 0, 1), (b, 0, 1), 8, 8]).blocks != hashes_of([(b, 0, 1), (a, 0, 1), 8, 8]).blocks


def test_a_picture_changes_every_block_behind_it_but_none_before_it():
    one = hashes_of([8] * 9 + [(CAT, 0, 2)] + [8] * 9).blocks
    other = hashes_of([8] * 9 + [(DOG, 0, 2)] + [8] * 9).blocks
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, True, False, False, False]


def test_the_order_of_the_units_in_a_request_does_not_matter_only_where_their_rows_stand():
    token_ids, spans = make_prompt((CAT, DOG))
    turned = tuple(Span(span.start, span.length, 1 - span.unit, span.offset) for span in spans)
    assert hashes(token_ids, (CAT, DOG), spans) == hashes(token_ids, (DOG, CAT), turned)


@given(pieces, pieces, pieces, st.booleans())
@settings(max_examples=300, deadline=None)
def test_hashes_are_equal_for_equal_beginnings_and_for_nothing_else(common, one, other, same_root):
    """For all prompts out of few tokens and few rows, so that much of them is equal by chance."""
    first, second = hashes_of(common + one), hashes_of(common + other, ROOT if same_root else b"another")
    contents = [laid_out(common + rest)[3] for rest in (one, other)]
    for index, (a, b) in enumerate(zip(first.blocks, second.blocks, strict=False)):
        equal = contents[0][: (index + 1) * BLOCK] == contents[1][: (index + 1) * BLOCK]
        if a == b:
            assert equal and same_root
        elif (index + 1) * BLOCK <= len(laid_out(common)[0]):
            assert not same_root, f"block {index} of the same beginning has two hashes"
    assert len(set(first.blocks)) == len(first.blocks)


@given(pieces, st.lists(st.sampled_from([7, 8, PLACEHOLDER]), max_size=14), st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_what_decode_seals_behind_a_prompt_is_what_a_longer_prompt_asks_for(prompt, answer, step):
    """Also where the prompt ends amid a block that pictures fall into (`BlockHashes.tail`)."""
    token_ids, units, spans, _ = laid_out(prompt)
    sequence = Sequence(
        RequestId("r"), token_ids + answer, len(token_ids), make_sampling(), prompt_hashes=hashes_of(prompt)
    )
    kv = KVCache(64, BLOCK)
    kv.hold(sequence, len(sequence.token_ids))
    while sequence.num_computed < len(sequence.token_ids):
        sequence.num_computed = min(sequence.num_computed + step, len(sequence.token_ids))
        kv.seal(sequence)
    longer = hashes(token_ids + answer, units, spans)
    assert tuple(sequence.sealed) == longer.blocks
    assert kv.find(longer, len(sequence.token_ids)) == sequence.block_table[: len(longer.blocks)]
    assert longer.tail == hashes_of(prompt + answer).tail


def test_thousands_of_prompts_that_differ_in_one_thing_share_no_block_that_has_it():
    seen: set[bytes] = set()
    for number in range(4000):
        unit = EncodeUnit(blake2b(number.to_bytes(4, "little"), digest_size=16).digest(), "image", 8)
        token_ids, spans = make_prompt((unit,), 4)
        before, *behind = hashes(token_ids, (unit,), spans).blocks
        assert not seen.intersection(behind)
        seen.update(behind)
    assert before not in seen
    assert len(seen) == 4000 * 3
