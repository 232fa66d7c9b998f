"""The smallest embedding cache by the division that the stages of an instance make."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.core import Role
from triptych.planning.costs.embedding_room import blocks_of, least_blocks
from triptych.stages.group import ENCODE_SHARE


@given(encoded=st.integers(0, 10_000), prefilled=st.integers(1, 10_000))
@pytest.mark.parametrize("role", [Role.EP, Role.EPD])
def test_both_parts_fit_and_with_one_block_less_one_does_not(role: Role, encoded: int, prefilled: int) -> None:
    def fit(num_blocks: int) -> bool:
        part = int(num_blocks * ENCODE_SHARE)
        return part >= encoded and num_blocks - part >= prefilled

    least = least_blocks(role, encoded, prefilled)
    assert fit(least) and not fit(least - 1)


def test_a_role_with_one_part_has_all_of_it() -> None:
    assert [least_blocks(role, 3, 7) for role in (Role.E, Role.ED, Role.P, Role.PD, Role.D)] == [3, 3, 7, 7, 0]


def test_blocks_have_rows_of_one_unit() -> None:
    assert [blocks_of(rows) for rows in (0, 1, 16, 17)] == [0, 1, 1, 2]
