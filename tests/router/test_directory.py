"""What the caches of the instances seem to hold: added, evicted, forgotten, and never more than it has room for."""

import pytest

from triptych.core import BlockHash, BlockHashes, InstanceId, UnitHash
from triptych.messages import Evicted
from triptych.router import directory
from triptych.router.directory import Directory

E, P = InstanceId("e0"), InstanceId("p0")
UNITS = [UnitHash(bytes([i] * 16)) for i in range(8)]
BLOCKS = tuple(BlockHash(bytes([100 + i] * 16)) for i in range(8))


def test_the_holders_of_a_unit_are_those_that_were_said_to_have_it() -> None:
    known = Directory()
    known.add_unit(UNITS[0], E)
    known.add_unit(UNITS[0], P, E)
    assert known.holders(UNITS[0]) == {E, P}
    assert known.holders(UNITS[1]) == set()


def test_asking_for_a_unit_that_nobody_has_notes_nothing() -> None:
    known = Directory()
    known.holders(UNITS[0]).add(E)
    assert known.holders(UNITS[0]) == set()


def test_what_an_instance_evicted_it_does_not_hold_and_others_still_do() -> None:
    known = Directory()
    known.add_unit(UNITS[0], E, P)
    known.add_blocks(P, BLOCKS)
    known.add_blocks(E, BLOCKS)
    known.evicted(Evicted(P, [UNITS[0], UNITS[1]], [BLOCKS[2]]))
    assert known.holders(UNITS[0]) == {E}
    assert known.num_cached_blocks(P, BlockHashes(b"", BLOCKS)) == 2
    assert known.num_cached_blocks(E, BlockHashes(b"", BLOCKS)) == 8


def test_only_leading_blocks_count() -> None:
    known = Directory()
    known.add_blocks(P, BLOCKS[1:])
    assert known.num_cached_blocks(P, BlockHashes(b"", BLOCKS)) == 0
    known.add_blocks(P, BLOCKS[:1])
    assert known.num_cached_blocks(P, BlockHashes(b"", BLOCKS)) == 8
    assert known.num_cached_blocks(P, BlockHashes()) == 0
    assert known.num_cached_blocks(E, BlockHashes(b"", BLOCKS)) == 0


def test_an_instance_that_is_gone_holds_nothing() -> None:
    known = Directory()
    known.add_unit(UNITS[0], E, P)
    known.add_unit(UNITS[1], P)
    known.add_blocks(P, BLOCKS)
    known.forget(P)
    assert [known.holders(unit) for unit in UNITS[:2]] == [{E}, set()]
    assert known.num_cached_blocks(P, BlockHashes(b"", BLOCKS)) == 0


def test_dropping_what_is_not_there_is_nothing() -> None:
    known = Directory()
    known.drop_unit(UNITS[0], E)
    known.evicted(Evicted(E, [UNITS[0]], [BLOCKS[0]]))
    known.forget(E)


def test_the_unit_that_was_not_spoken_of_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "MAX_UNITS", 3)
    known = Directory()
    for unit in UNITS[:3]:
        known.add_unit(unit, E)
    known.add_unit(UNITS[0], P)
    known.add_unit(UNITS[3], E)
    assert [bool(known.holders(unit)) for unit in UNITS[:4]] == [True, False, True, True]


def test_the_end_of_a_prefix_is_forgotten_before_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "MAX_BLOCKS", 6)
    known = Directory()
    known.add_blocks(P, BLOCKS[:4])
    known.add_blocks(P, BLOCKS[4:])
    assert known.num_cached_blocks(P, BlockHashes(b"", BLOCKS[4:])) == 4
    assert known.num_cached_blocks(P, BlockHashes(b"", BLOCKS[:4])) == 2
    known.add_blocks(P, BLOCKS)
    assert known.num_cached_blocks(P, BlockHashes(b"", BLOCKS)) == 6
