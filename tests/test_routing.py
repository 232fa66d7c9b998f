"""Pickers: least loaded first, units by cost, and who may decode for whom."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import make_peer, make_table, make_unit
from triptych.core import InstanceId, Stage
from triptych.errors import RequestError
from triptych.messages import Table
from triptych.routing import RoutingTable, assign_units, pick, pick_decode


def test_a_table_is_complete_when_every_stage_has_an_instance():
    assert make_table(e0="e", p0="p", d0="d").complete
    assert make_table(epd0="epd").complete
    assert not make_table(e0="e", p0="p").complete
    assert not RoutingTable().complete


def test_a_table_message_becomes_the_picture_of_its_version():
    table = RoutingTable.of(Table(7, [make_peer("e0", "e"), make_peer("pd0", "pd")]))
    assert table.version == 7
    assert [peer.id for peer in table.serving(Stage.DECODE)] == ["pd0"]


def test_the_least_loaded_instance_is_picked():
    table = make_table(d0="d", d1="d", d2="d")
    assert pick(table, Stage.DECODE, {"d0": 2.0, "d1": 0.5, "d2": 1.0}).id == "d1"


def test_an_instance_of_which_no_load_is_known_counts_as_idle():
    assert pick(make_table(d0="d", d1="d"), Stage.DECODE, {"d0": 0.1}).id == "d1"


def test_among_equals_the_preferred_one_is_picked_then_the_first():
    table = make_table(d0="d", d1="d", d2="d")
    assert pick(table, Stage.DECODE, {}).id == "d0"
    assert pick(table, Stage.DECODE, {}, prefer=InstanceId("d2")).id == "d2"
    assert pick(table, Stage.DECODE, {"d2": 1.0}, prefer=InstanceId("d2")).id == "d0"


@pytest.mark.parametrize("stage", Stage)
def test_without_an_instance_of_a_stage_the_request_gets_503(stage):
    others = "".join(other for other in Stage if other is not stage)
    with pytest.raises(RequestError, match=f"no instance serves {stage.name.lower()}") as caught:
        pick(make_table(x0=others), stage, {})
    assert caught.value.status == 503


def test_a_prefill_instance_hands_on_to_the_least_loaded_decode_instance():
    table = make_table(p0="p", d0="d", pd0="pd")
    assert pick_decode(table, {"d0": 1.0}, InstanceId("p0"), "r").id == "pd0"
    assert pick_decode(table, {"pd0": 1.0}, InstanceId("p0"), "r").id == "d0"


def test_an_instance_that_prefills_and_decodes_keeps_a_sequence_unless_a_pure_decode_instance_is_less_loaded():
    table = make_table(pd0="pd", epd0="epd", d0="d")
    assert pick_decode(table, {}, InstanceId("pd0"), "r").id == "pd0"
    assert pick_decode(table, {"pd0": 1.0}, InstanceId("pd0"), "r").id == "d0"
    assert pick_decode(table, {"pd0": 1.0, "d0": 2.0}, InstanceId("pd0"), "r").id == "pd0"


def test_no_circle_of_instances_can_hand_sequences_to_each_other():
    table = make_table(p0="p", p1="p", pd0="pd", pd1="pd", epd0="epd", d0="d", ed0="ed")
    rank = {
        id: (Stage.PREFILL not in peer.role.stages) + (Stage.DECODE in peer.role.stages)
        for id, peer in table.peers.items()
    }
    decoders = table.serving(Stage.DECODE)
    for prefill in table.serving(Stage.PREFILL):
        for idle in decoders:
            loads = {peer.id: float(peer is not idle) for peer in decoders}
            picked = pick_decode(table, loads, prefill.id, "r")
            assert picked is prefill or rank[picked.id] > rank[prefill.id]


def test_many_that_prefill_do_not_all_choose_the_same_one_in_between_two_reports():
    names = {f"p{i}": "p" for i in range(16)} | {f"d{i}": "d" for i in range(16)}
    table, loads = make_table(**names), {InstanceId(f"d{i}"): float(i) for i in range(16)}
    picked = [pick_decode(table, loads, InstanceId(f"p{i % 16}"), f"r{i}").id for i in range(320)]
    assert max(picked.count(name) for name in set(picked)) < 80
    assert picked.count("d15") < 10, "the busiest one of two is never chosen"


def test_one_that_prefills_alone_knows_best():
    table, loads = make_table(p0="p", d0="d", d1="d", d2="d"), {"d0": 2.0, "d1": 1.0, "d2": 3.0}
    assert {pick_decode(table, loads, InstanceId("p0"), f"r{i}").id for i in range(20)} == {"d1"}


def test_an_instance_that_is_no_longer_in_the_table_still_hands_on():
    assert pick_decode(make_table(d0="d"), {}, InstanceId("p0"), "r").id == "d0"
    with pytest.raises(RequestError):
        pick_decode(make_table(p0="p"), {}, InstanceId("p0"), "r")


def test_units_of_one_request_are_spread_over_all_encode_instances():
    units = [make_unit(f"u{i}", 8) for i in range(4)]
    assigned = assign_units(make_table(e0="e", e1="e", p0="p"), units, {}, 1e-3)
    assert sorted(assigned.values()) == ["e0", "e0", "e1", "e1"]


def test_the_units_of_an_item_stay_together_where_there_are_as_many_items_as_instances():
    units = [make_unit(f"item{item}-{index}", 4) for item in range(3) for index in range(5)]
    items = {unit.hash: str(number // 5).encode() for number, unit in enumerate(units)}
    assigned = assign_units(make_table(e0="e", e1="e", e2="e"), units, {}, 1.0, items=items)
    for first in (0, 5, 10):
        assert len({assigned[unit.hash] for unit in units[first : first + 5]}) == 1
    assert len(set(assigned.values())) == 3


def test_an_item_is_divided_among_the_instances_that_there_are_for_each():
    units = [make_unit(f"item{item}-{index}", 4) for item in range(2) for index in range(6)]
    items = {unit.hash: str(number // 6).encode() for number, unit in enumerate(units)}
    names = dict.fromkeys((f"e{i}" for i in range(5)), "e")
    assigned = [assign_units(make_table(**names), units, {}, 1.0, items=items)[unit.hash] for unit in units]
    parts = [assigned[first : first + 3] for first in range(0, 12, 3)]
    assert all(len(set(part)) == 1 for part in parts), "parts are consecutive"
    assert len({part[0] for part in parts}) == 4, "an item is read by two instances, and nobody reads two items"


def test_equal_units_are_assigned_once():
    units = [make_unit("same"), make_unit("same"), make_unit("other")]
    assert len(assign_units(make_table(e0="e"), units, {}, 1e-3)) == 2


def test_units_go_round_a_busy_instance():
    units = [make_unit(f"u{i}", 10) for i in range(3)]
    assigned = assign_units(make_table(e0="e", e1="e"), units, {"e0": 1.0}, 1e-3)
    assert set(assigned.values()) == {"e1"}


def test_loads_of_the_caller_are_left_as_they_are():
    loads = {InstanceId("e0"): 1.0}
    assign_units(make_table(e0="e"), [make_unit()], loads, 1.0)
    assert loads == {"e0": 1.0}


def test_a_unit_goes_to_the_encode_instance_that_holds_it_however_busy_that_is():
    unit, other = make_unit("held"), make_unit("other")
    held = {unit.hash: {"e1", "p0"}}
    table = make_table(e0="e", e1="e", p0="p")
    assert assign_units(table, [unit, other], {"e1": 9.0}, 1.0, holders=held) == {unit.hash: "e1", other.hash: "e0"}


def test_of_several_holders_the_least_busy_one_is_taken_and_one_that_is_gone_or_cannot_encode_is_none():
    unit = make_unit("held")
    table = make_table(e0="e", e1="e", e2="e", p0="p")
    assert assign_units(table, [unit], {"e0": 2.0, "e1": 1.0}, 1.0, holders={unit.hash: {"e0", "e1"}}) == {
        unit.hash: "e1"
    }
    assert assign_units(table, [unit], {"e0": 2.0}, 1.0, holders={unit.hash: {"e9", "p0"}}) == {unit.hash: "e1"}


def test_what_is_held_costs_nothing_and_does_not_push_other_units_away():
    units = [make_unit(f"u{i}") for i in range(3)]
    held = {units[0].hash: ["e0"]}
    assigned = assign_units(make_table(e0="e", e1="e"), units, {}, 1.0, holders=held)
    assert sorted([assigned[units[1].hash], assigned[units[2].hash]]) == ["e0", "e1"]


def test_without_spreading_all_units_go_to_the_least_loaded_instance_but_held_ones_stay():
    units = [make_unit(f"u{i}") for i in range(5)]
    held = {units[0].hash: {"e0"}}
    table = make_table(e0="e", e1="e", e2="e")
    assigned = assign_units(table, units, {"e0": 1.0, "e2": 2.0}, 1.0, holders=held, spread=False)
    assert [assigned[unit.hash] for unit in units] == ["e0", "e1", "e1", "e1", "e1"]


def test_units_without_an_encode_instance_get_503_and_no_units_need_none():
    with pytest.raises(RequestError) as caught:
        assign_units(make_table(p0="p"), [make_unit()], {}, 1.0)
    assert caught.value.status == 503
    assert assign_units(make_table(p0="p"), [], {}, 1.0) == {}


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_the_split_is_within_four_thirds_of_the_best_one(sizes, num_encoders):
    names = [f"e{i}" for i in range(num_encoders)]
    units = [make_unit(f"u{i}", size) for i, size in enumerate(sizes)]
    assigned = assign_units(make_table(**dict.fromkeys(names, "e")), units, {}, 1.0)
    makespan = max(sum(unit.num_tokens for unit in units if assigned[unit.hash] == name) for name in names)
    best = min(
        max(sum(size for size, place in zip(sizes, places, strict=True) if place == name) for name in names)
        for places in itertools.product(names, repeat=len(sizes))
    )
    assert makespan <= (4 / 3 - 1 / (3 * num_encoders)) * best + 1e-9
