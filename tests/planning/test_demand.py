"""What requests ask for, in rows and tokens, and loads of equal ones."""

import math
from typing import Any

import pytest

from triptych.planning.workloads.demand import Demand, Item, Phase, dealt, poisson


def test_a_prompt_is_its_text_and_the_rows_of_its_media() -> None:
    demand = Demand(0.0, (Item((64, 64)), Item((3,))), text_tokens=10)
    assert (demand.media_rows, demand.prompt_tokens) == (131, 141)


def test_items_are_dealt_in_order() -> None:
    one, two, three = Item((1,)), Item((2,)), Item((3,))
    assert list(dealt([one, two, three], [0, 2, 0, 1])) == [(), (one, two), (), (three,)]


def test_phases_follow_each_other_at_one_rate() -> None:
    demands = poisson([Phase(1000, 5), Phase(1000, 7, (Item((3,)),), 9)], rate=4.0, seed=1)
    assert [one.output_tokens for one in demands] == [5] * 1000 + [7] * 1000
    assert demands[0].at_s == 0 and 450 < demands[-1].at_s < 550
    assert (demands[-1].media, demands[-1].text_tokens) == ((Item((3,)),), 9)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"at_s": math.inf}, "comes at inf s"),
        ({"at_s": math.nan}, "comes at nan s"),
        ({"at_s": -1.0}, r"comes at -1\.0 s"),
        ({"prefix": (1, 2), "text_tokens": 31}, "32 tokens of 31 have names"),
        ({"prefix": (-1,)}, "-1 to -1 are no names"),
        ({"prefix": (1 << 127,)}, "are no names"),
    ],
)
def test_a_demand_that_cannot_be_is_a_fault_of_whoever_made_it(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        Demand(**{"at_s": 0.0} | fields)


def test_a_name_is_a_number_that_fits_into_a_hash() -> None:
    with pytest.raises(AssertionError, match="-5 is no name"):
        Item((1,), name=-5)
