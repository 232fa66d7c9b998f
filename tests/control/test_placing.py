"""Plans of changes: they reach what is wanted, serve every stage all the time, and do no more than is needed."""

from collections import Counter
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.control.placing import Move, Start, Stop, Switch, plan
from triptych.core import InstanceId, Placement, Role, unserved

complete = st.lists(st.sampled_from(Role), min_size=1, max_size=8).filter(lambda roles: not unserved(roles))


def named(roles: list[Role]) -> dict[InstanceId, Role]:
    return {InstanceId(f"i{number}"): role for number, role in enumerate(roles)}


def placed(text: str) -> list[Role]:
    return list(Placement.parse(text).roles)


def carried_out(current: dict[InstanceId, Role], moves: list[Move]) -> list[Role]:
    """The roles in the end. Asserts that somebody takes work for every stage during and after each move."""
    roles = dict(current)
    for number, move in enumerate(moves):
        if isinstance(move, Start):
            roles[InstanceId(f"new{number}")] = move.role
            continue
        assert roles.pop(move.instance) is not None
        assert not unserved(roles.values()), f"{unserved(roles.values())} during {move} of {moves}"
        if isinstance(move, Switch):
            roles[move.instance] = move.role
    return list(roles.values())


@given(complete, complete)
@settings(deadline=None)
def test_a_plan_reaches_the_placement_and_serves_every_stage_at_every_moment(
    current: list[Role], wanted: list[Role]
) -> None:
    moves = plan(named(current), wanted)
    assert Counter(carried_out(named(current), moves)) == Counter(wanted)
    touched = [move.instance for move in moves if not isinstance(move, Start)]
    assert len(touched) == len(set(touched)), "an instance is touched once"


@given(complete, complete)
@settings(deadline=None)
def test_a_plan_keeps_whoever_has_a_wanted_role(current: list[Role], wanted: list[Role]) -> None:
    moves = plan(named(current), wanted)
    num_kept = (Counter(current) & Counter(wanted)).total()
    assert sum(not isinstance(move, Start) for move in moves) == len(current) - num_kept


def test_a_plan_starts_one_more_than_the_difference_only_where_switching_cannot_do_it() -> None:
    """Among all small placements: compared with every order of every assignment of switches."""
    small = [list(roles) for n in (1, 2, 3) for roles in product(Role, repeat=n) if not unserved(roles)]
    small = [roles for roles in small if roles == sorted(roles)]
    for current, wanted in product(small, small):
        num_starts = sum(isinstance(move, Start) for move in plan(named(current), wanted))
        assert num_starts == fewest_starts(current, wanted), f"from {current} to {wanted}"


def fewest_starts(current: list[Role], wanted: list[Role]) -> int:
    """By trying everything: starts first, then switches in any order, then stops."""

    def can_switch(serving: Counter[Role], surplus: Counter[Role], lacking: Counter[Role]) -> bool:
        if not lacking:
            return True
        return any(
            not unserved((serving - Counter([old])).elements())
            and can_switch(
                serving - Counter([old]) + Counter([new]), surplus - Counter([old]), lacking - Counter([new])
            )
            for old, new in product(surplus, lacking)
        )

    surplus, lacking = Counter(current) - Counter(wanted), Counter(wanted) - Counter(current)
    subsets: list[Counter[Role]] = [Counter()]
    for role in lacking.elements():
        subsets += [subset + Counter([role]) for subset in subsets]
    possible = [s.total() for s in subsets if can_switch(Counter(current) + s, surplus, lacking - s)]
    return min(possible)


@pytest.mark.parametrize(
    ("current", "wanted", "expected"),
    [
        ("1e1p1d", "1e1p1d", []),
        ("1e2p1d", "1e1p2d", [Switch(InstanceId("i2"), Role.D)]),
        ("1e1p1d", "2e1p1d", [Start(Role.E)]),
        ("2e1p1d", "1e1p1d", [Stop(InstanceId("i1"))]),
        # nobody can be spared for a switch: a new one first
        ("1e1p1d", "1e1pd", [Start(Role.PD), Stop(InstanceId("i2")), Stop(InstanceId("i1"))]),
        ("1epd", "1e1p1d", [Start(Role.D), Start(Role.E), Start(Role.P), Stop(InstanceId("i0"))]),
        # which one is started decides whether weights have to be loaded
        ("1e2p1d", "2e1p2d", [Start(Role.E), Switch(InstanceId("i2"), Role.D)]),
    ],
)
def test_plans_of_usual_changes(current: str, wanted: str, expected: list[Move]) -> None:
    assert plan(named(placed(current)), placed(wanted)) == expected


def test_what_is_missing_is_started_before_anything_else_happens() -> None:
    """Stages that nobody serves any more, because an instance was given up."""
    assert plan(named([Role.E, Role.P]), placed("1e1pd")) == [Start(Role.PD), Stop(InstanceId("i1"))]
    assert plan({}, placed("1epd")) == [Start(Role.EPD)]


def test_a_large_change_is_planned_at_once() -> None:
    current = placed("10epd7e7p7d")
    assert len(plan(named(current), placed("10ep10ed10pd1epd"))) == 30
