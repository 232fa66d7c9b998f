"""What requests of a kind ask for, and which of it they have in common."""

from itertools import pairwise

import pytest

from tests.planning.rows import SimpleRows
from triptych.config import KV_BLOCK_TOKENS
from triptych.errors import ConfigError
from triptych.planning.quantities import Seconds
from triptych.planning.workloads import kinds
from triptych.planning.workloads.demand import Demand, Item
from triptych.planning.workloads.distributions import Uniform
from triptych.planning.workloads.kinds import Audio, Images, Kind, Repeated, SharedPrefix, Videos, requests


def drawn(kind: Kind, number: int = 1000, seed: int = 0, kind_number: int = 0) -> list[Demand]:
    return list(requests(kind, number, SimpleRows(), seed, kind_number))


def test_a_kind_without_media_is_text() -> None:
    assert drawn(Kind(text_tokens=5, output_tokens=7), 2) == [Demand(0.0, (), 5, 7)] * 2


def test_a_request_has_at_least_one_token_of_each() -> None:
    assert drawn(Kind(text_tokens=0, output_tokens=0), 1) == [Demand(0.0, (), 1, 1)]


def test_media_have_the_rows_of_the_model_and_what_they_cost_elsewhere() -> None:
    kind = Kind(
        images=Images(size="1000x20", count=2, bytes_per_pixel=0.5),
        videos=Videos(frames=5, size="100x100", bytes_per_pixel=0.1),
        audio=Audio(seconds=3, bytes_per_second=100),
    )
    (one,) = drawn(kind, 1)
    assert one.media == (
        Item((20,), 20_000, 10_000),
        Item((20,), 20_000, 10_000),
        Item((10, 10, 10), 50_000, 5_000, "video"),
        Item((31,), 0, 300, "audio"),
    )
    assert one.media_rows == 101 and one.prompt_tokens == 123


def test_the_model_is_asked_once_for_each_size() -> None:
    rows = SimpleRows()
    list(requests(Kind(images=Images(size=["10x10", "20x20"])), 1000, rows, 0, 0))
    assert rows.num_asked == 2


def test_numbers_of_media_may_differ_and_be_none() -> None:
    lengths = [len(one.media) for one in drawn(Kind(images=Images(size="10x10", count=Uniform(least=0, most=2))))]
    assert set(lengths) == {0, 1, 2}
    assert sum(lengths) == pytest.approx(1000, rel=0.1)


def test_media_are_all_different_unless_they_are_repeated() -> None:
    (one, *_) = drawn(Kind(images=Images(size="10x10")))
    assert one.media[0].name is None


def test_repeated_media_are_the_share_that_was_asked_for_and_equal_where_their_names_are() -> None:
    images = Images(size=[f"{width}x50" for width in range(20, 400, 20)])
    items = [one.media[0] for one in drawn(Kind(images=images, repeated=Repeated(share=0.25, distinct=10)), 4000)]
    named = [item for item in items if item.name is not None]
    assert len(named) == pytest.approx(1000, rel=0.1)
    assert len({item.name for item in named}) == len(set(named)) == 10


def test_skew_makes_the_first_of_the_repeated_media_the_most_popular() -> None:
    kind = Kind(images=Images(size="10x10"), repeated=Repeated(share=1, distinct=4, skew=1))
    names = [one.media[0].name for one in drawn(kind, 20_000)]
    numbers = [names.count(name) for name in sorted(set(names))]
    assert numbers == pytest.approx([20_000 * share / (25 / 12) for share in (1, 1 / 2, 1 / 3, 1 / 4)], rel=0.05)


def test_repeated_media_do_not_depend_on_how_many_requests_there_are() -> None:
    kind = Kind(
        images=Images(size=["10x10", "20x20", "30x30"]), audio=Audio(seconds=2), repeated=Repeated(share=1, distinct=5)
    )
    few, many = ({item.name: item for one in drawn(kind, number) for item in one.media} for number in (50, 500))
    assert few == many and len(few) == 10


def test_names_of_two_kinds_are_never_the_same() -> None:
    kind = Kind(
        images=Images(size="10x10"),
        audio=Audio(seconds=1),
        repeated=Repeated(share=1, distinct=kinds.MOST_REPEATED // 1000),
        shared_prefix=SharedPrefix(tokens=64, distinct=50),
    )
    first, second = drawn(kind, kind_number=0), drawn(kind, kind_number=1)
    names = [{item.name for one in demands for item in one.media} for demands in (first, second)]
    blocks = [{name for one in demands for name in one.prefix} for demands in (first, second)]
    assert not names[0] & names[1] and not blocks[0] & blocks[1]


def test_prefixes_of_two_kinds_are_never_the_same_however_long_they_are() -> None:
    of_kinds = [
        drawn(Kind(shared_prefix=SharedPrefix(tokens=tokens, distinct=1000)), kind_number=number)
        for number, tokens in enumerate((32_000, 16, 160))
    ]
    blocks = [{name for one in demands for name in one.prefix} for demands in of_kinds]
    assert not blocks[0] & blocks[1] and not blocks[0] & blocks[2] and not blocks[1] & blocks[2]


def test_a_shared_prefix_is_text_beside_and_names_its_full_blocks() -> None:
    prefix = SharedPrefix(tokens=3 * KV_BLOCK_TOKENS + 5, distinct=2)
    demands = drawn(Kind(text_tokens=10, shared_prefix=prefix))
    assert {one.text_tokens for one in demands} == {3 * KV_BLOCK_TOKENS + 15}
    first, second = sorted({one.prefix for one in demands})
    assert len(first) == len(second) == 3 and not set(first) & set(second)
    assert all(after == before + 1 for before, after in pairwise(first))


def test_a_prefix_may_be_of_some_requests_only() -> None:
    demands = drawn(Kind(text_tokens=10, shared_prefix=SharedPrefix(tokens=32, share=0.5)), 2000)
    with_prefix = [one for one in demands if one.prefix]
    assert len(with_prefix) == pytest.approx(1000, rel=0.1)
    assert {(one.text_tokens, bool(one.prefix)) for one in demands} == {(42, True), (10, False)}


def test_a_prefix_shorter_than_a_block_is_shared_by_nobody() -> None:
    assert {one.prefix for one in drawn(Kind(shared_prefix=SharedPrefix(tokens=KV_BLOCK_TOKENS - 1)))} == {()}


def test_a_timeout_is_that_of_every_request() -> None:
    assert {one.timeout_s for one in drawn(Kind(timeout=Seconds(1.5)))} == {1.5}


def test_the_seed_decides_everything() -> None:
    kind = Kind(text_tokens=Uniform(least=1, most=99), images=Images(size=["10x10", "20x20"]))
    assert drawn(kind, seed=1) == drawn(kind, seed=1) != drawn(kind, seed=2)


def test_more_shared_text_than_memory_holds_is_refused() -> None:
    with pytest.raises(ConfigError, match="shared_prefix: 100 texts of 10000000 tokens; at most 800000000 tokens"):
        drawn(Kind(shared_prefix=SharedPrefix(tokens=10_000_000, distinct=100)), 10_000)


def test_more_media_than_memory_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "MOST_ITEMS", 99)
    with pytest.raises(ConfigError, match="count: 100 media in 10 requests; at most 99 are possible"):
        drawn(Kind(images=Images(size="10x10", count=10)), 10)
